import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import KVLayout, num_pages_for

GARBAGE = (-1, 2**31 - 1)  # what page_table holds past a sequence's pages; nobody may follow it


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_seqs: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    max_pages: int
    kv_lens: tuple[int, ...] | None = None

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.page_size, self.num_kv_heads, self.head_dim, self.dtype)


def _point(num_seqs: int, context: int, heads: int, kv_heads: int, head_dim: int, page_size: int = 64) -> Case:
    max_pages = num_pages_for(context, page_size)
    return Case(torch.bfloat16, num_seqs, heads, kv_heads, head_dim, page_size, max_pages, (context,) * num_seqs)


RAGGED = tuple(100 + i * 7919 % 1949 for i in range(256))  # a running batch: 100 to 2048 tokens, 1.1k on average


POINTS = {
    "32/8 d128 B64 ctx4096": _point(64, 4096, 32, 8, 128),
    "32/8 d128 B64 ctx4096 page16": _point(64, 4096, 32, 8, 128, page_size=16),
    "32/8 d128 B64 ctx4096 page256": _point(64, 4096, 32, 8, 128, page_size=256),
    "32/8 d128 B256 ctx1024": _point(256, 1024, 32, 8, 128),
    "32/8 d128 B256 ctx100-2048": Case(torch.bfloat16, 256, 32, 8, 128, 64, 32, RAGGED),
    "32/8 d128 B64 ctx1024": _point(64, 1024, 32, 8, 128),
    "32/8 d128 B8 ctx4096": _point(8, 4096, 32, 8, 128),
    "32/8 d128 B1 ctx1024": _point(1, 1024, 32, 8, 128),
    "32/8 d128 B1 ctx32768": _point(1, 32768, 32, 8, 128),
    "32/4 d128 B64 ctx4096": _point(64, 4096, 32, 4, 128),
    "16/8 d128 B64 ctx4096 (qwen3-0.6b)": _point(64, 4096, 16, 8, 128),
    "16/2 d256 B64 ctx4096": _point(64, 4096, 16, 2, 256),
}

FAR = Case(torch.bfloat16, 5, 32, 8, 128, 256, 820, (820 * 256, 1, 0, 700 * 256 + 3, 65))  # 2**31 elements and more

# For results that two kernels, or one kernel in two ways, may round differently.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}


def of(q: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, scale: float) -> Case:
    num_seqs, num_heads, head_dim = q.shape
    return Case(q.dtype, num_seqs, num_heads, kv_pages.shape[3], head_dim, kv_pages.shape[2], page_table.shape[1])


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
        kv_lens = draw(st.tuples(*[lengths(st, page_size, max_pages)] * num_seqs))
        return Case(dtype, num_seqs, num_heads, num_kv_heads, head_dim, page_size, max_pages, kv_lens)

    return cases()


def make_cache(layout: KVLayout, kv_lens: tuple[int, ...], max_pages: int, device: torch.device, g: torch.Generator):
    """Pages, page table and lengths: every sequence's pages lie shuffled, slots that nobody owns hold NaN.

    The number of pages depends on shapes only, so that other lengths fit the same buffers.
    """
    num_seqs, page_size = len(kv_lens), layout.page_size
    num_pages = num_seqs * max_pages + 2
    pages = torch.randperm(num_pages, generator=g, device=device)[: num_seqs * max_pages].view(num_seqs, max_pages)
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    owned = torch.zeros(num_pages, page_size, dtype=torch.bool, device=device)
    tokens = torch.arange(max_pages * page_size, device=device)
    owned[pages] = (tokens < lens[:, None]).view(num_seqs, max_pages, page_size)
    kv_pages = torch.randn(layout.shape(num_pages), generator=g, device=device, dtype=layout.dtype)
    kv_pages.masked_fill_(~owned[:, None, :, None, None], float("nan"))
    used = torch.arange(max_pages, device=device) * page_size < lens[:, None]
    garbage = torch.tensor(GARBAGE, dtype=torch.int32, device=device).repeat(max_pages)[:max_pages]
    page_table = torch.where(used, pages.int(), garbage)
    return kv_pages, page_table, lens


def make_queries(shape: tuple[int, int, int], num_kv_heads: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """[T, H, E], a view into a fused qkv as models have it; every third head attends sharply, the others broadly."""
    num_tokens, num_heads, head_dim = shape
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=g, device=g.device)
    qkv[:, ::3] *= 5
    return qkv.to(dtype)[:, :num_heads]


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    """Where the case leaves kv_lens open they are random. Queries of empty sequences are NaN."""
    g = torch.Generator(device).manual_seed(seed)
    chance = random.Random(seed)
    kv_lens = case.kv_lens or tuple(chance.randint(0, case.max_pages * case.page_size) for _ in range(case.num_seqs))
    kv_pages, page_table, lens = make_cache(case.layout, kv_lens, case.max_pages, device, g)
    q = make_queries((case.num_seqs, case.num_heads, case.head_dim), case.num_kv_heads, case.dtype, g)
    q.masked_fill_((lens == 0)[:, None, None], float("nan"))
    return q, kv_pages, page_table, lens, case.head_dim**-0.5


def cost(case: Case) -> Cost:
    kv_lens = case.kv_lens or (case.max_pages * case.page_size,) * case.num_seqs
    q_bytes = case.num_seqs * case.num_heads * case.head_dim * case.dtype.itemsize
    index_bytes = 4 * sum(1 + num_pages_for(n, case.page_size) for n in kv_lens)
    num_bytes = sum(kv_lens) * case.layout.token_bytes + 2 * q_bytes + index_bytes
    return Cost(num_bytes, 4 * case.num_heads * case.head_dim * sum(kv_lens))


def moved(kv_pages: Tensor, page_table: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The same sequences with every page at another place."""
    g = torch.Generator(kv_pages.device).manual_seed(seed)
    places = torch.randperm(kv_pages.shape[0], generator=g, device=kv_pages.device)  # old page -> new page
    elsewhere = torch.empty_like(kv_pages)
    elsewhere[places] = kv_pages
    valid = (page_table >= 0) & (page_table < kv_pages.shape[0])
    there = places[page_table.clamp(0, kv_pages.shape[0] - 1).long()].int()
    return elsewhere, torch.where(valid, there, page_table)


def law_pages_may_lie_anywhere(run, case: Case, device: torch.device, seed: int) -> None:
    q, kv_pages, page_table, kv_lens, scale = make(case, device, seed)
    elsewhere, moved_table = moved(kv_pages, page_table, seed + 1)
    there = run(q, elsewhere, moved_table, kv_lens, scale)
    torch.testing.assert_close(run(q, kv_pages, page_table, kv_lens, scale), there, rtol=0, atol=0)


def law_pages_may_be_shared(run, case: Case, device: torch.device, seed: int) -> None:
    """Two sequences with one query and one context, as after a prefix hit, get one answer."""
    q, kv_pages, page_table, kv_lens, scale = make(case, device, seed)
    if case.num_seqs < 2:
        return
    q[1], page_table[1], kv_lens[1] = q[0], page_table[0], kv_lens[0]
    out = run(q, kv_pages, page_table, kv_lens, scale)
    torch.testing.assert_close(out[0], out[1], rtol=0, atol=0)


def law_values_scale(run, case: Case, device: torch.device, seed: int) -> None:
    """Twice the values, twice the output (but for fp16's subnormals)."""
    q, kv_pages, page_table, kv_lens, scale = make(case, device, seed)
    out = run(q, kv_pages, page_table, kv_lens, scale)
    kv_pages[:, 1] *= 2
    torch.testing.assert_close(run(q, kv_pages, page_table, kv_lens, scale), out * 2)


def law_sequences_are_independent(run, case: Case, device: torch.device, seed: int) -> None:
    """Sequences in another order, each beside others, give their own rows."""
    q, kv_pages, page_table, kv_lens, scale = make(case, device, seed)
    g = torch.Generator(device).manual_seed(seed)
    order = torch.randperm(case.num_seqs, generator=g, device=device)
    out = run(q, kv_pages, page_table, kv_lens, scale)
    again = run(q[order], kv_pages, page_table[order], kv_lens[order], scale)
    torch.testing.assert_close(again, out[order], rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])


LAWS = [
    law_pages_may_lie_anywhere,
    law_pages_may_be_shared,
    law_values_scale,
    law_sequences_are_independent,
]
