import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.agreement import disagreement, wide
from nanodeploy.ops.case import Cost
from nanodeploy.ops.decode_attention.cases import TOLERANCE, lengths
from nanodeploy.ops.layouts import E4M3, LatentLayout, num_pages_for
from nanodeploy.ops.mla_decode import cases as decode
from nanodeploy.ops.mla_decode.reference import context
from nanodeploy.ops.mla_prefill.reference import mla_prefill, rows_at_once


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int  # rows of q, padding included
    num_seqs: int
    num_heads: int
    nope_dim: int  # dn
    value_dim: int  # dv
    rank: int
    rope_dim: int
    page_size: int
    max_pages: int
    fp8: bool = False  # the pages; else they are of dtype
    known: bool = True  # whether the host says how long the contexts are
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    num_before: int | None = None  # rows before the first chunk's

    @property
    def tokens_per_seq(self) -> int:
        """Queries that share a context, on average. Expanding it costs as much as so many hundred absorbed ones."""
        return self.num_tokens // max(1, self.num_seqs)

    @property
    def layout(self) -> LatentLayout:
        return LatentLayout(self.page_size, self.rank, self.rope_dim, E4M3 if self.fp8 else self.dtype)


def point(
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    heads: int,
    fp8: bool = False,
    nope_dim: int = 128,
    value_dim: int = 128,
) -> Case:
    shape = (sum(q_lens), len(q_lens), heads, nope_dim, value_dim, 512, 64, 64, num_pages_for(max(kv_lens), 64))
    return Case(torch.bfloat16, *shape, fp8, q_lens=q_lens, kv_lens=kv_lens, num_before=0)


POINTS = {
    "h128 1x8192": point((8192,), (8192,), 128),
    "h128 4x2048": point((2048,) * 4, (2048,) * 4, 128),
    "h128 2048 at the end of 16384": point((2048,), (16384,), 128),
    "h128 2048 at the end of 16384 fp8": point((2048,), (16384,), 128, True),
    "h128 512 at the end of 16384": point((512,), (16384,), 128),
    "h128 128 at the end of 16384": point((128,), (16384,), 128),
    "h128 16x16 at the end of 4096": point((16,) * 16, (4096,) * 16, 128),
    "h16 1x8192": point((8192,), (8192,), 16),
    "h16 8x1024": point((1024,) * 8, (1024,) * 8, 16),
    "h16 1x256": point((256,), (256,), 16),
    "h16 64 at the end of 8192": point((64,), (8192,), 16),
    "h16 64 at the end of 8192 fp8": point((64,), (8192,), 16, True),
    "h64 1x4096 dims 192, 256": point((4096,), (4096,), 64, nope_dim=192, value_dim=256),
}

REGIONS = [
    ({"rank": 512, "tokens_per_seq": [low, high]}, points)
    for low, high in ((1, 48), (49, 127), (128, 383), (384, 1023), (1024, None))
    if (points := [n for n, c in POINTS.items() if low <= c.tokens_per_seq <= (high or 2**30) and not c.fp8])
]

FAR = Case(
    torch.bfloat16,
    *(132, 5, 16, 128, 128, 512, 64, 256, 3000, False),
    known=False,
    q_lens=(64, 1, 0, 65, 1),
    kv_lens=(768000, 1, 0, 700 * 256 + 3, 65),
    num_before=0,
)


def of(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, num_context) -> Case:
    num_tokens, num_heads, nope_dim = q_nope.shape
    num_seqs, max_pages = page_table.shape
    dims = (num_heads, nope_dim, w_uv.shape[1], w_uk.shape[2], q_rope.shape[2])
    fp8 = pages.dtype == torch.uint8
    return Case(q_nope.dtype, num_tokens, num_seqs, *dims, pages.shape[1], max_pages, fp8, num_context > 0)


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        dtype, rank, rope_dim, page_size, fp8 = draw(decode.shapes(st, small=small))
        max_pages = draw(st.integers(1, (160 if small else 3072) // page_size))
        num_seqs = draw(st.integers(1, 3 if small else 9))
        kv_lens = draw(st.tuples(*[lengths(st, page_size, max_pages)] * num_seqs))
        q_lens = tuple(
            draw(st.one_of(st.sampled_from([0, min(1, kv_len), kv_len]), st.integers(0, kv_len))) for kv_len in kv_lens
        )
        num_before = draw(st.sampled_from([0, 0, 1, 37]))
        nope_dim, value_dim = draw(
            st.sampled_from([(8, 8), (16, 32), (24, 16)] if small else [(16, 16), (128, 128), (192, 256)])
        )
        num_tokens = num_before + sum(q_lens) + draw(st.integers(0, 3))
        num_heads = draw(st.sampled_from([1, 3, 4, 8] if small else [1, 3, 8, 16, 20, 32]))
        return Case(
            dtype,
            *(num_tokens, num_seqs, num_heads, nope_dim, value_dim, rank, rope_dim, page_size, max_pages, fp8),
            known=draw(st.booleans()),
            q_lens=q_lens,
            kv_lens=kv_lens,
            num_before=num_before,
        )

    return cases()


def _lengths(case: Case, seed: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """q_lens, kv_lens and num_before of the case; random ones that fit its shapes where it leaves them open."""
    if case.q_lens is not None and case.kv_lens is not None and case.num_before is not None:
        return case.q_lens, case.kv_lens, case.num_before
    chance, full = random.Random(seed), case.max_pages * case.page_size
    num_before = chance.choice([0, chance.randint(0, case.num_tokens)])
    left = case.num_tokens - num_before
    q_lens = []
    for _ in range(case.num_seqs):
        q_lens.append(chance.randint(0, min(full, left)))
        left -= q_lens[-1]
    return tuple(q_lens), tuple(chance.randint(q_len, full) for q_len in q_lens), num_before


def make(case: Case, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Where the case leaves lengths open they are random. Rows of the queries that are nobody's are NaN."""
    g = torch.Generator(device).manual_seed(seed)
    q_lens, kv_lens, num_before = _lengths(case, seed)
    cache, page_table, lens = decode.make_cache(case.layout, kv_lens, case.max_pages, device, g)
    dims = (case.nope_dim, case.rope_dim)
    q_nope, q_rope = decode.make_queries(case.num_tokens, case.num_heads, dims, case.dtype, g)
    for part in (q_nope, q_rope):
        part[:num_before] = part[num_before + sum(q_lens) :] = float("nan")
    cu_q_lens = torch.tensor((num_before, *q_lens), device=device).cumsum(0).int()
    w_uk, w_uv = (
        torch.randn(case.num_heads, dim, case.rank, generator=g, device=device).mul_(case.rank**-0.5).to(case.dtype)
        for dim in (case.nope_dim, case.value_dim)
    )
    num_context = case.num_seqs * case.max_pages * case.page_size if case.known else 0
    tensors = (cache.pages, page_table, lens, cu_q_lens, w_uk, w_uv)
    return q_nope, q_rope.contiguous(), *tensors, sum(dims) ** -0.5, num_context


def cost(case: Case) -> Cost:
    """The less of two: keys and values made of every latent, or queries and results multiplied instead."""
    q_lens, kv_lens, _ = _lengths(case, 0)
    pairs = sum(q_len * (kv_len - q_len) + q_len * (q_len + 1) // 2 for q_len, kv_len in zip(q_lens, kv_lens))
    seen = [kv_len for q_len, kv_len in zip(q_lens, kv_lens) if q_len]
    weights = case.num_heads * case.rank * (case.nope_dim + case.value_dim)
    expanded = pairs * case.num_heads * (case.nope_dim + case.rope_dim + case.value_dim) + weights * sum(seen)
    absorbed = pairs * case.num_heads * (2 * case.rank + case.rope_dim) + weights * sum(q_lens)
    per_token = case.num_heads * (case.nope_dim + case.rope_dim + case.value_dim)
    index_bytes = 4 * (len(q_lens) + sum(1 + num_pages_for(n, case.page_size) for n in seen))
    values = case.num_tokens * per_token + weights
    num_bytes = sum(seen) * case.layout.token_bytes + values * case.dtype.itemsize + index_bytes
    return Cost(num_bytes, 2 * min(expanded, absorbed))


def _absorbed(args: tuple[Any, ...]) -> Tensor:
    """The op with what an absorbed kernel rounds to the working dtype, and the reference does not: queries and results
    in latent space."""
    q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, _ = args
    kind = torch.promote_types(q_nope.dtype, torch.float32)
    out = q_nope.new_zeros((*q_nope.shape[:2], w_uv.shape[1]))
    bounds = cu_q_lens.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        tokens = context(pages, page_table[row], kv_len, w_uk.shape[2], kind)
        columns = torch.arange(kv_len, device=tokens.device)
        step = rows_at_once(q_nope.shape[1], kv_len)
        for first in range(begin, end, step):
            last = min(first + step, end)
            q = torch.einsum("thd,hdr->thr", q_nope[first:last].to(kind), w_uk.to(kind)).to(out.dtype).to(kind)
            scores = torch.cat((q, q_rope[first:last].to(kind)), dim=-1) @ tokens.T * scale
            limits = torch.arange(first, last, device=tokens.device)[:, None, None] + (kv_len - end)
            mixed = scores.masked_fill_(columns > limits, float("-inf")).softmax(-1) @ tokens[:, : w_uk.shape[2]]
            mixed = mixed.to(out.dtype).to(kind)
            out[first:last] = torch.einsum("thr,hdr->thd", mixed, w_uv.to(kind)).to(out.dtype)
    return out


def agrees(args: tuple[Any, ...], out: Tensor, reference_out: Tensor, case: Case) -> str | None:
    """The usual budget, from the reference's own error or from that of the absorbed form: the two round different
    things, which a head that attends sharply makes visible."""
    truth = mla_prefill.reference(*wide(args))
    complaint = disagreement("out", out, reference_out, truth)
    return complaint and disagreement("out", out, _absorbed(args), truth)


def alone(args: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], slice]]:
    """Each chunk as a call of its own."""
    q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, *rest = args
    found: list[tuple[tuple[Any, ...], slice]] = []
    for row, (begin, end) in enumerate(pairwise(cu_q_lens.tolist())):
        bounds = torch.tensor([0, end - begin], dtype=torch.int32, device=q_nope.device)
        queries, this = (q_nope[begin:end], q_rope[begin:end]), slice(row, row + 1)
        found.append(((*queries, pages, page_table[this], kv_lens[this], bounds, *rest), slice(begin, end)))
    return found


def law_pages_may_lie_anywhere(run, case: Case, device: torch.device, seed: int) -> None:
    q_nope, q_rope, pages, page_table, *rest = make(case, device, seed)
    elsewhere, moved_table = decode.moved(pages, page_table, seed + 1)
    there = run(q_nope, q_rope, elsewhere, moved_table, *rest)
    torch.testing.assert_close(run(q_nope, q_rope, pages, page_table, *rest), there, rtol=0, atol=0)


def law_chunks_equal_whole(run, case: Case, device: torch.device, seed: int) -> None:
    """Every chunk cut in two, the halves run one after the other, gives what the whole gives."""
    q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, *rest = make(case, device, seed)
    whole = run(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, *rest)
    bounds, g = cu_q_lens.tolist(), torch.Generator().manual_seed(seed)
    q_lens = [b - a for a, b in pairwise(bounds)]
    firsts = [int(torch.randint(0, q_len + 1, (), generator=g)) for q_len in q_lens]
    rows = list(zip(bounds, firsts, q_lens))
    head = [a + i for a, first, _ in rows for i in range(first)]
    tail = [a + i for a, first, q_len in rows for i in range(first, q_len)]

    def cumulative(lens: list[int]) -> Tensor:
        return torch.tensor([0, *lens], device=device).cumsum(0).int()

    rests = [q_len - first for q_len, first in zip(q_lens, firsts)]
    earlier = kv_lens - torch.tensor(rests, device=device, dtype=torch.int32)
    parts = torch.zeros_like(whole)
    for places, lens, sizes in ((head, earlier, firsts), (tail, kv_lens, rests)):
        queries = q_nope[places], q_rope[places]
        parts[places] = run(*queries, pages, page_table, lens, cumulative(sizes), *rest)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


def law_the_bound_changes_nothing(run, case: Case, device: torch.device, seed: int) -> None:
    """What the host says of the contexts' lengths: nothing (fp8 may then be read otherwise), their sum, or more."""
    *args, _ = make(replace(case, known=True), device, seed)
    exact = int(args[4].sum())
    unknown, known, loosely = (run(*args, bound) for bound in (0, exact, exact + 77))
    torch.testing.assert_close(loosely, known, rtol=0, atol=0)
    tolerance = TOLERANCE[case.dtype] if case.fp8 else 0
    torch.testing.assert_close(unknown, known, rtol=tolerance, atol=tolerance)


LAWS = [law_pages_may_lie_anywhere, law_chunks_equal_whole, law_the_bound_changes_nothing]
