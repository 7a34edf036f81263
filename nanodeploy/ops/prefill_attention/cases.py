import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.decode_attention import cases as decode
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.layouts import KVLayout, num_pages_for


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int  # rows of q, padding included
    num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.page_size, self.num_kv_heads, self.head_dim, self.dtype)


def _point(
    q_lens: tuple[int, ...], kv_lens: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, page_size: int = 64
) -> Case:
    max_pages = num_pages_for(max(kv_lens), page_size)
    shape = (sum(q_lens), len(q_lens), heads, kv_heads, head_dim, page_size, max_pages)
    return Case(torch.bfloat16, *shape, q_lens, kv_lens)


POINTS = {
    "32/8 d128 8x2048": _point((2048,) * 8, (2048,) * 8, 32, 8, 128),
    "32/8 d128 2x8192": _point((8192,) * 2, (8192,) * 2, 32, 8, 128),
    "32/8 d128 2x8192 page16": _point((8192,) * 2, (8192,) * 2, 32, 8, 128, page_size=16),
    "32/8 d128 2x8192 page256": _point((8192,) * 2, (8192,) * 2, 32, 8, 128, page_size=256),
    "32/8 d128 1x16384": _point((16384,), (16384,), 32, 8, 128),
    "32/8 d128 8x960": _point((960,) * 8, (960,) * 8, 32, 8, 128),
    "32/8 d128 2048 at the end of 16384": _point((2048,), (16384,), 32, 8, 128),
    "32/8 d128 1x512": _point((512,), (512,), 32, 8, 128),
    "16/8 d128 8x2048 (qwen3-0.6b)": _point((2048,) * 8, (2048,) * 8, 16, 8, 128),
    "16/2 d256 2x8192": _point((8192,) * 2, (8192,) * 2, 16, 2, 256),
}

FAR = Case(torch.bfloat16, 132, 5, 32, 8, 128, 256, 820, (64, 1, 0, 65, 1), (820 * 256, 1, 0, 700 * 256 + 3, 65))

SHORT = ["32/8 d128 1x512", "32/8 d128 2048 at the end of 16384"]
LONG = ["32/8 d128 8x960", "32/8 d128 8x2048", "32/8 d128 2x8192", "32/8 d128 1x16384"]
REGIONS = [
    ({"head_dim": 128, "num_tokens": [4096, None]}, LONG),
    ({"head_dim": 128, "num_tokens": [None, 4095]}, SHORT),
    ({"head_dim": 256}, ["16/2 d256 2x8192"]),
]


def of(q: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, cu_q_lens: Tensor, scale: float) -> Case:
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, max_pages = page_table.shape
    return Case(q.dtype, num_tokens, num_seqs, num_heads, kv_pages.shape[3], head_dim, kv_pages.shape[2], max_pages)


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        dtype, num_heads, num_kv_heads, head_dim, page_size = draw(decode.shapes(st, small=small))
        max_pages = draw(st.integers(1, (160 if small else 3072) // page_size))
        num_seqs = draw(st.integers(1, 3 if small else 9))
        kv_lens = draw(st.tuples(*[decode.lengths(st, page_size, max_pages)] * num_seqs))
        q_lens = tuple(
            draw(st.one_of(st.sampled_from([0, min(1, kv_len), kv_len]), st.integers(0, kv_len))) for kv_len in kv_lens
        )
        num_tokens = sum(q_lens) + draw(st.integers(0, 3))
        shape = (num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, page_size, max_pages)
        return Case(dtype, *shape, q_lens, kv_lens)

    return cases()


def _lengths(case: Case, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """q_lens and kv_lens of the case; random ones that fit its shapes where it leaves them open."""
    if case.q_lens and case.kv_lens:
        return case.q_lens, case.kv_lens
    chance, full, left = random.Random(seed), case.max_pages * case.page_size, case.num_tokens
    q_lens = []
    for _ in range(case.num_seqs):
        q_lens.append(chance.randint(0, min(full, left)))
        left -= q_lens[-1]
    return tuple(q_lens), tuple(chance.randint(q_len, full) for q_len in q_lens)


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, float]:
    """Where the case leaves lengths open they are random. Padding rows of q are NaN."""
    g = torch.Generator(device).manual_seed(seed)
    q_lens, kv_lens = _lengths(case, seed)
    kv_pages, page_table, lens = decode.make_cache(case.layout, kv_lens, case.max_pages, device, g)
    q = decode.make_queries((case.num_tokens, case.num_heads, case.head_dim), case.num_kv_heads, case.dtype, g)
    q[sum(q_lens) :] = float("nan")
    cu_q_lens = torch.tensor((0, *q_lens), device=device).cumsum(0).int()
    return q, kv_pages, page_table, lens, cu_q_lens, case.head_dim**-0.5


def cost(case: Case) -> Cost:
    """Each query meets exactly the keys up to its own position: no flops for what the causal mask hides."""
    q_lens, kv_lens = _lengths(case, 0)
    pairs = sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(q_lens, kv_lens))
    q_bytes = case.num_tokens * case.num_heads * case.head_dim * case.dtype.itemsize
    used = [kv for q, kv in zip(q_lens, kv_lens) if q]
    index_bytes = 4 * (len(q_lens) + sum(1 + num_pages_for(n, case.page_size) for n in used))
    num_bytes = sum(used) * case.layout.token_bytes + 2 * q_bytes + index_bytes
    return Cost(num_bytes, 4 * case.num_heads * case.head_dim * pairs)


def alone(args: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], slice]]:
    """Each chunk as a call of its own."""
    q, kv_pages, page_table, kv_lens, cu_q_lens, scale = args
    found = []
    for row, (begin, end) in enumerate(pairwise(cu_q_lens.tolist())):
        bounds = torch.tensor([0, end - begin], dtype=torch.int32, device=q.device)
        one = (q[begin:end], kv_pages, page_table[row : row + 1], kv_lens[row : row + 1], bounds, scale)
        found.append((one, slice(begin, end)))
    return found


def law_pages_may_lie_anywhere(run, case: Case, device: torch.device, seed: int) -> None:
    q, kv_pages, page_table, *rest = make(case, device, seed)
    elsewhere, moved_table = decode.moved(kv_pages, page_table, seed + 1)
    there = run(q, elsewhere, moved_table, *rest)
    torch.testing.assert_close(run(q, kv_pages, page_table, *rest), there, rtol=0, atol=0)


def law_chunks_equal_whole(run, case: Case, device: torch.device, seed: int) -> None:
    """Every chunk cut in two, the halves run one after the other, gives what the whole gives."""
    q, kv_pages, page_table, kv_lens, cu_q_lens, scale = make(case, device, seed)
    whole = run(q, kv_pages, page_table, kv_lens, cu_q_lens, scale)
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
    parts[head] = run(q[head], kv_pages, page_table, earlier, cumulative(firsts), scale)
    parts[tail] = run(q[tail], kv_pages, page_table, kv_lens, cumulative(rests), scale)
    tolerance = decode.TOLERANCE[case.dtype]
    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


def law_one_query_is_a_decode(run, case: Case, device: torch.device, seed: int) -> None:
    """With one query per sequence it is decode_attention."""
    _, kv_pages, page_table, kv_lens, _, scale = make(case, device, seed)
    g = torch.Generator(device).manual_seed(seed)
    q = decode.make_queries((case.num_seqs, case.num_heads, case.head_dim), case.num_kv_heads, case.dtype, g)
    present = kv_lens > 0
    q, page_table, kv_lens = q[present], page_table[present], kv_lens[present]
    ones = torch.arange(len(q) + 1, device=device, dtype=torch.int32)
    wanted = decode_attention.reference(q, kv_pages, page_table, kv_lens, scale)
    got = run(q, kv_pages, page_table, kv_lens, ones, scale)
    tolerance = decode.TOLERANCE[case.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


LAWS = [law_pages_may_lie_anywhere, law_chunks_equal_whole, law_one_query_is_a_decode]
