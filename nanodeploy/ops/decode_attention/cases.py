import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import KVCache, KVLayout, num_pages_for, scale_bytes, scale_values
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.plan_decode.cases import prefix_rows

GARBAGE = (-1, 2**31 - 1)  # what page_table holds past a sequence's pages; nobody may follow it
NAN_BYTE = 0x7F  # of e4m3


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int
    fp8: bool = False  # the pages; else they are of dtype
    num_queries: int = 1
    window: int = 0
    has_sinks: bool = False
    has_prefixes: bool = False
    has_plan: bool = False
    kv_lens: tuple[int, ...] | None = None
    groups: tuple[tuple[int, int], ...] | None = None  # (sequences, tokens they share) of each group in turn

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def kv_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.fp8 else self.dtype

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.page_size, self.num_kv_heads, self.head_dim, self.kv_dtype)

    @property
    def plain(self) -> bool:
        """One query per sequence, and nothing that changes what is computed."""
        return not (self.fp8 or self.window or self.has_sinks) and self.num_queries == 1


def _point(
    num_seqs: int, context: int, heads: int, kv_heads: int, head_dim: int, page_size: int = 64, **fields: Any
) -> Case:
    shape = (num_seqs, heads, kv_heads, head_dim, page_size, num_pages_for(context, page_size))
    return Case(torch.bfloat16, *shape, kv_lens=(context,) * num_seqs, **({"has_plan": True} | fields))


RAGGED = tuple(100 + i * 7919 % 1949 for i in range(256))  # a running batch: 100 to 2048 tokens, 1.1k on average


POINTS = {
    "32/8 d128 B64 ctx4096": _point(64, 4096, 32, 8, 128),
    "32/8 d128 B64 ctx4096 page16": _point(64, 4096, 32, 8, 128, page_size=16),
    "32/8 d128 B64 ctx4096 page256": _point(64, 4096, 32, 8, 128, page_size=256),
    "32/8 d128 B256 ctx1024": _point(256, 1024, 32, 8, 128),
    "32/8 d128 B256 ctx100-2048": Case(torch.bfloat16, 256, 32, 8, 128, 64, 32, has_plan=True, kv_lens=RAGGED),
    "32/8 d128 B64 ctx1024": _point(64, 1024, 32, 8, 128),
    "32/8 d128 B8 ctx4096": _point(8, 4096, 32, 8, 128),
    "32/8 d128 B1 ctx1024": _point(1, 1024, 32, 8, 128),
    "32/8 d128 B1 ctx32768": _point(1, 32768, 32, 8, 128),
    "32/4 d128 B64 ctx4096": _point(64, 4096, 32, 4, 128),
    "16/8 d128 B64 ctx4096 (qwen3-0.6b)": _point(64, 4096, 16, 8, 128),
    "16/2 d256 B64 ctx4096": _point(64, 4096, 16, 2, 256),
    "32/8 d128 B64 ctx4096 fp8": _point(64, 4096, 32, 8, 128, fp8=True),
    "32/8 d128 B256 ctx1024 fp8": _point(256, 1024, 32, 8, 128, fp8=True),
    "32/8 d128 B8 ctx4096 fp8": _point(8, 4096, 32, 8, 128, fp8=True),
    "32/8 d128 B64 ctx4096 4 queries": _point(64, 4096, 32, 8, 128, num_queries=4),
    "64/8 d64 B64 ctx4096 window 128, sinks": _point(64, 4096, 64, 8, 64, window=128, has_sinks=True),
    "32/8 d128 B64 on a prefix of 16384": _point(64, 16448, 32, 8, 128, has_prefixes=True, groups=((64, 16384),)),
}

REGIONS: list[tuple[dict[str, Any], list[str]]] = [
    ({"has_prefixes": True, "window": 0}, ["32/8 d128 B64 on a prefix of 16384"]),
    ({"fp8": True, "num_seqs": [None, 16]}, ["32/8 d128 B8 ctx4096 fp8"]),
    ({"fp8": True}, ["32/8 d128 B64 ctx4096 fp8", "32/8 d128 B256 ctx1024 fp8"]),
    ({"head_dim": 256}, ["16/2 d256 B64 ctx4096"]),
    ({"num_seqs": [None, 16]}, ["32/8 d128 B1 ctx1024", "32/8 d128 B1 ctx32768", "32/8 d128 B8 ctx4096"]),
    ({}, ["32/8 d128 B64 ctx1024", "32/8 d128 B64 ctx4096", "32/8 d128 B256 ctx100-2048"]),
]

FAR = Case(
    torch.bfloat16, 5, 32, 8, 128, 256, 820, kv_lens=(820 * 256, 1, 0, 700 * 256 + 3, 65)
)  # 2**31 elements and more

# For results that two kernels, or one kernel in two ways, may round differently.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


def of(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window) -> Case:
    num_tokens, num_heads, head_dim = q.shape
    num_seqs = kv_lens.shape[0]
    shape = (num_seqs, num_heads, kv_pages.shape[3], head_dim, kv_pages.shape[2], page_table.shape[1])
    options = (window, sinks is not None, prefixes is not None, plan is not None)
    return Case(q.dtype, *shape, kv_scales is not None, num_tokens // max(1, num_seqs), *options)


def shapes(st, *, small: bool):
    """Strategy of (dtype, num_heads, num_kv_heads, head_dim, page_size)."""
    kv_heads = st.sampled_from([1, 2] if small else [1, 2, 3, 8])
    return st.tuples(
        st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        st.sampled_from([1, 2, 3, 4, 7, 8, 16]),
        kv_heads,
        st.sampled_from([64, 128, 256]),
        st.sampled_from([16, 32, 64] if small else [16, 32, 64, 128, 256]),
    ).map(lambda t: (t[0], t[1] * t[2], *t[2:]))


def lengths(st, page_size: int, max_pages: int):
    """Strategy of one kv_len: the edges of a page, and anything up to a full page table."""
    edges = [0, 1, page_size - 1, page_size, page_size + 1, max_pages * page_size]
    full = max_pages * page_size
    return st.one_of(st.sampled_from([n for n in edges if n <= full]), st.integers(0, full))


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        dtype, num_heads, num_kv_heads, head_dim, page_size = draw(shapes(st, small=small))
        max_pages = draw(st.integers(1, (320 if small else 4096) // page_size))
        num_seqs = draw(st.integers(1, 3 if small else 20))
        case = Case(
            *(dtype, num_seqs, num_heads, num_kv_heads, head_dim, page_size, max_pages),
            fp8=draw(st.booleans()),
            num_queries=draw(st.sampled_from([1, 1, 1, 2, 4, 8])),
            window=draw(st.sampled_from([0, 0, 0, 1, 100, 1000])),
            has_sinks=draw(st.booleans()),
            has_prefixes=draw(st.booleans()),
            has_plan=draw(st.booleans()),
        )
        if case.has_prefixes and draw(st.booleans()):  # with groups that make_prefixes draws
            return case
        return replace(case, kv_lens=draw(st.tuples(*[lengths(st, page_size, max_pages)] * num_seqs)))

    return cases()


def make_cache(
    layout: KVLayout, kv_lens: tuple[int, ...], max_pages: int, device: torch.device, g: torch.Generator
) -> tuple[KVCache, Tensor, Tensor]:
    """Cache, page table and lengths: every sequence's pages lie shuffled, slots that nobody owns hold NaN.

    FP8 pages are quantised from values whose size differs by token and head; nobody's scales are infinite. The number
    of pages depends on shapes only, so that other lengths fit the same buffers.
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
    dtype = torch.float16 if layout.scaled else layout.dtype
    values = torch.randn(layout.shape(num_pages), generator=g, device=device, dtype=dtype)
    if not layout.scaled:
        values.masked_fill_(~owned[:, None, :, None, None], float("nan"))
        return KVCache(values, None), page_table, lens
    values *= torch.randn(values.shape[:-1], generator=g, device=device, dtype=dtype).unsqueeze(-1)
    scales = scale_bytes(values.abs().amax(-1))  # [P, 2, page_size, K]
    for part, exponents in zip(values, scales):  # a page at a time: in fp32 it would be twice as large
        part.copy_(part.float() / scale_values(exponents, torch.float32).unsqueeze(-1))
    fp8 = values.to(torch.float8_e4m3fn)
    fp8.view(torch.uint8).masked_fill_(~owned[:, None, :, None, None], NAN_BYTE)
    scales = scales.transpose(2, 3).contiguous().masked_fill_(~owned[:, None, None, :], 255)
    return KVCache(fp8, scales), page_table, lens


def make_queries(shape: tuple[int, int, int], num_kv_heads: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """[T, H, E], a view into a fused qkv as models have it; every third head attends sharply, the others broadly."""
    num_tokens, num_heads, head_dim = shape
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=g, device=g.device)
    qkv[:, ::3] *= 5
    return qkv.to(dtype)[:, :num_heads]


def _lengths(case: Case, seed: int) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """kv_lens and groups of the case; random ones that fit its shapes where it leaves them open."""
    chance, full = random.Random(seed), case.max_pages * case.page_size
    kv_lens, groups = case.kv_lens, case.groups
    if groups is None and kv_lens is None and case.has_prefixes and not case.window:
        drawn, left = [], case.num_seqs
        while left:
            num_rows = chance.randint(1, left)
            shared = case.page_size * chance.choice([0, *[chance.randint(0, case.max_pages)] * 3])
            drawn.append((num_rows, shared if num_rows > 1 else 0))
            left -= num_rows
        groups = tuple(drawn)
    groups = groups or ((1, 0),) * case.num_seqs
    if kv_lens is None:
        least = [num_tokens for num_rows, num_tokens in groups for _ in range(num_rows)]
        kv_lens = tuple(chance.randint(num_tokens, full) for num_tokens in least)
    return kv_lens, groups


def make(case: Case, device: torch.device, seed: int) -> tuple:
    """Where the case leaves lengths and groups open they are random. Queries of empty sequences are NaN."""
    g = torch.Generator(device).manual_seed(seed)
    kv_lens, groups = _lengths(case, seed)
    cache, page_table, lens = make_cache(case.layout, kv_lens, case.max_pages, device, g)
    first = 0
    for num_rows, num_tokens in groups if case.has_prefixes else ():
        page_table[first : first + num_rows, : num_tokens // case.page_size] = page_table[
            first, : num_tokens // case.page_size
        ]
        first += num_rows
    shape = (case.num_seqs * case.num_queries, case.num_heads, case.head_dim)
    q = make_queries(shape, case.num_kv_heads, case.dtype, g)
    q.masked_fill_((lens == 0).repeat_interleave(case.num_queries)[:, None, None], float("nan"))
    sinks = 2 * torch.randn(case.num_heads, generator=g, device=device) if case.has_sinks else None
    prefixes = prefix_rows(groups, device) if case.has_prefixes else None
    plan = None
    if case.has_plan:
        plan = plan_decode.reference(lens, prefixes, case.num_queries, case.num_heads, case.num_kv_heads, case.window)
    return q, *cache, page_table, lens, prefixes, plan, sinks, case.head_dim**-0.5, case.window


def cost(case: Case) -> Cost:
    """What a group shares is read once; what no query of a sequence sees is not read."""
    kv_lens = case.kv_lens or (case.max_pages * case.page_size,) * case.num_seqs
    seen = [min(n, case.window + case.num_queries - 1) if case.window else n for n in kv_lens]
    again = sum((num_rows - 1) * num_tokens for num_rows, num_tokens in case.groups or ()) if case.has_prefixes else 0
    q_bytes = case.num_seqs * case.num_queries * case.num_heads * case.head_dim * case.dtype.itemsize
    index_bytes = 4 * sum(1 + num_pages_for(n, case.page_size) for n in seen)
    num_bytes = (sum(seen) - again) * case.layout.token_bytes + 2 * q_bytes + index_bytes
    return Cost(num_bytes, 4 * case.num_heads * case.head_dim * case.num_queries * sum(seen))


def alone(args: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], slice]]:
    """Each sequence as a call of its own, with neither plan nor shared prefix."""
    q, kv_pages, kv_scales, page_table, kv_lens, _, _, *rest = args
    num_queries = q.shape[0] // max(1, len(kv_lens))
    found: list[tuple[tuple[Any, ...], slice]] = []
    for row in range(len(kv_lens)):
        place, this = slice(row * num_queries, (row + 1) * num_queries), slice(row, row + 1)
        found.append(((q[place], kv_pages, kv_scales, page_table[this], kv_lens[this], None, None, *rest), place))
    return found


def moved(cache: KVCache, page_table: Tensor, seed: int) -> tuple[KVCache, Tensor]:
    """The same sequences with every page at another place."""
    num_pages = cache.pages.shape[0]
    g = torch.Generator(cache.pages.device).manual_seed(seed)
    places = torch.randperm(num_pages, generator=g, device=cache.pages.device)  # old page -> new page
    pages = torch.empty_like(cache.pages)
    bits = torch.uint8 if cache.scales is not None else pages.dtype  # fp8 cannot be indexed everywhere
    pages.view(bits)[places] = cache.pages.view(bits)
    scales = None
    if cache.scales is not None:
        scales = torch.empty_like(cache.scales)
        scales[places] = cache.scales
    valid = (page_table >= 0) & (page_table < num_pages)
    there = places[page_table.clamp(0, num_pages - 1).long()].int()
    return KVCache(pages, scales), torch.where(valid, there, page_table)


def _near(got: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def law_pages_may_lie_anywhere(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    q, kv_pages, kv_scales, page_table, *rest = make(case, device, seed)
    elsewhere, moved_table = moved(KVCache(kv_pages, kv_scales), page_table, seed + 1)
    there = run(q, *elsewhere, moved_table, *rest)
    torch.testing.assert_close(run(q, kv_pages, kv_scales, page_table, *rest), there, rtol=0, atol=0)


def law_pages_may_be_shared(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    """Two sequences with one query and one context, as after a prefix hit, get one answer."""
    q, *cache, page_table, kv_lens, _, _, sinks, scale, window = make(case, device, seed)
    if case.num_seqs < 2:
        return
    queries = q.unflatten(0, (case.num_seqs, case.num_queries))
    queries[1], page_table[1], kv_lens[1] = queries[0], page_table[0], kv_lens[0]
    out = run(q, *cache, page_table, kv_lens, None, None, sinks, scale, window)
    out = out.unflatten(0, (case.num_seqs, case.num_queries))
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)


def law_values_scale(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    """Twice the values, twice the output (but for fp16's subnormals)."""
    q, kv_pages, kv_scales, *rest = make(case, device, seed)
    out = run(q, kv_pages, kv_scales, *rest)
    if kv_scales is None:
        kv_pages[:, 1] *= 2
    else:
        kv_scales[:, 1] += (kv_scales[:, 1] < 255).to(torch.uint8)
    twice = run(q, kv_pages, kv_scales, *rest)
    if kv_scales is None:
        torch.testing.assert_close(twice, out * 2)
    else:  # a kernel may add a scale's exponent to the score, which rounds
        _near(twice, out * 2)


def law_sequences_are_independent(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    """Sequences in another order, each beside others, give their own rows."""
    q, *cache, page_table, kv_lens, _, _, sinks, scale, window = make(case, device, seed)
    g = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(case.num_seqs, generator=g, device=device)
    rows = (order[:, None] * case.num_queries + torch.arange(case.num_queries, device=device)).flatten()
    out = run(q, *cache, page_table, kv_lens, None, None, sinks, scale, window)
    again = run(q[rows], *cache, page_table[order], kv_lens[order], None, None, sinks, scale, window)
    _near(again, out[rows])


def law_prefixes_and_plans_change_nothing(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    *args, _, _, sinks, scale, window = make(replace(case, has_prefixes=True, has_plan=True), device, seed)
    *_, prefixes, plan, _, _, _ = make(replace(case, has_prefixes=True, has_plan=True), device, seed)
    plain = run(*args, None, None, sinks, scale, window)
    _near(run(*args, prefixes, plan, sinks, scale, window), plain)
    _near(run(*args, prefixes, None, sinks, scale, window), plain)


def law_queries_are_decodes(run: Callable, case: Case, device: torch.device, seed: int) -> None:
    """Several queries of a sequence are as many decodes, each of the context that it sees."""
    q, *cache, page_table, kv_lens, _, _, sinks, scale, window = make(case, device, seed)
    out = run(q, *cache, page_table, kv_lens, None, None, sinks, scale, window)
    for query in range(case.num_queries if case.num_queries > 1 else 0):
        earlier = (kv_lens - (case.num_queries - 1 - query)).clamp(min=0)
        one = run(q[query :: case.num_queries], *cache, page_table, earlier, None, None, sinks, scale, window)
        _near(out[query :: case.num_queries], one)


LAWS = [
    law_pages_may_lie_anywhere,
    law_pages_may_be_shared,
    law_values_scale,
    law_sequences_are_independent,
    law_prefixes_and_plans_change_nothing,
    law_queries_are_decodes,
]
