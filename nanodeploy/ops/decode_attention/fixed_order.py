"""Decoding for --deterministic: stretches of a fixed number of tokens, summed in the order of ops/running_softmax.py.

The stretches of a sequence are spread over a few programs, which leave a partial result of each; a second kernel adds
these up in turn. prefill_attention/fixed_order.py gives a token the same bits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.layouts import SPLIT_TOKENS
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E, add_stretch, add_tile, finish, places, tile_tokens

MAX_ROWS = 128  # query tokens times heads of a group
PROGRAMS = 4096  # enough to fill the machine evenly; a sequence's stretches are spread over no more than that takes


# One compilation for any batch and any slice of its rows.
@triton.jit(
    do_not_specialize=["group", "num_queries", "num_stretches", "window", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens"],
)
def _stretches(
    q,
    kv_pages,
    kv_scales,
    page_table,
    kv_lens,
    sinks,
    out,
    partial,
    stats,
    scale_log2,
    group,
    num_queries,
    num_stretches,
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
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (kv head, p, sequence): stretches p, p + P, ... of those that the sequence's queries see."""
    go(PDL)
    wait(PDL)
    kv_head = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens + seq)
    begin = 0
    if WINDOW:
        begin = tl.maximum(kv_len - num_queries + 1 - window, 0)
    first, last = begin // SPLIT, tl.cdiv(kv_len, SPLIT)
    if tl.program_id(1) > 0 and tl.program_id(1) >= last - first:
        return

    rows = tl.arange(0, ROWS)
    present = rows < num_queries * group
    limits = kv_len - num_queries + rows // group  # the last position that each row sees
    tokens = seq * num_queries + rows // group
    heads = kv_head * group + rows % group
    outputs = tokens * (tl.num_programs(0) * group) + heads
    dims = tl.arange(0, HEAD_DIM)
    where = out + outputs[:, None] * HEAD_DIM + dims[None, :]
    if kv_len <= 0:
        tl.store(where, tl.zeros([ROWS, HEAD_DIM], out.dtype.element_ty), mask=present[:, None])
        return
    queries = tl.load(
        q + (tokens * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=present[:, None], other=0.0
    )
    if SCALED:
        queries = queries.to(tl.float16)
    table = page_table + seq * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, :]
    for stretch in range(first + tl.program_id(1), last, tl.num_programs(1)):
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        start_at = tl.maximum(stretch * SPLIT, begin // TILE * TILE)
        end = tl.minimum(stretch * SPLIT + SPLIT, kv_len)
        for start in tl.range(start_at, end, TILE, num_stages=STAGES):
            columns = start + tl.arange(0, TILE)
            valid = columns < end
            page, inside = places(table, start, end, PAGE, TILE)
            at = (page * stride_page + inside * stride_slot)[:, None]
            k = tl.load(keys + at, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
            v = tl.load(keys + at + stride_kv, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
            k_scale, v_scale = 127, 127
            if SCALED:
                k, v = k.to(tl.float16), v.to(tl.float16)
                scale_at = kv_scales + page * stride_scale_page + kv_head * stride_scale_head + inside
                k_scale = tl.load(scale_at, mask=valid, other=127)
                v_scale = tl.load(scale_at + stride_scale_kv, mask=valid, other=127)
            seen = columns[None, :] <= limits[:, None]
            if WINDOW:
                seen = seen & (columns[None, :] > limits[:, None] - window)
            scores = tl.where(seen, tl.dot(queries, k.T, input_precision="ieee"), float("-inf"))
            highest, total, mixed = add_tile(highest, total, mixed, scores, v, k_scale, v_scale, scale_log2, SCALED)
        if last - first == 1:
            nothing = tl.full([ROWS], float("-inf"), tl.float32)
            highest, total, mixed = add_stretch(
                nothing, tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, HEAD_DIM], tl.float32), highest, total, mixed
            )
            result = finish(highest, total, mixed, sinks + heads, present, SINKS, SCALED)
            tl.store(where, result.to(out.dtype.element_ty), mask=present[:, None])
        else:
            part = outputs * num_stretches + stretch - first
            tl.store(partial + part[:, None] * HEAD_DIM + dims[None, :], mixed, mask=present[:, None])
            tl.store(stats + part * 2, highest, mask=present)
            tl.store(stats + part * 2 + 1, total, mask=present)


@triton.jit(
    do_not_specialize=["num_heads", "num_queries", "num_stretches", "window"],
    do_not_specialize_on_alignment=["kv_lens"],
)
def _add(
    partial,
    stats,
    kv_lens,
    sinks,
    out,
    num_heads,
    num_queries,
    num_stretches,
    window,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (HEADS heads, token): its stretches added up in turn, unless there was but one."""
    go(PDL)
    wait(PDL)
    token = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_lens + token // num_queries)
    begin = 0
    if WINDOW:
        begin = tl.maximum(kv_len - num_queries + 1 - window, 0)
    live = tl.cdiv(kv_len, SPLIT) - begin // SPLIT
    if live <= 1:
        return
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    present = heads < num_heads
    rows = token * num_heads + heads
    dims = tl.arange(0, HEAD_DIM)
    highest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    for stretch in tl.range(0, live, num_stages=4):
        part = rows * num_stretches + stretch
        part_mixed = tl.load(partial + part[:, None] * HEAD_DIM + dims[None, :], mask=present[:, None], other=0.0)
        part_highest = tl.load(stats + part * 2, mask=present, other=0.0)
        part_total = tl.load(stats + part * 2 + 1, mask=present, other=0.0)
        highest, total, mixed = add_stretch(highest, total, mixed, part_highest, part_total, part_mixed)
    result = finish(highest, total, mixed, sinks + heads, present, SINKS, SCALED)
    tl.store(out + rows[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), mask=present[:, None])


@dataclass(frozen=True)
class Config:
    num_warps: int
    num_stages: int
    least_rows: int = 16  # of the matrix product
    programs: int = PROGRAMS


def pick(head_dim: int, scaled: bool) -> Config:
    """Triton halves the stages, as the page id's load comes before the page's.

    With fewer than 64 rows Triton takes mma.sync, and for operands that come from 8 bits deals out the summed axis
    otherwise than in ascending runs of 16: rarely, but then, other bits than prefill's.
    """
    stages = 7 if head_dim == 64 else 5
    return Config(8, stages, 64) if scaled else Config(4, stages)


def launch(q, kv_pages, kv_scales, page_table, kv_lens, sinks, scale, window, config: Config):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = kv_lens.shape[0]
    assert q.stride(2) == 1 and kv_pages.stride(4) == 1 and page_table.stride(1) == 1 and kv_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_seqs == 0:
        return out
    num_queries, group = num_tokens // num_seqs, num_heads // num_kv_heads
    num_stretches = triton.cdiv(page_table.shape[1] * page_size, SPLIT_TOKENS)
    spread = max(1, min(num_stretches, triton.cdiv(config.programs, num_seqs * num_kv_heads)))
    parts = (num_tokens, num_heads, num_stretches) if num_stretches > 1 else (1, 1, 1)
    partial = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((*parts, 2), dtype=torch.float32, device=q.device)
    scales = kv_scales if kv_scales is not None else kv_lens  # never read
    flags = {"SPLIT": SPLIT_TOKENS, "SCALED": kv_scales is not None, "WINDOW": window > 0, "SINKS": sinks is not None}
    # Every fused multiply-add is written out: none is left to the compiler.
    options = {**overlap.launch(), "enable_fp_fusion": False}
    _stretches[(num_kv_heads, spread, num_seqs)](
        q,
        kv_pages,
        scales,
        page_table,
        kv_lens,
        sinks if sinks is not None else stats,
        out,
        partial,
        stats,
        scale * LOG2_E,
        group,
        num_queries,
        num_stretches,
        window,
        *q.stride()[:2],
        *kv_pages.stride()[:4],
        *(kv_scales.stride()[:3] if kv_scales is not None else (0, 0, 0)),
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        ROWS=max(config.least_rows, triton.next_power_of_2(num_queries * group)),
        TILE=tile_tokens(head_dim),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **flags,
        **options,
    )
    if num_stretches > 1:
        heads = min(8, triton.next_power_of_2(num_heads))
        _add[(triton.cdiv(num_heads, heads), num_tokens)](
            partial,
            stats,
            kv_lens,
            sinks if sinks is not None else stats,
            out,
            num_heads,
            num_queries,
            num_stretches,
            window,
            HEAD_DIM=head_dim,
            HEADS=heads,
            num_warps=4,
            **flags,
            **options,
        )
    return out


def _aot():
    flags = {"SPLIT": SPLIT_TOKENS, "WINDOW": False, "SINKS": False, "PDL": False}
    strides = ("stride_q_token", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    scale_strides = ("stride_scale_page", "stride_scale_kv", "stride_scale_head")
    shipped = ((128, 64, False), (128, 16, False), (64, 64, False), (256, 64, False), (128, 64, True))
    for head_dim, page_size, scaled in shipped:
        config = pick(head_dim, scaled)
        signature = {
            "q": "*bf16",
            "kv_pages": "*fp8e4nv" if scaled else "*bf16",
            "kv_scales": "*u8" if scaled else "*i32",
        }
        signature |= {"page_table": "*i32", "kv_lens": "*i32", "sinks": "*fp32", "out": "*bf16"}
        signature |= {"partial": "*fp32", "stats": "*fp32", "scale_log2": "fp32"}
        counts = ("group", "num_queries", "num_stretches", "window")
        signature |= dict.fromkeys((*counts, *strides, *scale_strides, "stride_table"), "i32")
        constexprs = {"HEAD_DIM": head_dim, "PAGE": page_size, "ROWS": config.least_rows}
        constexprs |= {"TILE": tile_tokens(head_dim), "STAGES": config.num_stages, "SCALED": scaled, **flags}
        divisible = ("q", "kv_pages", "out", "partial", *strides)
        wants = ("wgmma" if scaled else "mma", "cp.async")
        yield Aot(_stretches, signature, constexprs, config.num_warps, 3, divisible, wants)


def _takes(case) -> bool:
    return (
        case.dtype in (torch.bfloat16, torch.float16)
        and case.head_dim in (64, 128, 256)
        and case.group * case.num_queries <= MAX_ROWS
        and case.page_size % 16 == 0
    )


@decode_attention.kernel(needs="sm80", when=_takes, batch_invariant=True, order="stretches", aot=_aot)
def fixed_order(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    config = pick(q.shape[2], kv_scales is not None)
    return launch(q, kv_pages, kv_scales, page_table, kv_lens, sinks, scale, window, config)
