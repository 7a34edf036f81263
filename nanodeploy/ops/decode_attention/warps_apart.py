"""Decoding by the plan of plan_decode, each warp with tokens and a running softmax of its own.

A program does one item of the plan for one kv head, as planned.py does. There its warps work on one tile together and
wait for each other some ten times a tile; here they wait only for memory, and their results are merged once, when the
item is done. It takes rows of one matrix product (16) and no more; NOTES.md has the counts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import machine, overlap
from nanodeploy.ops.decode_attention.planned import EVERYTHING, LOG2_E, NEVER, _deliver, _unpack, chunk
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.plan_decode.reference import FIELDS, extent
from nanodeploy.ops.registry import Aot

ROWS = 16  # of the matrix product


@triton.jit
def _places(table, tokens, firsts, begin, end, PAGE: tl.constexpr, TOKENS: tl.constexpr):
    """(page, offset in the page) [WARPS, TOKENS] of tokens; firsts [WARPS] of them begin a page or lie inside of one.

    Page ids of what lies outside of begin to end are never loaded: the table holds garbage there.
    """
    if PAGE % TOKENS == 0:
        page = tl.load(table + firsts // PAGE, mask=(firsts < end) & (firsts + TOKENS > begin), other=0)
        page = page.to(tl.int64)[:, None]
        return page, (firsts % PAGE)[:, None] + tl.arange(0, TOKENS)[None, :]
    else:
        page = tl.load(table + tokens // PAGE, mask=(tokens >= begin) & (tokens < end), other=0)
        return page.to(tl.int64), tokens % PAGE


@triton.jit
def _scales(kv_scales, page, inside, valid, kv_head, num_kv_heads, PAGE: tl.constexpr):
    """The scale bytes of keys and values; what stands for 0 and 1 where not valid."""
    at = kv_scales + (page * 2 * num_kv_heads + kv_head) * PAGE + inside
    return tl.load(at, mask=valid, other=0), tl.load(at + num_kv_heads * PAGE, mask=valid, other=127)


# One compilation for any batch and any slice of its rows.
@triton.jit(
    do_not_specialize=["num_queries", "group", "window", "counters_at", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens"],
)
def _attend(
    q,
    kv_pages,
    kv_scales,
    page_table,
    kv_lens,
    plan,
    sinks,
    out,
    partial,
    lse,
    scale_log2,
    num_queries,
    group,
    window,
    counters_at,
    stride_q_token,
    stride_q_head,
    stride_page,
    stride_kv,
    stride_slot,
    stride_head,
    stride_table,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    TOKENS: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (kv head, item). A tile is WARPS times TOKENS tokens. The first axis of everything that has three is the
    warps', and a product of matrices with such an axis stays inside of each warp. The rest as in planned.py."""
    go(PDL)
    wait(PDL)
    FP8: tl.constexpr = kv_scales is not None
    STEP: tl.constexpr = 2 if FP8 else 1
    WIDTH: tl.constexpr = HEAD_DIM // STEP
    TILE: tl.constexpr = WARPS * TOKENS
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    item = plan + tl.program_id(1) * FIELDS
    if tl.load(item + 1) == 0:
        return
    seq = tl.load(item)
    begin = tl.load(item + 2)
    end = tl.load(item + 3)
    slot = tl.load(item + 4)
    own_slot = tl.load(item + 5)
    num_own = tl.load(item + 6)

    num_rows = num_queries * group
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, WIDTH)
    present = rows < num_rows
    heads = kv_head * group + rows % group
    tokens_at = q + (seq.to(tl.int64) * num_queries + rows // group) * stride_q_token + heads * stride_q_head
    queries = tl.load(tokens_at[:, None] + dims[None, :] * STEP, mask=present[:, None], other=0.0)
    mixed = tl.zeros([WARPS, BLOCK_M, WIDTH], tl.float32)
    odd_mixed = None
    if FP8:
        odd_queries = tl.load(tokens_at[:, None] + dims[None, :] * STEP + 1, mask=present[:, None], other=0.0)
        odd_queries = tl.broadcast_to(odd_queries.to(tl.float16)[None], [WARPS, BLOCK_M, WIDTH])
        queries = queries.to(tl.float16)
        odd_mixed = tl.zeros([WARPS, BLOCK_M, WIDTH], tl.float32)
    queries = tl.broadcast_to(queries[None], [WARPS, BLOCK_M, WIDTH])
    if MASKED:
        kv_len = tl.load(kv_lens + seq)
        sees = kv_len - num_queries + 1 + rows // group  # the tokens from sees - window up to sees
    table = page_table + seq.to(tl.int64) * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, None, :]
    highest = tl.full([WARPS, BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([WARPS, BLOCK_M], tl.float32)
    firsts = tl.arange(0, WARPS) * TOKENS
    inner = firsts[:, None] + tl.arange(0, TOKENS)[None, :]
    aligned = begin // TILE * TILE
    if FP8:  # one byte a token is too little for the asynchronous copies: it is loaded a tile ahead, into registers
        page, inside = _places(table, aligned + inner, aligned + firsts, begin, end, PAGE, TOKENS)
        valid = (aligned + inner >= begin) & (aligned + inner < end)
        next_key_scale, next_value_scale = _scales(kv_scales, page, inside, valid, kv_head, num_kv_heads, PAGE)
    for start in range(aligned, end, TILE):
        tokens = start + inner
        valid = tokens < end
        if MASKED:
            valid = valid & (tokens >= begin)
        page, inside = _places(table, tokens, start + firsts, begin, end, PAGE, TOKENS)
        at = (page * stride_page + inside * stride_slot)[:, :, None]
        k = tl.load(keys + at, mask=valid[:, :, None], other=0, eviction_policy="evict_first")
        v = tl.load(keys + at + stride_kv, mask=valid[:, :, None], other=0, eviction_policy="evict_first")
        if FP8:
            key_scale = next_key_scale
            value_scale = next_value_scale
            page, inside = _places(table, tokens + TILE, start + TILE + firsts, begin, end, PAGE, TOKENS)
            next_key_scale, next_value_scale = _scales(
                kv_scales, page, inside, tokens + TILE < end, kv_head, num_kv_heads, PAGE
            )
            scores = tl.dot(queries, tl.permute(_unpack(k, False, NATIVE), (0, 2, 1)))
            scores = tl.dot(odd_queries, tl.permute(_unpack(k, True, NATIVE), (0, 2, 1)), scores)
            scores *= ((key_scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) * scale_log2)[:, None, :]
            # A value's scale goes into its weight, which so stays below one; the sum takes it out again.
            exponent = value_scale.to(tl.float32) - 127
            scores += exponent[:, None, :]
        else:
            scores = tl.dot(queries, tl.permute(k, (0, 2, 1)), input_precision="ieee") * scale_log2
        if MASKED:
            seen = (tokens[:, None, :] < sees[None, :, None]) & (tokens[:, None, :] >= sees[None, :, None] - window)
            scores = tl.where(valid[:, None, :] & seen, scores, float("-inf"))
        else:
            scores = tl.where(valid[:, None, :], scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 2))
        weights = tl.exp2(scores - risen[:, :, None])
        shrink = tl.exp2(highest - risen)
        if FP8:
            total = total * shrink + tl.sum(weights * tl.exp2(-exponent)[:, None, :], 2)
            narrow = weights.to(tl.float16)
            mixed = tl.dot(narrow, _unpack(v, False, NATIVE), mixed * shrink[:, :, None])
            odd_mixed = tl.dot(narrow, _unpack(v, True, NATIVE), odd_mixed * shrink[:, :, None])
        else:
            total = total * shrink + tl.sum(weights, 2)
            mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, :, None], input_precision="ieee")
        highest = risen

    risen = tl.max(highest, 0)
    shrink = tl.exp2(highest - risen[None, :])
    total = tl.sum(total * shrink, 0)
    mixed = tl.sum(mixed * shrink[:, :, None], 0)
    if FP8:
        odd_mixed = tl.sum(odd_mixed * shrink[:, :, None], 0)
    _deliver(
        risen,
        total,
        mixed,
        odd_mixed,
        plan,
        sinks,
        out,
        partial,
        lse,
        seq,
        slot,
        own_slot,
        num_own,
        kv_head,
        num_kv_heads,
        1,
        num_queries,
        group,
        counters_at,
        HEAD_DIM,
        BLOCK_M,
        True,
        ROWS,
        CHUNK,
    )


@dataclass(frozen=True)
class Config:
    """How an item is done."""

    tokens: int  # of a warp's part of a tile
    num_warps: int
    num_stages: int  # Triton halves it, as the page id's load comes before the page's: 5 gives 2 tiles in flight
    max_regs: int | None = None  # per thread, where the compiler would take more than lets programs share an SM


def pick(head_dim: int, itemsize: int) -> Config:
    """The configuration for a head of `head_dim` values of `itemsize` bytes in the cache."""
    return Config(32, 4, 7) if itemsize == 1 or head_dim == 64 else Config(16, 4, 7)


def configs(head_dim: int, itemsize: int) -> list[Config]:
    """What a sweep tries; the first is `pick`'s."""
    shipped = pick(head_dim, itemsize)
    tried = [(32, 4, 5), (32, 4, 7), (32, 4, 5, 128), (16, 4, 7), (16, 4, 9), (16, 4, 9, 128), (16, 8, 7), (32, 2, 7)]
    return [shipped, *(c for c in (Config(*t) for t in tried) if c != shipped)]


def launch(
    q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window, *, config: Config | None = None
):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = kv_lens.shape[0]
    assert q.stride(2) == 1 and kv_pages.stride(4) == 1 and page_table.stride(1) == 1 and kv_lens.is_contiguous()
    assert kv_scales is None or kv_scales.is_contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_seqs == 0:
        return out
    num_queries, group = num_tokens // num_seqs, num_heads // num_kv_heads
    shape = num_seqs, num_queries, num_heads, num_kv_heads
    if plan is None or extent(*shape, prefixes is not None and not window).shares:  # it goes over no prefix together
        plan = plan_decode(kv_lens, None, num_queries, num_heads, num_kv_heads, window)
    room = extent(*shape, False)
    assert plan.shape[0] == room.length and plan.is_contiguous(), "the plan of another batch"
    assert num_queries * group <= ROWS
    config = config or pick(head_dim, kv_pages.element_size())
    rows = triton.next_power_of_2(num_queries * group)
    partial = torch.empty((room.num_slots, num_heads * num_queries, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((room.num_slots, num_heads * num_queries), dtype=torch.float32, device=q.device)
    values = kv_pages if kv_scales is None else kv_pages.view(torch.uint16)
    _attend[(num_kv_heads, room.num_items)](
        q,
        values,
        kv_scales,
        page_table,
        kv_lens,
        plan,
        sinks,
        out,
        partial,
        lse,
        scale * LOG2_E,
        num_queries,
        group,
        window or EVERYTHING,
        room.counters_at,
        *q.stride()[:2],
        *values.stride()[:4],
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        BLOCK_M=ROWS,
        WARPS=config.num_warps,
        TOKENS=config.tokens,
        MASKED=num_queries > 1 or window > 0,
        ROWS=rows,
        CHUNK=chunk(rows, head_dim),
        FIELDS=FIELDS,
        NATIVE=machine.capability() >= 89 and not triton_interpret(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"maxnreg": config.max_regs} if config.max_regs and not triton_interpret() else {}),
        **overlap.launch(),
    )
    return out


def aot_of(head_dim: int, page_size: int, fp8: bool, config: Config, rows: int = 4) -> Aot:
    cache = {"kv_pages": "*u16", "kv_scales": "*u8"} if fp8 else {"kv_pages": "*bf16"}
    ints = dict.fromkeys(("page_table", "kv_lens", "plan"), "*i32")
    strides = ("stride_q_token", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    signature = {"q": "*bf16", "out": "*bf16", **cache, **ints, "partial": "*fp32", "lse": "*fp32"}
    numbers = ("num_queries", "group", "window", "counters_at", *strides, "stride_table")
    signature |= {"scale_log2": "fp32"} | dict.fromkeys(numbers, "i32")
    constexprs: dict[str, Any] = {"sinks": None} if fp8 else {"sinks": None, "kv_scales": None}
    constexprs |= {"HEAD_DIM": head_dim, "PAGE": page_size, "BLOCK_M": ROWS, "WARPS": config.num_warps}
    constexprs |= {"TOKENS": config.tokens, "MASKED": rows > 4, "ROWS": rows, "CHUNK": chunk(rows, head_dim)}
    constexprs |= {"FIELDS": FIELDS, "NATIVE": True, "PDL": True}
    divisible = ("q", "kv_pages", "out", "partial", "lse", *strides, *(("kv_scales",) if fp8 else ()))
    wants = ("mma", "cp.async")
    return Aot(_attend, signature, constexprs, config.num_warps, config.num_stages, divisible, wants)


def _aot():
    for head_dim, page_size in ((128, 64), (128, 16), (64, 64)):
        for fp8 in (False, True):
            yield aot_of(head_dim, page_size, fp8, pick(head_dim, 1 if fp8 else 2))
    yield aot_of(128, 64, True, pick(128, 1), rows=16)


def _takes(case) -> bool:
    fits = case.head_dim in (64, 128) and case.page_size % 16 == 0 and case.num_queries * case.group <= ROWS
    shares = case.has_prefixes and not case.window
    return fits and not shares and case.dtype in (torch.bfloat16, torch.float16)


@decode_attention.kernel(needs="sm80", when=_takes, aot=_aot)
def warps_apart(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    return launch(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window)
