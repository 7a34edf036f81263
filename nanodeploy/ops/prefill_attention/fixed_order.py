"""Prefill for --deterministic: tiles of packed rows that sum their context in the order of ops/running_softmax.py.

One program takes the stretches one after another and keeps two states, that of the stretch and that of all before it.
decode_attention/fixed_order.py gives a token the same bits. How rows are packed and tiles found is told in tiles.py.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops.layouts import SPLIT_TOKENS
from nanodeploy.ops.prefill_attention.reference import prefill_attention
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E, add_stretch, add_tile, finish, places, tile_tokens


# One compilation for any lengths and any slice of the batch's rows.
@triton.jit(
    do_not_specialize=["group", "num_tokens", "num_seqs", "window", "stride_table"],
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
    group,
    num_tokens,
    num_seqs,
    window,
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
    VALUE_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Program (tile of rows, kv head, VALUE_DIM of the values' dims). Tiles run from the last row to the first.

    Sequence s owns the tiles from cu_q_lens[s] * group // ROWS + s + 1 on, which is always room enough. The rows before
    the first sequence and after the last are two more, whose tiles write zeros.
    """
    tile_id = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    dims = tl.arange(0, HEAD_DIM)
    value_dims = tl.program_id(2) * VALUE_DIM + tl.arange(0, VALUE_DIM)
    seq = -1
    for block in range(0, num_seqs + 1, 128):
        seqs = block + tl.arange(0, 128)
        inside = seqs <= num_seqs
        starts = tl.load(cu_q_lens + seqs, mask=inside, other=0) * group // ROWS + seqs + 1
        seq += tl.sum((inside & (starts <= tile_id)).to(tl.int32), 0)
    q_begin, first_tile, q_end = 0, 0, num_tokens
    if seq >= 0:
        q_begin = tl.load(cu_q_lens + seq)
        first_tile = q_begin * group // ROWS + seq + 1
    if seq < num_seqs:
        q_end = tl.load(cu_q_lens + seq + 1)
    first_row = (tile_id - first_tile) * ROWS
    if first_row >= (q_end - q_begin) * group:
        return

    rows = first_row + tl.arange(0, ROWS)
    present = rows < (q_end - q_begin) * group
    tokens = (q_begin + rows // group).to(tl.int64)
    heads = kv_head * group + rows % group
    where = out + (tokens * (tl.num_programs(1) * group) + heads)[:, None] * HEAD_DIM + value_dims[None, :]
    if seq < 0 or seq == num_seqs:
        tl.store(where, tl.zeros([ROWS, VALUE_DIM], out.dtype.element_ty), mask=present[:, None])
        return

    kv_len = tl.load(kv_lens + seq)
    queries = tl.load(
        q + (tokens * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=present[:, None], other=0.0
    )
    if SCALED:
        queries = queries.to(tl.float16)
    context = kv_len - (q_end - q_begin)
    limits = context + rows // group  # the last position that each row sees
    begin = 0
    if WINDOW:
        begin = tl.maximum(context + first_row // group + 1 - window, 0) // TILE * TILE
    end = tl.minimum(context + (first_row + ROWS - 1) // group + 1, kv_len)
    full = (context + first_row // group + 1) // TILE * TILE  # every row sees all that is before
    table = page_table + tl.cast(seq, tl.int64) * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, :]
    values = kv_pages + kv_head * stride_head + stride_kv + value_dims[None, :]
    all_highest = tl.full([ROWS], float("-inf"), tl.float32)
    all_total = tl.zeros([ROWS], tl.float32)
    all_mixed = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_DIM], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        columns = start + tl.arange(0, TILE)
        valid = columns < end
        page, inside = places(table, start, end, PAGE, TILE)
        at = (page * stride_page + inside * stride_slot)[:, None]
        k = tl.load(keys + at, mask=valid[:, None], other=0.0)
        v = tl.load(values + at, mask=valid[:, None], other=0.0)
        k_scale, v_scale = 127, 127
        if SCALED:
            k, v = k.to(tl.float16), v.to(tl.float16)
            scale_at = kv_scales + page * stride_scale_page + kv_head * stride_scale_head + inside
            k_scale = tl.load(scale_at, mask=valid, other=127)
            v_scale = tl.load(scale_at + stride_scale_kv, mask=valid, other=127)
        scores = tl.dot(queries, k.T, input_precision="ieee")
        if WINDOW:
            seen = (columns[None, :] <= limits[:, None]) & (columns[None, :] > limits[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        elif start >= full:
            scores = tl.where(columns[None, :] <= limits[:, None], scores, float("-inf"))
        if start % SPLIT == 0:  # the stretch before is complete
            all_highest, all_total, all_mixed = add_stretch(all_highest, all_total, all_mixed, highest, total, mixed)
            highest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, VALUE_DIM], tl.float32)
        highest, total, mixed = add_tile(highest, total, mixed, scores, v, k_scale, v_scale, scale_log2, SCALED)
    all_highest, all_total, all_mixed = add_stretch(all_highest, all_total, all_mixed, highest, total, mixed)
    result = finish(all_highest, all_total, all_mixed, sinks + heads, present, SINKS, SCALED)
    tl.store(where, result.to(out.dtype.element_ty), mask=present[:, None])


@dataclass(frozen=True)
class Config:
    value_dim: int  # dims of the values per program: two states of more, and their scales, need too many registers
    rows: int  # packed rows per program
    num_warps: int
    num_stages: int


def pick(head_dim: int, scaled: bool) -> Config:
    if head_dim == 128 and not scaled:
        return Config(128, 128, 8, 3)
    return Config(64 if scaled else min(head_dim, 128), 64, 4, 3)


def launch(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens, config: Config):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = page_table.shape[0]
    group = num_heads // num_kv_heads
    assert q.stride(2) == 1 and kv_pages.stride(4) == 1 and page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    num_tiles = num_tokens * group // config.rows + num_seqs + 2
    _attend[(num_tiles, num_kv_heads, head_dim // config.value_dim)](
        q,
        kv_pages,
        kv_scales if kv_scales is not None else kv_lens,
        page_table,
        kv_lens,
        cu_q_lens,
        sinks if sinks is not None else kv_lens,
        out,
        scale * LOG2_E,
        group,
        num_tokens,
        num_seqs,
        window,
        *q.stride()[:2],
        *kv_pages.stride()[:4],
        *(kv_scales.stride()[:3] if kv_scales is not None else (0, 0, 0)),
        page_table.stride(0),
        HEAD_DIM=head_dim,
        VALUE_DIM=config.value_dim,
        PAGE=page_size,
        ROWS=config.rows,
        TILE=tile_tokens(head_dim),
        SPLIT=split_tokens,
        STAGES=config.num_stages,
        SCALED=kv_scales is not None,
        WINDOW=window > 0,
        SINKS=sinks is not None,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # every fused multiply-add is written out: none is left to the compiler
    )
    return out


def _aot():
    strides = ("stride_q_token", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    scale_strides = ("stride_scale_page", "stride_scale_kv", "stride_scale_head")
    shipped = ((128, 64, False), (128, 16, False), (64, 64, False), (256, 64, False), (128, 64, True))
    for head_dim, page_size, scaled in shipped:
        config = pick(head_dim, scaled)
        pages, scales = ("*fp8e4nv", "*u8") if scaled else ("*bf16", "*i32")
        signature = {"q": "*bf16", "kv_pages": pages, "kv_scales": scales}
        signature |= {"page_table": "*i32", "kv_lens": "*i32", "cu_q_lens": "*i32", "sinks": "*fp32", "out": "*bf16"}
        counts = ("group", "num_tokens", "num_seqs", "window")
        signature |= {"scale_log2": "fp32"} | dict.fromkeys((*counts, *strides, *scale_strides, "stride_table"), "i32")
        constexprs = {"HEAD_DIM": head_dim, "VALUE_DIM": config.value_dim, "PAGE": page_size, "ROWS": config.rows}
        constexprs |= {"TILE": tile_tokens(head_dim), "SPLIT": SPLIT_TOKENS, "STAGES": config.num_stages}
        constexprs |= {"SCALED": scaled, "WINDOW": False, "SINKS": False}
        yield Aot(
            _attend,
            signature,
            constexprs,
            config.num_warps,
            3,
            ("q", "kv_pages", "out", *strides),
            ("wgmma", "cp.async"),
        )


def _takes(case) -> bool:
    return (
        case.dtype in (torch.bfloat16, torch.float16)
        and case.split_tokens > 0
        and case.split_tokens % 64 == 0
        and case.head_dim in (64, 128, 256)
        and case.group <= 16
        and case.page_size % 16 == 0
    )


@prefill_attention.kernel(needs="sm80", when=_takes, batch_invariant=True, order="stretches", aot=_aot)
def fixed_order(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens):
    config = pick(q.shape[2], kv_scales is not None)
    return launch(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens, config)
