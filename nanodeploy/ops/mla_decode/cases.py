import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.decode_attention.cases import GARBAGE, TOLERANCE, lengths
from nanodeploy.ops.layouts import E4M3, LatentCache, LatentLayout, num_pages_for, pack_latents
from nanodeploy.ops.mla_decode.reference import num_tiles
from nanodeploy.ops.plan_decode import plan_decode

NAN_BYTE = 0xFF  # of e4m3, bf16 and fp32 alike


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_seqs: int
    num_heads: int
    rank: int
    rope_dim: int
    page_size: int
    max_pages: int
    fp8: bool = False  # the pages; else they are of dtype
    num_queries: int = 1
    has_plan: bool = False
    kv_lens: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """Query rows of a sequence."""
        return self.num_queries * self.num_heads

    @property
    def layout(self) -> LatentLayout:
        return LatentLayout(self.page_size, self.rank, self.rope_dim, E4M3 if self.fp8 else self.dtype)


def _point(num_seqs: int, context: int, heads: int, fp8: bool = False, num_queries: int = 1) -> Case:
    lens = (context,) * num_seqs
    shape = (num_seqs, heads, 512, 64, 64, num_pages_for(context, 64))
    return Case(torch.bfloat16, *shape, fp8, num_queries, has_plan=True, kv_lens=lens)


RAGGED = tuple(200 + i * 7919 % 7993 for i in range(64))  # 200 to 8192 tokens

FEW = [(64, 4096, 16), (128, 4096, 16), (1, 4096, 16), (1, 32768, 16), (8, 4096, 32), (64, 4096, 32)]
MANY = [(1, 4096, 128), (8, 4096, 128), (32, 4096, 128), (128, 4096, 128), (128, 8192, 64), (1, 32768, 64)]
POINTS = (
    {f"h{h} B{s} ctx{n}": _point(s, n, h) for s, n, h in (*FEW, *MANY)}
    | {f"h{h} B{s} ctx{n} fp8": _point(s, n, h, True) for s, n, h in (*FEW[:4], *MANY[:5])}
    | {
        "h16 B64 ctx200-8192": replace(_point(64, 8192, 16), kv_lens=RAGGED),
        "h16 B64 ctx4096 4 queries": _point(64, 4096, 16, num_queries=4),
        "h128 B64 ctx4096 2 queries": _point(64, 4096, 128, num_queries=2),
    }
)

REGIONS = [
    ({"rank": 512, "fp8": fp8, "num_rows": where, "num_seqs": seqs}, points)
    for fp8 in (False, True)
    for where, low in (([1, 32], True), ([33, None], False))
    for seqs, few in (([1, 4], True), ([5, None], False))
    if (
        points := [
            name
            for name, case in POINTS.items()
            if case.fp8 == fp8 and (case.num_rows <= 32) == low and (case.num_seqs <= 4) == few
        ]
    )
]

FAR = Case(torch.bfloat16, 5, 16, 512, 64, 256, 3000, kv_lens=(768000, 1, 0, 700 * 256 + 3, 65))  # past 2**31 elements


def of(q, q_rope, pages, page_table, kv_lens, plan, scale) -> Case:
    num_tokens, num_heads, rank = q.shape
    num_seqs = kv_lens.shape[0]
    shape = (num_seqs, num_heads, rank, q_rope.shape[2], pages.shape[1], page_table.shape[1])
    return Case(q.dtype, *shape, pages.dtype == torch.uint8, num_tokens // max(1, num_seqs), plan is not None)


def shapes(st, *, small: bool):
    """Strategy of (dtype, rank, rope_dim, page_size, fp8)."""
    return st.tuples(
        st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        st.sampled_from([16, 24, 32, 128, 256] if small else [16, 40, 64, 128, 512, 512, 512]),
        st.sampled_from([2, 4, 16, 64]),
        st.sampled_from([16, 64] if small else [16, 32, 64, 64, 128, 256]),
        st.booleans(),
    ).map(lambda t: (*t[:4], t[4] and t[1] % 128 == 0))


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        dtype, rank, rope_dim, page_size, fp8 = draw(shapes(st, small=small))
        max_pages = draw(st.integers(1, (320 if small else 4096) // page_size))
        num_seqs = draw(st.integers(1, 3 if small else 20))
        num_heads = draw(st.sampled_from([1, 3, 4, 16, 20] if small else [1, 3, 8, 16, 20, 32, 64, 100, 128]))
        return Case(
            *(dtype, num_seqs, num_heads, rank, rope_dim, page_size, max_pages),
            fp8=fp8,
            num_queries=draw(st.sampled_from([1, 1, 1, 2, 4, 8])),
            has_plan=draw(st.booleans()),
            kv_lens=draw(st.tuples(*[lengths(st, page_size, max_pages)] * num_seqs)),
        )

    return cases()


def make_cache(
    layout: LatentLayout, kv_lens: tuple[int, ...], max_pages: int, device: torch.device, g: torch.Generator
) -> tuple[LatentCache, Tensor, Tensor]:
    """Cache, page table and lengths: every sequence's pages lie shuffled, slots that nobody owns hold NaN.

    FP8 latents differ in size by token and block. The number of pages depends on shapes only, so that other lengths fit
    the same buffers.
    """
    num_seqs, page_size = len(kv_lens), layout.page_size
    num_pages = num_seqs * max_pages + 2
    pages = torch.randperm(num_pages, generator=g, device=device)[: num_seqs * max_pages].view(num_seqs, max_pages)
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    owned = torch.zeros(num_pages, page_size, dtype=torch.bool, device=device)
    tokens = torch.arange(max_pages * page_size, device=device)
    owned[pages] = (tokens < lens[:, None]).view(num_seqs, max_pages, page_size)
    used = torch.arange(max_pages, device=device) * page_size < lens[:, None]
    garbage = torch.tensor(GARBAGE, dtype=torch.int32, device=device).repeat(max_pages)[:max_pages]
    page_table = torch.where(used, pages.int(), garbage)
    if not layout.scaled:
        values = torch.randn(layout.shape(num_pages), generator=g, device=device, dtype=layout.dtype)
        return LatentCache(values.masked_fill_(~owned[..., None], float("nan"))), page_table, lens
    cache = layout.empty(num_pages, device)
    for page in cache.pages.split(4096):
        latents = torch.randn(*page.shape[:2], layout.rank, generator=g, device=device)
        sizes = torch.randint(-2, 2, (*page.shape[:2], layout.rank // 128, 1), generator=g, device=device)
        latents = (latents.unflatten(-1, (-1, 128)) * torch.exp2(sizes.float())).flatten(-2)
        keys = torch.randn(*page.shape[:2], layout.rope_dim, generator=g, device=device)
        page.copy_(pack_latents(latents, keys))
    return LatentCache(cache.pages.masked_fill_(~owned[..., None], NAN_BYTE)), page_table, lens


def make_queries(
    num_tokens: int, num_heads: int, dims: tuple[int, int], dtype: torch.dtype, g: torch.Generator
) -> list[Tensor]:
    """The two parts of queries, [T, H, dim] each; every third head attends sharply, the others broadly."""
    both = torch.randn(num_tokens, num_heads, sum(dims), generator=g, device=g.device)
    both[:, ::3] *= 5
    return list(both.to(dtype).split(dims, dim=-1))


def make(case: Case, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Where the case leaves lengths open they are random. Queries of empty sequences are NaN."""
    g = torch.Generator(device).manual_seed(seed)
    chance, full = random.Random(seed), case.max_pages * case.page_size
    kv_lens = case.kv_lens or tuple(chance.randint(0, full) for _ in range(case.num_seqs))
    cache, page_table, lens = make_cache(case.layout, kv_lens, case.max_pages, device, g)
    dims = (case.rank, case.rope_dim)
    q, q_rope = make_queries(case.num_seqs * case.num_queries, case.num_heads, dims, case.dtype, g)
    empty = (lens == 0).repeat_interleave(case.num_queries)[:, None, None]
    q, q_rope = (part.masked_fill(empty, float("nan")).contiguous() for part in (q, q_rope))
    plan = None
    if case.has_plan:
        tiles = num_tiles(case.num_queries, case.num_heads)
        plan = plan_decode.reference(lens, None, case.num_queries, case.num_heads, tiles, 0)
    return q, q_rope, cache.pages, page_table, lens, plan, sum(dims) ** -0.5


def cost(case: Case) -> Cost:
    kv_lens = case.kv_lens or (case.max_pages * case.page_size,) * case.num_seqs
    q_bytes = case.num_seqs * case.num_rows * (2 * case.rank + case.rope_dim) * case.dtype.itemsize
    index_bytes = 4 * sum(1 + num_pages_for(n, case.page_size) for n in kv_lens)
    num_bytes = sum(kv_lens) * case.layout.token_bytes + q_bytes + index_bytes
    return Cost(num_bytes, 2 * case.num_rows * (2 * case.rank + case.rope_dim) * sum(kv_lens))


def alone(args: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], slice]]:
    """Each sequence as a call of its own, without a plan."""
    q, q_rope, pages, page_table, kv_lens, _, scale = args
    num_queries = q.shape[0] // max(1, len(kv_lens))
    found: list[tuple[tuple[Any, ...], slice]] = []
    for row in range(len(kv_lens)):
        place, this = slice(row * num_queries, (row + 1) * num_queries), slice(row, row + 1)
        found.append(((q[place], q_rope[place], pages, page_table[this], kv_lens[this], None, scale), place))
    return found


def moved(pages: Tensor, page_table: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The same sequences with every page at another place."""
    num_pages = pages.shape[0]
    g = torch.Generator(pages.device).manual_seed(seed)
    places = torch.randperm(num_pages, generator=g, device=pages.device)  # old page -> new page
    elsewhere = torch.empty_like(pages)
    elsewhere[places] = pages
    valid = (page_table >= 0) & (page_table < num_pages)
    there = places[page_table.clamp(0, num_pages - 1).long()].int()
    return elsewhere, torch.where(valid, there, page_table)


def _near(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def law_pages_may_lie_anywhere(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    q, q_rope, pages, page_table, *rest = make(case, device, seed)
    elsewhere, moved_table = moved(pages, page_table, seed + 1)
    there = run(q, q_rope, elsewhere, moved_table, *rest)
    torch.testing.assert_close(run(q, q_rope, pages, page_table, *rest), there, rtol=0, atol=0)


def law_pages_may_be_shared(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    """Two sequences with one query and one context, as after a prefix hit, get one answer."""
    q, q_rope, pages, page_table, kv_lens, _, scale = make(case, device, seed)
    if case.num_seqs < 2:
        return
    for part in (q, q_rope):
        queries = part.unflatten(0, (case.num_seqs, case.num_queries))
        queries[1] = queries[0]
    page_table[1], kv_lens[1] = page_table[0], kv_lens[0]
    out = run(q, q_rope, pages, page_table, kv_lens, None, scale).unflatten(0, (case.num_seqs, case.num_queries))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)


def law_sequences_are_independent(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    """Sequences in another order, each beside others, give their own rows; so they do with a plan."""
    q, q_rope, pages, page_table, kv_lens, plan, scale = make(replace(case, has_plan=True), device, seed)
    g = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(case.num_seqs, generator=g, device=device)
    rows = (order[:, None] * case.num_queries + torch.arange(case.num_queries, device=device)).flatten()
    out = run(q, q_rope, pages, page_table, kv_lens, None, scale)
    _near(run(q[rows], q_rope[rows], pages, page_table[order], kv_lens[order], None, scale), out[rows])
    _near(run(q, q_rope, pages, page_table, kv_lens, plan, scale), out)


def law_queries_are_decodes(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    """Several queries of a sequence are as many decodes, each of the context that it sees."""
    q, q_rope, pages, page_table, kv_lens, _, scale = make(case, device, seed)
    out = run(q, q_rope, pages, page_table, kv_lens, None, scale)
    for query in range(case.num_queries if case.num_queries > 1 else 0):
        earlier = (kv_lens - (case.num_queries - 1 - query)).clamp(min=0)
        mine = slice(query, None, case.num_queries)
        parts = q[mine].contiguous(), q_rope[mine].contiguous()
        _near(out[mine], run(*parts, pages, page_table, earlier, None, scale))


LAWS = [
    law_pages_may_lie_anywhere,
    law_pages_may_be_shared,
    law_sequences_are_independent,
    law_queries_are_decodes,
]
