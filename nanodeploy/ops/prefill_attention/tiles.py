"""Causal attention in tiles of packed rows: (token, head of one kv head's group) pairs.

The running softmax is FlashAttention-2's (arXiv:2307.08691). The loop is staggered by one tile, FlashAttention-3's
overlap inside a warp group (arXiv:2407.08608, section 3.2): while the tensor cores multiply tile i-1's weights with its
values, the other units work out tile i's softmax. NOTES.md says what in the source Triton needs for that to come true.

FP8 pages become fp16 in registers on their way to the tensor cores. A key's scale multiplies its column of scores; a
value's scale is an exponent e, and the running maximum is that of score + e: so weights with e in them go into fp16
without leaving its range, the sum takes e out again, and no tile is rescaled.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanodeploy.ops.layouts import KVCache
from nanodeploy.ops.prefill_attention.reference import prefill_attention
from nanodeploy.ops.registry import Aot

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _pages(table, start, end, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of tokens start : start + BLOCK_N, or the pages of each if the tile may reach over a page's end."""
    if PAGE % BLOCK_N == 0:
        return tl.load(table + start // PAGE, mask=start < end, other=0).to(tl.int64)
    else:
        columns = start + tl.arange(0, BLOCK_N)
        return tl.load(table + columns // PAGE, mask=columns < end, other=0).to(tl.int64)


@triton.jit
def _scales_at(pages, start, stride_page, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the scales of tokens start : start + BLOCK_N lie, given `_pages` of them."""
    return pages * stride_page + (start + tl.arange(0, BLOCK_N)) % PAGE


# One compilation for any lengths and any slice of the batch's rows.
@triton.jit(
    do_not_specialize=["window", "group", "num_tokens", "num_seqs", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens", "cu_q_lens"],
)
def _attend(
    q,
    kv_pages,
    kv_scales,
    page_table,
    kv_lens,
    cu_q_lens,
    sinks,
    out,
    scale_log2,
    window,
    group,
    num_tokens,
    num_seqs,
    stride_q_token,
    stride_q_head,
    stride_page,
    stride_kv,
    stride_slot,
    stride_head,
    stride_scale_page,
    stride_scale_kv,
    stride_scale_head,
    stride_table,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Program (tile of rows, kv head). Tiles run from the last row to the first: long contexts start early.

    Sequence s owns the tiles from cu_q_lens[s] * group // BLOCK_M + s + 1 on, which is always room enough; so the grid
    needs no lengths. The rows before the first and those after the last are two more sequences, -1 and num_seqs, whose
    tiles write zeros. kv_scales and sinks may be None; window counts if WINDOWED.
    """
    QUANTISED: tl.constexpr = kv_scales is not None
    tile_id = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = -1
    for first in range(0, num_seqs + 1, 128):
        seqs = first + tl.arange(0, 128)
        inside = seqs <= num_seqs
        starts = tl.load(cu_q_lens + seqs, mask=inside, other=0) * group // BLOCK_M + seqs + 1
        seq += tl.sum((inside & (starts <= tile_id)).to(tl.int32), 0)
    q_begin = 0
    if seq >= 0:
        q_begin = tl.load(cu_q_lens + seq)
    q_end = num_tokens
    if seq < num_seqs:
        q_end = tl.load(cu_q_lens + seq + 1)
    first_row = (tile_id - q_begin * group // BLOCK_M - seq - 1) * BLOCK_M
    if first_row >= (q_end - q_begin) * group:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    present = rows < (q_end - q_begin) * group
    tokens = (q_begin + rows // group).to(tl.int64)
    heads = kv_head * group + rows % group
    dims = tl.arange(0, HEAD_DIM)
    where = out + (tokens * (tl.num_programs(1) * group) + heads)[:, None] * HEAD_DIM + dims[None, :]
    if (seq < 0) | (seq == num_seqs):
        tl.store(where, tl.zeros([BLOCK_M, HEAD_DIM], out.dtype.element_ty), mask=present[:, None])
        return

    kv_len = tl.load(kv_lens + seq)
    queries = tl.load(
        q + (tokens * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=present[:, None], other=0.0
    )
    context = kv_len - (q_end - q_begin)
    limits = context + rows // group  # the last position that each row sees
    end = tl.minimum(context + (first_row + BLOCK_M - 1) // group + 1, kv_len)
    full = (context + first_row // group + 1) // BLOCK_N * BLOCK_N  # every row sees all that is before
    table = page_table + tl.cast(seq, tl.int64) * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, :]
    tile = tl.arange(0, BLOCK_N)
    begin = 0
    hidden = 0  # columns before it are hidden from some row
    if WINDOWED:
        begin = tl.maximum(context + first_row // group - window + 1, 0) // BLOCK_N * BLOCK_N
        hidden = context + (first_row + BLOCK_M - 1) // group - window + 1
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    # What the tile before left to do: its weights, the shrink of `mixed` that they assume, where its values lie.
    weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    shrink = tl.full([BLOCK_M], 1.0, tl.float32)
    if PAGE % BLOCK_N == 0:
        slot_before = tl.full([], 0, tl.int64)
    else:
        slot_before = tl.zeros([BLOCK_N], tl.int64)
    if QUANTISED:
        # Scale bytes are too narrow for cp.async: those of the next tile are loaded a round ahead, their page ids two.
        compute: tl.constexpr = tl.float32 if q.dtype.element_ty == tl.float32 else tl.float16
        queries = queries.to(compute)
        key_scales = kv_scales + kv_head * stride_scale_head
        value_scales = key_scales + stride_scale_kv
        at = _scales_at(_pages(table, begin, end, PAGE, BLOCK_N), begin, stride_scale_page, PAGE, BLOCK_N)
        key_bytes = tl.load(key_scales + at, mask=begin + tile < end, other=127)
        value_bytes = tl.load(value_scales + at, mask=begin + tile < end, other=127)
        pages_next = _pages(table, begin + BLOCK_N, end, PAGE, BLOCK_N)
    for start in tl.range(begin, end + BLOCK_N, BLOCK_N, num_stages=NUM_STAGES):  # the last round: values only
        columns = start + tile
        valid = columns < end
        valid_before = (columns >= begin + BLOCK_N) & (columns - BLOCK_N < end)
        # Page ids and rows past the end are never loaded: the table holds garbage there, the pages other owners' data.
        page = _pages(table, start, end, PAGE, BLOCK_N)
        if PAGE % BLOCK_N == 0:
            slot = page * stride_page + (start % PAGE) * stride_slot
            at = slot + (tile * stride_slot)[:, None]
            at_before = slot_before + stride_kv + (tile * stride_slot)[:, None]
        else:
            slot = page * stride_page + (columns % PAGE) * stride_slot
            at = slot[:, None]
            at_before = (slot_before + stride_kv)[:, None]
        k = tl.load(keys + at, mask=valid[:, None], other=0.0)
        v = tl.load(keys + at_before, mask=valid_before[:, None], other=0.0)
        slot_before = slot
        if QUANTISED:
            k, v = k.to(compute), v.to(compute)
            stretches = (key_bytes.to(tl.int32) << 23).to(tl.float32, bitcast=True) * scale_log2
            lifts = value_bytes.to(tl.float32) - 127.0
            at = _scales_at(pages_next, start + BLOCK_N, stride_scale_page, PAGE, BLOCK_N)
            key_bytes = tl.load(key_scales + at, mask=columns + BLOCK_N < end, other=127)
            value_bytes = tl.load(value_scales + at, mask=columns + BLOCK_N < end, other=127)
            pages_next = _pages(table, start + 2 * BLOCK_N, end, PAGE, BLOCK_N)
        scores = tl.dot(queries, k.T, input_precision="ieee")
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        if QUANTISED:
            scores = scores * stretches[None, :] + lifts[None, :]
        if WINDOWED:
            if (start >= full) | (start < hidden):
                seen = (columns[None, :] <= limits[:, None]) & (columns[None, :] > limits[:, None] - window)
                scores = tl.where(valid[None, :] & seen, scores, float("-inf"))
        elif start >= full:
            scores = tl.where(valid[None, :] & (columns[None, :] <= limits[:, None]), scores, float("-inf"))
        if QUANTISED:
            risen = tl.maximum(highest, tl.max(scores, 1))
        else:
            risen = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        base = risen
        if WINDOWED:  # a row may have seen nothing yet
            base = tl.where(risen == float("-inf"), 0.0, risen)
        shrink = tl.exp2(highest - base)
        if QUANTISED:
            weights = tl.exp2(scores - base[:, None])
            total = total * shrink + tl.sum(weights * tl.exp2(-lifts)[None, :], 1)
        else:
            weights = tl.exp2(scores * scale_log2 - base[:, None])
            total = total * shrink + tl.sum(weights, 1)
        highest = risen
    if sinks is not None:
        # Last, as it brings no value: an fp16 weight beside a high sink would have few bits left.
        sink = tl.load(sinks + heads, mask=present, other=0.0) * _LOG2_E
        total += tl.exp2(tl.minimum(sink - highest, 126.0))
    tl.store(where, (mixed / total[:, None]).to(out.dtype.element_ty), mask=present[:, None])


@dataclass(frozen=True)
class Config:
    block_m: int  # packed rows per program
    block_n: int  # tokens of context per round
    num_warps: int
    num_stages: int


def pick(head_dim: int, itemsize: int, quantised: bool = False) -> Config:
    """The configuration for a head of `head_dim` values of `itemsize` bytes. One per head_dim and kind of cache: a
    row's bits must not depend on how many others there are."""
    if itemsize == 4:
        return Config(32, 16, 8, 2) if head_dim == 256 else Config(32, 16, 4, 3)
    if quantised:  # fp16 copies of a tile on their way take registers; none of these spills
        return {64: Config(128, 64, 8, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 3)}[head_dim]
    # 64 rows and two programs per SM: one's softmax fills the other's start and end (428 against 417 TFLOP/s, 2x8192).
    return {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 3), 256: Config(128, 32, 8, 3)}[head_dim]


def configs(head_dim: int) -> list[Config]:
    """What a sweep tries for 16-bit dtypes; the first is `pick`'s."""
    shipped = pick(head_dim, 2)
    others = {
        64: [(128, 64, 8, 4), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2)],
        256: [(128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3)],
    }
    return [shipped, *(Config(*other) for other in others[head_dim])]


def launch(
    q: Tensor,
    cache: KVCache,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    config: Config,
) -> Tensor:
    num_tokens, num_heads, head_dim = q.shape
    kv_pages, kv_scales = cache
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = page_table.shape[0]
    group = num_heads // num_kv_heads
    assert q.stride(2) == 1 and kv_pages.stride(4) == 1 and page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous() and (sinks is None or sinks.is_contiguous())
    assert kv_scales is None or kv_scales.stride(3) == 1
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    num_tiles = num_tokens * group // config.block_m + num_seqs + 2
    _attend[(num_tiles, num_kv_heads)](
        q,
        kv_pages,
        kv_scales,
        page_table,
        kv_lens,
        cu_q_lens,
        sinks,
        out,
        scale * LOG2_E,
        window,
        group,
        num_tokens,
        num_seqs,
        *q.stride()[:2],
        *kv_pages.stride()[:4],
        *((0, 0, 0) if kv_scales is None else kv_scales.stride()[:3]),
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        WINDOWED=window > 0,
        num_warps=config.num_warps,
    )
    return out


def aot_of(
    config: Config,
    head_dim: int,
    page_size: int,
    wants: tuple[str, ...],
    dtype: str = "*bf16",
    quantised: bool = False,
    windowed: bool = False,
    sinks: bool = False,
) -> Aot:
    pointers = {"q": dtype, "kv_pages": "*fp8e4nv" if quantised else dtype, "kv_scales": "*u8", "out": dtype}
    pointers |= {"page_table": "*i32", "kv_lens": "*i32", "cu_q_lens": "*i32", "sinks": "*fp32"}
    absent = ([] if quantised else ["kv_scales"]) + ([] if sinks else ["sinks"])
    strides = ("stride_q_token", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    scale_strides = ("stride_scale_page", "stride_scale_kv", "stride_scale_head")
    integers = ("window", "group", "num_tokens", "num_seqs", *strides, *scale_strides, "stride_table")
    constexprs = {"HEAD_DIM": head_dim, "PAGE": page_size, "WINDOWED": windowed} | dict.fromkeys(absent)
    constexprs |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "NUM_STAGES": config.num_stages}
    signature = {name: kind for name, kind in pointers.items() if name not in absent}
    return Aot(
        _attend,
        signature | {"scale_log2": "fp32"} | dict.fromkeys(integers, "i32"),
        constexprs,
        config.num_warps,
        divisible=("q", "kv_pages", "out", *strides, *scale_strides, *(["kv_scales"] if quantised else [])),
        wants=wants,
    )


def _aot():
    for head_dim, page_size in ((128, 64), (128, 16), (128, 256), (64, 64), (256, 64), (256, 16)):
        yield aot_of(pick(head_dim, 2), head_dim, page_size, ("wgmma", "cp.async"))
    yield aot_of(pick(128, 4), 128, 64, ("cp.async",), "*fp32")
    yield aot_of(pick(64, 2), 64, 64, ("wgmma", "cp.async"), windowed=True, sinks=True)
    yield aot_of(pick(128, 2), 128, 64, ("wgmma", "cp.async"), windowed=True)
    for head_dim, page_size in ((128, 64), (128, 16), (64, 64), (256, 64)):
        yield aot_of(pick(head_dim, 2, True), head_dim, page_size, ("wgmma", "cp.async"), quantised=True)


def _takes(case) -> bool:
    return case.head_dim in (64, 128, 256) and case.group <= 16 and case.page_size % 16 == 0 and case.split_tokens == 0


@prefill_attention.kernel(needs="sm80", when=_takes, batch_invariant=True, aot=_aot)
def tiles(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens):
    config = pick(q.shape[2], q.element_size(), kv_scales is not None)
    return launch(q, KVCache(kv_pages, kv_scales), page_table, kv_lens, cu_q_lens, sinks, scale, window, config)
