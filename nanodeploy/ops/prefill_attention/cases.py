import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.decode_attention import cases as decode
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.layouts import KVCache, KVLayout, num_pages_for

E4M3 = torch.float8_e4m3fn


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
    kv_dtype: torch.dtype  # of the pages: dtype, or float8_e4m3fn
    window: int = 0
    has_sinks: bool = False
    split_tokens: int = 0
    q_lens: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    num_before: int | None = None  # rows before the first chunk's

    @property
    def plain(self) -> bool:
        """Pages of the queries' dtype, and causality all that hides."""
        return self.kv_dtype == self.dtype and not (self.window or self.has_sinks or self.split_tokens)

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.page_size, self.num_kv_heads, self.head_dim, self.kv_dtype)


def _point(
    q_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int = 64,
    kv_dtype: torch.dtype = torch.bfloat16,
    **fields: Any,
) -> Case:
    max_pages = num_pages_for(max(kv_lens), page_size)
    shape = (sum(q_lens), len(q_lens), heads, kv_heads, head_dim, page_size, max_pages)
    return Case(torch.bfloat16, *shape, kv_dtype, q_lens=q_lens, kv_lens=kv_lens, num_before=0, **fields)


POINTS = {
    "32/8 d128 8x2048": _point((2048,) * 8, (2048,) * 8, 32, 8, 128),
    "32/8 d128 2x8192": _point((8192,) * 2, (8192,) * 2, 32, 8, 128),
    "32/8 d128 2x8192 fp8": _point((8192,) * 2, (8192,) * 2, 32, 8, 128, kv_dtype=E4M3),
    "32/8 d128 2x8192 page16": _point((8192,) * 2, (8192,) * 2, 32, 8, 128, page_size=16),
    "32/8 d128 2x8192 page256": _point((8192,) * 2, (8192,) * 2, 32, 8, 128, page_size=256),
    "32/8 d128 1x16384": _point((16384,), (16384,), 32, 8, 128),
    "32/8 d128 8x960": _point((960,) * 8, (960,) * 8, 32, 8, 128),
    "32/8 d128 8x960 fp8": _point((960,) * 8, (960,) * 8, 32, 8, 128, kv_dtype=E4M3),
    "32/8 d128 2048 at the end of 16384": _point((2048,), (16384,), 32, 8, 128),
    "32/8 d128 1x512": _point((512,), (512,), 32, 8, 128),
    "16/8 d128 8x2048 (qwen3-0.6b)": _point((2048,) * 8, (2048,) * 8, 16, 8, 128),
    "16/2 d256 2x8192": _point((8192,) * 2, (8192,) * 2, 16, 2, 256),
    "64/8 d64 2x8192 window 128, sinks": _point((8192,) * 2, (8192,) * 2, 64, 8, 64, window=128, has_sinks=True),
}

FAR = Case(
    torch.bfloat16,
    *(132, 5, 32, 8, 128, 256, 820, torch.bfloat16),
    q_lens=(64, 1, 0, 65, 1),
    kv_lens=(820 * 256, 1, 0, 700 * 256 + 3, 65),
    num_before=0,
)

SHORT = ["32/8 d128 1x512", "32/8 d128 2048 at the end of 16384"]
LONG = ["32/8 d128 8x960", "32/8 d128 8x2048", "32/8 d128 2x8192", "32/8 d128 1x16384"]
REGIONS = [
    ({"head_dim": 128, "num_tokens": [4096, None]}, LONG),
    ({"head_dim": 128, "num_tokens": [None, 4095]}, SHORT),
    ({"head_dim": 256}, ["16/2 d256 2x8192"]),
]


def of(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens) -> Case:
    num_tokens, num_heads, head_dim = q.shape
    num_seqs, max_pages = page_table.shape
    shape = (num_heads, kv_pages.shape[3], head_dim, kv_pages.shape[2], max_pages)
    return Case(
        q.dtype, num_tokens, num_seqs, *shape, kv_pages.dtype, window, sinks is not None, split_tokens=split_tokens
    )


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
        num_before = draw(st.sampled_from([0, 0, 1, 37]))
        num_tokens = num_before + sum(q_lens) + draw(st.integers(0, 3))
        shape = (num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, page_size, max_pages)
        return Case(
            dtype,
            *shape,
            kv_dtype=draw(st.sampled_from([dtype, E4M3])),
            window=draw(st.one_of(st.just(0), st.sampled_from([1, 17, 64]), st.integers(1, max_pages * page_size))),
            has_sinks=draw(st.booleans()),
            split_tokens=draw(st.sampled_from([0, 0, 64 if small else 256])),
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
    """Where the case leaves lengths open they are random. Rows of q that are nobody's are NaN."""
    g = torch.Generator(device).manual_seed(seed)
    q_lens, kv_lens, num_before = _lengths(case, seed)
    cache, page_table, lens = decode.make_cache(case.layout, kv_lens, case.max_pages, device, g)
    q = decode.make_queries((case.num_tokens, case.num_heads, case.head_dim), case.num_kv_heads, case.dtype, g)
    q[:num_before] = q[num_before + sum(q_lens) :] = float("nan")
    cu_q_lens = torch.tensor((num_before, *q_lens), device=device).cumsum(0).int()
    sinks = 2 * torch.randn(case.num_heads, generator=g, device=device) if case.has_sinks else None
    scale = case.head_dim**-0.5
    return q, *cache, page_table, lens, cu_q_lens, sinks, scale, case.window, case.split_tokens


def cost(case: Case) -> Cost:
    """Each query meets exactly the keys that it sees: no flops, and no bytes, for what is hidden from it."""
    q_lens, kv_lens, _ = _lengths(case, 0)
    pairs, seen = 0, []
    for q_len, kv_len in zip(q_lens, kv_lens):
        first = kv_len - q_len + 1  # keys that the first query sees, as if there were no window
        window = min(case.window or kv_len, kv_len)
        num_whole = max(0, min(q_len, kv_len - max(first, window) + 1))  # queries with a whole window before them
        pairs += num_whole * window + sum(range(first, first + q_len - num_whole))
        if q_len:
            seen.append(min(kv_len, q_len + window - 1))
    q_bytes = case.num_tokens * case.num_heads * case.head_dim * case.dtype.itemsize
    index_bytes = 4 * (len(q_lens) + sum(1 + num_pages_for(n, case.page_size) for n in seen))
    num_bytes = sum(seen) * case.layout.token_bytes + 2 * q_bytes + index_bytes
    return Cost(num_bytes, 4 * case.num_heads * case.head_dim * pairs)


def alone(args: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], slice]]:
    """Each chunk as a call of its own."""
    q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, *rest = args
    found: list[tuple[tuple[Any, ...], slice]] = []
    for row, (begin, end) in enumerate(pairwise(cu_q_lens.tolist())):
        bounds = torch.tensor([0, end - begin], dtype=torch.int32, device=q.device)
        one = (q[begin:end], kv_pages, kv_scales, page_table[row : row + 1], kv_lens[row : row + 1], bounds, *rest)
        found.append((one, slice(begin, end)))
    return found


def law_pages_may_lie_anywhere(run, case: Case, device: torch.device, seed: int) -> None:
    q, kv_pages, kv_scales, page_table, *rest = make(case, device, seed)
    elsewhere, moved_table = decode.moved(KVCache(kv_pages, kv_scales), page_table, seed + 1)
    there = run(q, *elsewhere, moved_table, *rest)
    torch.testing.assert_close(run(q, kv_pages, kv_scales, page_table, *rest), there, rtol=0, atol=0)


def law_chunks_equal_whole(run, case: Case, device: torch.device, seed: int) -> None:
    """Every chunk cut in two, the halves run one after the other, gives what the whole gives."""
    q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, *rest = make(case, device, seed)
    whole = run(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, *rest)
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
    parts[head] = run(q[head], kv_pages, kv_scales, page_table, earlier, cumulative(firsts), *rest)
    parts[tail] = run(q[tail], kv_pages, kv_scales, page_table, kv_lens, cumulative(rests), *rest)
    tolerance = decode.TOLERANCE[case.dtype]
    torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)


def law_one_query_is_a_decode(run, case: Case, device: torch.device, seed: int) -> None:
    """With one query per sequence it is decode_attention."""
    _, kv_pages, kv_scales, page_table, kv_lens, _, sinks, scale, window, split_tokens = make(case, device, seed)
    g = torch.Generator(device).manual_seed(seed)
    q = decode.make_queries((case.num_seqs, case.num_heads, case.head_dim), case.num_kv_heads, case.dtype, g)
    present = kv_lens > 0
    q, page_table, kv_lens = q[present], page_table[present], kv_lens[present]
    ones = torch.arange(len(q) + 1, device=device, dtype=torch.int32)
    wanted = decode_attention.reference(q, kv_pages, kv_scales, page_table, kv_lens, None, None, sinks, scale, window)
    got = run(q, kv_pages, kv_scales, page_table, kv_lens, ones, sinks, scale, window, split_tokens)
    tolerance = decode.TOLERANCE[case.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


LAWS = [law_pages_may_lie_anywhere, law_chunks_equal_whole, law_one_query_is_a_decode]
