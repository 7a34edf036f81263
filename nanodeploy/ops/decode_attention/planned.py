"""Decoding by the plan of plan_decode: each program does one item of it for one kv head.

The query rows of a kv head (its group's heads, times the query tokens, times the sequences of a shared prefix) are
packed into the rows of one matrix product (Flash-Decoding; arXiv:2205.14135 for the running softmax), so every key and
value is read once. What a sequence's items found is merged by the last of them to end, always in the items' order; with
shared prefixes, by a second kernel. The grid depends on shapes alone: a CUDA graph that holds plan_decode as well is
right for any lengths.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import machine, overlap
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.plan_decode.reference import FIELDS, PLACES, TILE_ROWS, extent
from nanodeploy.ops.registry import Aot

LOG2_E = 1.4426950408889634
EVERYTHING = 2**30  # a window that hides nothing
MAX_ROWS = 128  # query tokens times heads of a group
NEVER = tl.constexpr(-1e30)  # below every score; finite, so that what saw nothing has a difference of 0 to itself


@triton.jit
def _unpack(pairs, ODD: tl.constexpr, NATIVE: tl.constexpr):
    """The first (ODD: the second) of each pair of e4m3 values in 16 bits, as fp16."""
    if NATIVE:
        # Two pairs a register: gather the two wanted bytes, convert them together.
        if ODD:
            return tl.inline_asm_elementwise(
                "{.reg .b32 t; .reg .b16 a,b; prmt.b32 t, $1, 0, 0x3120; mov.b32 {a,b}, t; cvt.rn.f16x2.e4m3x2 $0, b;}",
                "=r,r",
                [pairs],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; .reg .b16 a,b; prmt.b32 t, $1, 0, 0x3120; mov.b32 {a,b}, t; cvt.rn.f16x2.e4m3x2 $0, a;}",
            "=r,r",
            [pairs],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    byte = ((pairs >> 8) if ODD else pairs) & 0xFF
    bits = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)  # fp16's exponent is biased by 8 more
    return (bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256).to(tl.float16)


@triton.jit
def _scales(kv_scales, table, tokens, begin, end, kv_head, num_kv_heads, PAGE: tl.constexpr):
    """The scale bytes of tokens' keys and values; what stands for 0 and 1 outside of begin to end."""
    valid = (tokens >= begin) & (tokens < end)
    page = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
    at = kv_scales + (page * 2 * num_kv_heads + kv_head) * PAGE + tokens % PAGE
    return tl.load(at, mask=valid, other=0), tl.load(at + num_kv_heads * PAGE, mask=valid, other=127)


@triton.jit
def _merge(
    partial,
    lse,
    kv_head,
    num_kv_heads,
    num_rows,
    shared_slot,
    shared_step,
    num_shared,
    own_slot,
    num_own,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The softmax-weighted mean [ROWS, HEAD_DIM] of one sequence's partial results, shared ones first, each in turn."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    highest = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for first in range(0, num_shared + num_own, CHUNK):
        splits = first + tl.arange(0, CHUNK)
        slots = tl.where(splits < num_shared, shared_slot + splits * shared_step, own_slot + splits - num_shared)
        at = ((slots * num_kv_heads + kv_head) * num_rows)[:, None] + rows[None, :]
        there = (splits < num_shared + num_own)[:, None] & (rows < num_rows)[None, :]
        # Past the first-level cache, which may hold what lay here before.
        logs = tl.load(lse + at, mask=there, other=float("-inf"), cache_modifier=".cg")
        where = partial + at.to(tl.int64)[:, :, None] * HEAD_DIM + dims[None, None, :]
        results = tl.load(where, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        risen = tl.maximum(highest, tl.max(logs, 0))
        weights = tl.exp2(logs - risen[None, :])
        shrink = tl.exp2(highest - risen)
        total = total * shrink + tl.sum(weights, 0)
        mixed = mixed * shrink[:, None] + tl.sum(results * weights[:, :, None], 0)
        highest = risen
    return mixed / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit
def _write(out, result, seq, kv_head, num_kv_heads, num_queries, group, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    """Store rows (query, head of the group) of one sequence."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    token = seq.to(tl.int64) * num_queries + rows // group
    at = (token * num_kv_heads + kv_head) * group + rows % group
    mask = (rows < num_queries * group)[:, None]
    tl.store(out + at[:, None] * HEAD_DIM + dims[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _deliver(
    highest,
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
    num_seqs,
    num_queries,
    group,
    counters_at,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MERGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What an item found: to `out` where its sequence has no other, else to its slot, where the last one MERGES all.

    highest, total [BLOCK_M], mixed [BLOCK_M, HEAD_DIM], or every other column each of mixed and odd_mixed.
    """
    num_rows = num_queries * group
    rows = tl.arange(0, BLOCK_M)
    present = rows < num_seqs * num_rows
    if sinks is not None:
        if (slot < 0) | (slot == own_slot):  # one of the sequence's items brings the sink
            heads = kv_head * group + rows % group
            sink = tl.load(sinks + heads, mask=present, other=0.0).to(tl.float32) * 1.4426950408889634
            risen = tl.maximum(highest, sink)
            shrink = tl.exp2(highest - risen)
            total = total * shrink + tl.exp2(sink - risen)
            mixed *= shrink[:, None]
            if odd_mixed is not None:
                odd_mixed *= shrink[:, None]
            highest = risen
    total = tl.where(total == 0, 1.0, total)  # nothing seen: zeros
    result = mixed / total[:, None]
    if odd_mixed is not None:
        result = tl.interleave(result, odd_mixed / total[:, None])
    if slot < 0:
        _write(out, result, seq, kv_head, num_kv_heads, num_queries, group, HEAD_DIM, BLOCK_M)
    else:
        at = ((slot + rows // num_rows) * num_kv_heads + kv_head) * num_rows + rows % num_rows
        every = tl.arange(0, HEAD_DIM)
        where = partial + at.to(tl.int64)[:, None] * HEAD_DIM + every[None, :]
        tl.store(where, result, mask=present[:, None])
        tl.store(lse + at, highest + tl.log2(total), mask=present)
        if MERGES:
            tl.debug_barrier()  # all of this program's stores come before its arrival
            counter = plan + counters_at + seq * num_kv_heads + kv_head
            if tl.atomic_add(counter, 1, sem="acq_rel") == num_own - 1:
                merged = _merge(
                    partial, lse, kv_head, num_kv_heads, num_rows, 0, 0, 0, own_slot, num_own, HEAD_DIM, ROWS, CHUNK
                )
                _write(out, merged, seq, kv_head, num_kv_heads, num_queries, group, HEAD_DIM, ROWS)
                tl.store(counter, 0)  # for the next layer


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
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    MERGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    NATIVE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (kv head, item). kv_pages of fp8 are given as pairs of values in 16 bits: such a pair moves through
    shared memory as an fp16 would, and the products with the first and the second values of the pairs are separate.
    MASKED: not every row sees every token of its item. MERGES: here, not in a kernel of its own."""
    go(PDL)
    wait(PDL)
    FP8: tl.constexpr = kv_scales is not None
    STEP: tl.constexpr = 2 if FP8 else 1
    WIDTH: tl.constexpr = HEAD_DIM // STEP
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    item = plan + tl.program_id(1) * FIELDS
    num_seqs = tl.load(item + 1)
    if num_seqs == 0:
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
    tile = tl.arange(0, BLOCK_N)
    present = rows < num_seqs * num_rows
    heads = kv_head * group + rows % group
    tokens_at = q + (seq.to(tl.int64) * num_queries + rows // group) * stride_q_token + heads * stride_q_head
    queries = tl.load(tokens_at[:, None] + dims[None, :] * STEP, mask=present[:, None], other=0.0)
    if FP8:
        queries = queries.to(tl.float16)
        odd_queries = tl.load(tokens_at[:, None] + dims[None, :] * STEP + 1, mask=present[:, None], other=0.0)
        odd_queries = odd_queries.to(tl.float16)
        odd_mixed = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    else:
        odd_mixed = None
    if MASKED:
        kv_len = tl.load(kv_lens + seq + rows // num_rows, mask=present, other=0)
        sees = kv_len - num_queries + 1 + rows % num_rows // group  # the tokens from sees - window up to sees
    table = page_table + seq.to(tl.int64) * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, :]
    highest = tl.full([BLOCK_M], NEVER, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    aligned = begin // BLOCK_N * BLOCK_N
    if FP8:  # one byte a token is too little for the asynchronous copies: it is loaded a tile ahead, into registers
        next_key_scale, next_value_scale = _scales(
            kv_scales, table, aligned + tile, begin, end, kv_head, num_kv_heads, PAGE
        )
    for start in range(aligned, end, BLOCK_N):
        tokens = start + tile
        valid = tokens < end
        if MASKED:
            valid = valid & (tokens >= begin)
        # Page ids and rows past the end are never loaded: the table holds garbage there, the pages other owners' data.
        if PAGE % BLOCK_N == 0:
            page = tl.load(table + start // PAGE).to(tl.int64)
            slots = (page * stride_page + (start % PAGE) * stride_slot) + (tile * stride_slot)[:, None]
        else:
            page = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
            slots = (page * stride_page + (tokens % PAGE) * stride_slot)[:, None]
        k = tl.load(keys + slots, mask=valid[:, None], other=0, eviction_policy="evict_first")
        v = tl.load(keys + slots + stride_kv, mask=valid[:, None], other=0, eviction_policy="evict_first")
        if FP8:
            key_scale = next_key_scale
            value_scale = next_value_scale
            next_key_scale, next_value_scale = _scales(
                kv_scales, table, tokens + BLOCK_N, begin, end, kv_head, num_kv_heads, PAGE
            )
            scores = tl.dot(queries, _unpack(k, False, NATIVE).T)
            scores = tl.dot(odd_queries, _unpack(k, True, NATIVE).T, scores)
            scores *= ((key_scale.to(tl.int32) << 23).to(tl.float32, bitcast=True) * scale_log2)[None, :]
            # A value's scale goes into its weight, which so stays below one; the sum takes it out again.
            exponent = value_scale.to(tl.float32) - 127
            scores += exponent[None, :]
        else:
            scores = tl.dot(queries, k.T, input_precision="ieee") * scale_log2
        if MASKED:
            seen = valid[None, :] & (tokens[None, :] < sees[:, None]) & (tokens[None, :] >= sees[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        else:
            scores = tl.where(valid[None, :], scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - risen[:, None])
        shrink = tl.exp2(highest - risen)
        if FP8:
            total = total * shrink + tl.sum(weights * tl.exp2(-exponent)[None, :], 1)
            narrow = weights.to(tl.float16)
            mixed = tl.dot(narrow, _unpack(v, False, NATIVE), mixed * shrink[:, None])
            odd_mixed = tl.dot(narrow, _unpack(v, True, NATIVE), odd_mixed * shrink[:, None])
        else:
            total = total * shrink + tl.sum(weights, 1)
            mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        highest = risen

    _deliver(
        highest,
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
        num_seqs,
        num_queries,
        group,
        counters_at,
        HEAD_DIM,
        BLOCK_M,
        MERGES,
        ROWS,
        CHUNK,
    )


@triton.jit(do_not_specialize=["num_queries", "group", "tile", "places_at"])
def _combine(
    plan,
    out,
    partial,
    lse,
    num_queries,
    group,
    tile,
    places_at,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (kv head, sequence): `_merge` where the sequence has more than one item."""
    go(PDL)
    wait(PDL)
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    seq = tl.program_id(1)
    place = plan + places_at + seq * PLACES
    own_slot = tl.load(place)
    num_own = tl.load(place + 1)
    shared_slot = tl.load(place + 2)
    num_shared = tl.load(place + 3)
    if num_own + num_shared > 1:
        rows = num_queries * group
        merged = _merge(
            partial,
            lse,
            kv_head,
            num_kv_heads,
            rows,
            shared_slot,
            tile,
            num_shared,
            own_slot,
            num_own,
            HEAD_DIM,
            ROWS,
            CHUNK,
        )
        _write(out, merged, seq, kv_head, num_kv_heads, num_queries, group, HEAD_DIM, ROWS)


@dataclass(frozen=True)
class Config:
    """How an item is done."""

    block_n: int  # tokens per tile
    num_warps: int
    num_stages: int  # Triton halves it, as the page id's load comes before the page's: 5 gives 2 tiles in flight
    max_regs: int | None = None  # per thread, where the compiler would take more than lets programs share an SM


def pick(head_dim: int, itemsize: int, block_m: int) -> Config:
    """The configuration for `block_m` rows and a head of `head_dim` values of `itemsize` bytes in the cache."""
    if itemsize == 4:
        return Config({64: 32, 128: 16, 256: 16}[head_dim], 4 if block_m <= 64 else 8, 5)
    if block_m > 64 or (block_m == 64 and head_dim == 256):
        return Config({64: 64, 128: 64, 256: 32}[head_dim], 8, 5)
    if block_m == 64 and head_dim == 128:  # two programs per SM: 73 us at 64 sequences on 16384 tokens, with 7 100 us
        return Config(64, 4, 5)
    if itemsize == 1:
        wide = Config(128 if block_m == 16 else 64, 4, 7)
        return {64: Config(128, 4, 5), 128: wide, 256: Config(64, 4, 5)}[head_dim]
    # bench/sweeps/decode_attention.py on an H200, 16 rows: three tiles in flight; wide heads have room for two.
    return {64: Config(128, 4, 5), 128: Config(64, 4, 7), 256: Config(32, 4, 5)}[head_dim]


def configs(head_dim: int, itemsize: int, block_m: int = 16) -> list[Config]:
    """What a sweep tries for caches of 16 and 8 bits; the first is `pick`'s."""
    shipped = pick(head_dim, itemsize, block_m)
    n = shipped.block_n
    tried = [(n, 4, 5), (n, 4, 7), (n, 4, 9), (n // 2, 4, 7), (n // 2, 4, 9), (2 * n, 4, 5), (n, 8, 7), (2 * n, 8, 5)]
    return [shipped, *(c for c in (Config(*t) for t in tried) if c != shipped)]


def block_rows(num_rows: int, shares: bool) -> int:
    """Rows of the matrix product for sequences of `num_rows` query rows per kv head."""
    return max(TILE_ROWS if shares else 16, triton.next_power_of_2(num_rows))


def chunk(rows: int, head_dim: int) -> int:
    """Partial results merged at a time: as many as registers hold beside the sum."""
    return max(1, min(32, (8192 if rows <= 16 else 4096) // (rows * head_dim)))


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
    if plan is None:
        plan = plan_decode(kv_lens, prefixes, num_queries, num_heads, num_kv_heads, window)
    room = extent(num_seqs, num_queries, num_heads, num_kv_heads, prefixes is not None and not window)
    assert plan.shape[0] == room.length and plan.is_contiguous(), "the plan of another batch"
    num_rows = num_queries * group
    rows, block_m = triton.next_power_of_2(num_rows), block_rows(num_rows, room.shares)
    config = config or pick(head_dim, kv_pages.element_size(), block_m)
    partial = torch.empty((room.num_slots, num_heads * num_queries, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((room.num_slots, num_heads * num_queries), dtype=torch.float32, device=q.device)
    values = kv_pages if kv_scales is None else kv_pages.view(torch.uint16)
    merging = {"HEAD_DIM": head_dim, "ROWS": rows, "CHUNK": chunk(rows, head_dim)}
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
        PAGE=page_size,
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        MASKED=num_queries > 1 or window > 0 or room.shares,
        MERGES=not room.shares,
        FIELDS=FIELDS,
        NATIVE=machine.capability() >= 89 and not triton_interpret(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"maxnreg": config.max_regs} if config.max_regs and not triton_interpret() else {}),
        **merging,
        **overlap.launch(),
    )
    if room.shares:
        _combine[(num_kv_heads, num_seqs)](
            plan,
            out,
            partial,
            lse,
            num_queries,
            group,
            room.tile,
            room.places_at,
            PLACES=PLACES,
            num_warps=4,
            **merging,
            **overlap.launch(),
        )
    return out


def aot_of(
    head_dim: int,
    page_size: int,
    wants: tuple[str, ...],
    dtype: str = "*bf16",
    fp8=False,
    rows=4,
    shares=False,
    sinks=None,
) -> Aot:
    block_m = block_rows(rows, shares)
    config = pick(head_dim, 1 if fp8 else 4 if dtype == "*fp32" else 2, block_m)
    cache = {"kv_pages": "*u16", "kv_scales": "*u8"} if fp8 else {"kv_pages": dtype}
    ints = dict.fromkeys(("page_table", "kv_lens", "plan"), "*i32")
    strides = ("stride_q_token", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    signature = {"q": dtype, "out": dtype, **cache, **ints, "partial": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    numbers = ("num_queries", "group", "window", "counters_at", *strides, "stride_table")
    signature |= dict.fromkeys(numbers, "i32")
    constexprs: dict[str, Any] = {} if fp8 else {"kv_scales": None}
    if sinks:
        signature["sinks"] = sinks
    else:
        constexprs["sinks"] = None
    constexprs |= {"HEAD_DIM": head_dim, "PAGE": page_size, "BLOCK_M": block_m, "BLOCK_N": config.block_n}
    constexprs |= {"MASKED": shares or rows > 16, "MERGES": not shares, "ROWS": triton.next_power_of_2(rows)}
    constexprs |= {
        "CHUNK": chunk(triton.next_power_of_2(rows), head_dim),
        "FIELDS": FIELDS,
        "NATIVE": True,
        "PDL": True,
    }
    divisible = ("q", "kv_pages", "out", "partial", "lse", *strides, *(("kv_scales",) if fp8 else ()))
    return Aot(_attend, signature, constexprs, config.num_warps, config.num_stages, divisible, wants)


def _aot():
    packed = ("mma", "cp.async")
    for head_dim, page_size in ((128, 64), (128, 16), (128, 256), (64, 64), (256, 64), (256, 16)):
        yield aot_of(head_dim, page_size, packed)
        yield aot_of(head_dim, page_size, packed, fp8=True)
    yield aot_of(64, 64, packed, rows=8, sinks="*fp32")
    yield aot_of(128, 64, ("wgmma", "cp.async"), shares=True)
    yield aot_of(128, 64, ("wgmma", "cp.async"), shares=True, fp8=True)
    yield aot_of(128, 64, packed, rows=32)
    yield aot_of(128, 64, packed, rows=32, fp8=True)
    yield aot_of(128, 64, ("cp.async",), "*fp32")
    types = {"plan": "*i32", "out": "*bf16", "partial": "*fp32", "lse": "*fp32"}
    types |= dict.fromkeys(("num_queries", "group", "tile", "places_at"), "i32")
    constexprs = {"HEAD_DIM": 128, "ROWS": 4, "CHUNK": chunk(4, 128), "PLACES": PLACES, "PDL": True}
    yield Aot(_combine, types, constexprs, 4, 3, ("out", "partial", "lse"))


def _takes(case) -> bool:
    fits = case.head_dim in (64, 128, 256) and case.page_size % 16 == 0 and case.num_queries * case.group <= MAX_ROWS
    if case.kv_dtype == torch.float8_e4m3fn:
        return fits and case.dtype in (torch.bfloat16, torch.float16)
    return fits and case.group <= 16


@decode_attention.kernel(needs="sm80", when=_takes, aot=_aot)
def planned(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    return launch(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window)
