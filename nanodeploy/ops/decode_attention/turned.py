"""Decoding by the plan of plan_decode with the products turned: tokens are the rows, queries the columns. Gluon, sm_90.

A tensor core's product has 16 rows and 8 columns at the least. A kv head's few query rows fill the columns, so half of
planned.py's products, and half of its softmax and its registers, fall away. Each warp has tokens and a running softmax
of its own, merged once at an item's end; TMA brings the tiles. NOTES.md has the counts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanodeploy.ops import overlap
from nanodeploy.ops.decode_attention.planned import EVERYTHING, LOG2_E
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.plan_decode.reference import FIELDS, extent
from nanodeploy.ops.registry import Aot

FAR = gl.constexpr(1 << 30)  # rows of the descriptor's bounded axis
MERGED_AT_ONCE = 8  # partial results on their way at a time
NEVER = gl.constexpr(-1e30)  # below every score; finite, so that what saw nothing has a difference of 0 to itself


@gluon.jit
def _halves(pairs):
    """e4m3 values in fp16, of four in 32 bits (two neighbours of `pairs`, uint16): the first two, the last two.

    So of the neighbours j and j + 1 (j even), 2 values each, results hold values 2j, 2j + 1 and 2j + 2, 2j + 3.
    """
    return gl.inline_asm_elementwise(
        "{.reg .b16 a,b; mov.b32 {a,b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;}",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _firsts_and_seconds(pairs):
    """The first and the second e4m3 value of each pair in 16 bits, in fp16."""
    return gl.inline_asm_elementwise(
        "{.reg .b32 t; .reg .b16 a,b; prmt.b32 t, $2, 0, 0x3120; mov.b32 {a,b}, t; "
        "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;}",
        "=r,=r,r",
        [pairs],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def _turn(weights, OPERAND: gl.constexpr):
    """Weights [W, T, R] of 16 bits, as a product leaves them, as the right-hand side of the next one.

    Each block of 8 tokens by 8 rows is transposed across the warp's lanes by one instruction. What the registers then
    mean is said by the reshapes, which move nothing; no more does the last line, or it does not compile.
    """
    W: gl.constexpr = weights.shape[0]
    T: gl.constexpr = weights.shape[1]
    R: gl.constexpr = weights.shape[2]
    moved = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [weights], dtype=weights.dtype, is_pure=True, pack=2
    )
    blocks = moved.reshape((W, T // 8, 8, R // 8, 8)).permute((0, 1, 4, 3, 2)).reshape((W, T, R))
    return gl.convert_layout(blocks, OPERAND, assert_trivial=True)


@gluon.jit
def _bring(
    pages, table, k_ring, v_ring, full, stage, start, begin, end, kv_head,
    HEAD_BYTES: gl.constexpr, PAGE: gl.constexpr, TILE: gl.constexpr, COLUMNS: gl.constexpr,
):  # fmt: skip
    """Start copying the tile of tokens from `start` on, keys and values; rows past `end` become zeros."""
    BOX: gl.constexpr = PAGE if PAGE < TILE else TILE
    DOWN: gl.constexpr = TILE // BOX
    ACROSS: gl.constexpr = HEAD_BYTES // 2 // COLUMNS
    mbarrier.expect(full.index(stage), 2 * TILE * HEAD_BYTES)
    for down in gl.static_range(DOWN):
        first = start + down * BOX
        # The table holds garbage outside of the sequence: it is not read there, and no row of page 0 is copied.
        page = gl.load(table + first // PAGE, mask=(first < end) & (first + BOX > begin), other=0)
        valid = gl.minimum(gl.maximum(end - first, 0), BOX)
        valid = gl.where(first + BOX > begin, valid, 0)
        for part in gl.static_range(2):
            row = (page * 2 + part) * PAGE + first % PAGE
            for across in gl.static_range(ACROSS):
                if part == 0:
                    box = k_ring.index((stage * ACROSS + across) * DOWN + down)
                else:
                    box = v_ring.index((stage * ACROSS + across) * DOWN + down)
                tma.async_copy_global_to_shared(
                    pages,
                    [FAR, row + valid, FAR - valid, kv_head * (HEAD_BYTES // 2) + across * COLUMNS],
                    full.index(stage),
                    box._reinterpret(box.dtype, [1, 1, BOX, COLUMNS], pages.layout),
                )


@gluon.jit
def _scales(kv_scales, table, firsts, inside, begin, end, kv_head, num_kv_heads, PAGE: gl.constexpr):
    """The scale bytes of tokens firsts + inside, keys' and values'; what stands for 0 and 1 outside of begin to end.

    firsts [WARPS], multiples of inside's length, so that each warp's tokens lie in one page.
    """
    tokens = gl.expand_dims(firsts, 1) + inside
    valid = (tokens >= begin) & (tokens < end)
    page = gl.load(table + firsts // PAGE, mask=(firsts < end) & (firsts + inside.shape[1] > begin), other=0)
    at = (page.to(gl.int64) * 2 * num_kv_heads + kv_head) * PAGE + firsts % PAGE
    place = kv_scales + gl.expand_dims(at, 1) + inside
    return gl.load(place, mask=valid, other=0), gl.load(place + num_kv_heads * PAGE, mask=valid, other=127)


@gluon.jit
def _merge(
    partial, lse, kv_head, num_kv_heads, num_rows, own_slot, num_own,
    ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """The softmax-weighted mean [ROWS, HEAD_DIM] of one sequence's partial results, in their order."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    highest = gl.full([ROWS], NEVER, gl.float32, gl.SliceLayout(1, LAYOUT))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LAYOUT))
    mixed = gl.zeros([ROWS, HEAD_DIM], gl.float32, LAYOUT)
    for first in range(0, num_own, CHUNK):
        for i in gl.static_range(CHUNK):
            at = ((own_slot + first + i) * num_kv_heads + kv_head) * num_rows + rows
            there = (first + i < num_own) & (rows < num_rows)
            # Past the first-level cache, which may hold what lay here before.
            log = gl.load(lse + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            where = partial + gl.expand_dims(at.to(gl.int64) * HEAD_DIM, 1) + gl.expand_dims(dims, 0)
            result = gl.load(where, mask=gl.expand_dims(there, 1), other=0.0, cache_modifier=".cg")
            risen = gl.maximum(highest, log)
            weight = gl.exp2(log - risen)
            shrink = gl.exp2(highest - risen)
            total = total * shrink + weight
            mixed = mixed * gl.expand_dims(shrink, 1) + result * gl.expand_dims(weight, 1)
            highest = risen
    return mixed / gl.expand_dims(gl.where(total == 0, 1.0, total), 1)


@gluon.jit
def _write(
    out, result, seq, kv_head, num_kv_heads, num_queries, group,
    ROWS: gl.constexpr, HEAD_DIM: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store rows (query, head of the group) of one sequence."""
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, LAYOUT))
    token = seq.to(gl.int64) * num_queries + rows // group
    at = ((token * num_kv_heads + kv_head) * group + rows % group) * HEAD_DIM
    mask = gl.expand_dims(rows < num_queries * group, 1)
    gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(dims, 0), result.to(out.dtype.element_ty), mask=mask)


# One compilation for any batch and any slice of its rows.
@gluon.jit(
    do_not_specialize=["num_queries", "group", "window", "counters_at", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens"],
)
def _attend(
    q,
    pages,
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
    stride_table,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    WARPS: gl.constexpr,
    TOKENS: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    CHUNK: gl.constexpr,
    FIELDS: gl.constexpr,
    PDL: gl.constexpr,
):
    """Program (kv head, item). A tile is WARPS times TOKENS tokens; the first axis of everything that has three is the
    warps'. ROWS: columns of the products. MASKED: not every row sees every token of its item. Pages of fp8 come as
    pairs of values in 16 bits."""
    go(PDL)
    wait(PDL)
    FP8: gl.constexpr = kv_scales is not None
    WIDTH: gl.constexpr = HEAD_DIM // 2 if FP8 else HEAD_DIM  # elements of 16 bits
    TILE: gl.constexpr = WARPS * TOKENS
    COLUMNS: gl.constexpr = WIDTH if WIDTH < 64 else 64  # of one box: 128 bytes are as wide as the swizzle
    BOX: gl.constexpr = PAGE if PAGE < TILE else TILE
    BOXES: gl.constexpr = TILE // BOX * (WIDTH // COLUMNS)
    NUMBER: gl.constexpr = gl.float16 if FP8 else q.dtype.element_ty
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    BY_TOKEN: gl.constexpr = gl.SliceLayout(2, MMA)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, MMA)
    ALONG: gl.constexpr = HEAD_DIM // 4 if HEAD_DIM < 128 else 32  # of a warp's threads, 16 bytes each
    OUT: gl.constexpr = gl.BlockedLayout([1, 4], [32 // ALONG, ALONG], [WARPS, 1], [1, 0])
    SHARED: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS, 16, 2)
    SHARED3: gl.constexpr = gl.NVMMASharedLayout(2 * COLUMNS, 16, 3)
    kv_head = gl.program_id(0)
    num_kv_heads = gl.num_programs(0)
    item = plan + gl.program_id(1) * FIELDS
    if gl.load(item + 1) == 0:
        return
    seq = gl.load(item)
    begin = gl.load(item + 2)
    end = gl.load(item + 3)
    slot = gl.load(item + 4)
    own_slot = gl.load(item + 5)
    num_own = gl.load(item + 6)
    table = page_table + seq.to(gl.int64) * stride_table
    k_ring = gl.allocate_shared_memory(pages.dtype, [STAGES * BOXES, BOX, COLUMNS], SHARED)
    v_ring = gl.allocate_shared_memory(pages.dtype, [STAGES * BOXES, BOX, COLUMNS], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    aligned = begin // TILE * TILE
    num_tiles = (end - aligned + TILE - 1) // TILE
    for i in gl.static_range(STAGES):
        if i < num_tiles:
            _bring(
                pages, table, k_ring, v_ring, full, i, aligned + i * TILE, begin, end, kv_head,
                2 * WIDTH, PAGE, TILE, COLUMNS,
            )  # fmt: skip

    num_rows = num_queries * group
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(0, MMA)))
    columns = gl.arange(0, WIDTH, layout=gl.SliceLayout(1, gl.SliceLayout(0, MMA)))
    heads = kv_head * group + rows % group
    tokens_at = q + (seq.to(gl.int64) * num_queries + rows // group) * stride_q_token + heads * stride_q_head
    present = gl.expand_dims(rows < num_rows, 0)
    nobody = gl.zeros([WARPS, 1, 1], q.dtype.element_ty, MMA)
    if FP8:
        at = gl.expand_dims(tokens_at, 0) + gl.expand_dims(columns // 2 * 4 + columns % 2, 1)
        low = gl.load(at, mask=present, other=0.0)
        high = gl.load(at + 2, mask=present, other=0.0)
        queries = gl.convert_layout((gl.expand_dims(low, 0) + nobody).to(NUMBER), RIGHT)
        high_queries = gl.convert_layout((gl.expand_dims(high, 0) + nobody).to(NUMBER), RIGHT)
        high_mixed = gl.zeros([WARPS, WIDTH, ROWS], gl.float32, MMA)
    else:
        at = gl.expand_dims(tokens_at, 0) + gl.expand_dims(columns, 1)
        low = gl.load(at, mask=present, other=0.0)
        queries = gl.convert_layout(gl.expand_dims(low, 0) + nobody, RIGHT)
    mixed = gl.zeros([WARPS, WIDTH, ROWS], gl.float32, MMA)
    highest = gl.full([WARPS, ROWS], NEVER, gl.float32, BY_ROW)
    total = gl.zeros([WARPS, TOKENS, ROWS], gl.float32, MMA)
    firsts = aligned + gl.arange(0, WARPS, layout=gl.SliceLayout(1, BY_TOKEN)) * TOKENS
    inside = gl.expand_dims(gl.arange(0, TOKENS, layout=gl.SliceLayout(0, BY_TOKEN)), 0)
    if MASKED:
        kv_len = gl.load(kv_lens + seq)
        row_of = gl.arange(0, ROWS, layout=gl.SliceLayout(0, BY_ROW))
        sees = gl.expand_dims(gl.expand_dims(kv_len - num_queries + 1 + row_of // group, 0), 1)
    if FP8:  # one tile ahead
        next_k_scale, next_v_scale = _scales(kv_scales, table, firsts, inside, begin, end, kv_head, num_kv_heads, PAGE)
    keys = k_ring._reinterpret(pages.dtype, [STAGES, WARPS, TOKENS, WIDTH], SHARED3)
    values = v_ring._reinterpret(pages.dtype, [STAGES, WARPS, TOKENS, WIDTH], SHARED3)
    stage = 0
    phase = 0
    for i in range(num_tiles):
        tokens = gl.expand_dims(firsts, 1) + inside
        firsts += TILE
        valid = tokens < end
        if MASKED:
            valid = valid & (tokens >= begin)
        if FP8:
            k_scale = next_k_scale
            v_scale = next_v_scale
            next_k_scale, next_v_scale = _scales(
                kv_scales, table, firsts, inside, begin, end, kv_head, num_kv_heads, PAGE
            )
        mbarrier.wait(full.index(stage), phase)
        k = keys.index(stage).load(LEFT)
        scores = gl.zeros([WARPS, TOKENS, ROWS], gl.float32, MMA)
        if FP8:
            k_low, k_high = _halves(k)
            scores = mma_v2(k_low, queries, scores)
            scores = mma_v2(k_high, high_queries, scores)
            factor = (k_scale.to(gl.int32) << 23).to(gl.float32, bitcast=True) * scale_log2
            # A value's scale goes into its weight, which so stays below one; the sum takes it out again.
            exponent = v_scale.to(gl.float32) - 127
            scores = scores * gl.expand_dims(factor, 2) + gl.expand_dims(exponent, 2)
        else:
            scores = mma_v2(k, queries, scores) * scale_log2
        seen = gl.expand_dims(valid, 2)
        if MASKED:
            position = gl.expand_dims(tokens, 2)
            seen = seen & (position < sees) & (position >= sees - window)
        scores = gl.where(seen, scores, float("-inf"))
        risen = gl.maximum(highest, gl.max(scores, 1))
        shrink = gl.expand_dims(gl.exp2(highest - risen), 1)
        weights = gl.exp2(scores - gl.expand_dims(risen, 1))
        highest = risen
        packed = _turn(weights.to(NUMBER), RIGHT)
        v = values.index(stage).permute((0, 2, 1)).load(LEFT)
        if FP8:
            total = total * shrink + weights * gl.expand_dims(gl.exp2(-exponent), 2)
            first, second = _firsts_and_seconds(v)
            mixed = mma_v2(first, packed, mixed * shrink)
            high_mixed = mma_v2(second, packed, high_mixed * shrink)
        else:
            total = total * shrink + weights
            mixed = mma_v2(v, packed, mixed * shrink)
        gl.thread_barrier()  # all have read the tile
        if i + STAGES < num_tiles:
            _bring(
                pages, table, k_ring, v_ring, full, stage, aligned + (i + STAGES) * TILE, begin, end, kv_head,
                2 * WIDTH, PAGE, TILE, COLUMNS,
            )  # fmt: skip
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        phase = gl.where(stage == 0, phase ^ 1, phase)

    # The warps' results in one.
    top = gl.max(highest, 0)
    share = gl.exp2(highest - gl.expand_dims(top, 0))
    sum_total = gl.sum(gl.sum(total, 1) * share, 0)
    result = gl.sum(mixed * gl.expand_dims(share, 1), 0)  # [WIDTH, ROWS]
    if FP8:
        high_result = gl.sum(high_mixed * gl.expand_dims(share, 1), 0)
        result = gl.join(result, high_result).permute((1, 0, 2)).reshape((ROWS, HEAD_DIM))
    else:
        result = result.permute((1, 0))
    result = gl.convert_layout(result, OUT)
    top = gl.convert_layout(top, gl.SliceLayout(1, OUT))
    sum_total = gl.convert_layout(sum_total, gl.SliceLayout(1, OUT))
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    present = rows < num_rows
    if sinks is not None:
        if (slot < 0) | (slot == own_slot):  # one of the sequence's items brings the sink
            sink = gl.load(sinks + kv_head * group + rows % group, mask=present, other=0.0).to(gl.float32)
            sink = sink * 1.4426950408889634
            risen = gl.maximum(top, sink)
            shrink = gl.exp2(top - risen)
            sum_total = sum_total * shrink + gl.exp2(sink - risen)
            result = result * gl.expand_dims(shrink, 1)
            top = risen
    sum_total = gl.where(sum_total == 0, 1.0, sum_total)  # nothing seen: zeros
    result = result / gl.expand_dims(sum_total, 1)
    if slot < 0:
        _write(out, result, seq, kv_head, num_kv_heads, num_queries, group, ROWS, HEAD_DIM, OUT)
    else:
        place = (slot * num_kv_heads + kv_head) * num_rows + rows
        where = partial + gl.expand_dims(place.to(gl.int64) * HEAD_DIM, 1) + gl.expand_dims(dims, 0)
        gl.store(where, result, mask=gl.expand_dims(present, 1))
        gl.store(lse + place, top + gl.log2(sum_total), mask=present)
        gl.thread_barrier()  # all of this program's stores come before its arrival
        counter = plan + counters_at + seq * num_kv_heads + kv_head
        if gl.atomic_add(counter, 1, sem="acq_rel") == num_own - 1:
            merged = _merge(
                partial, lse, kv_head, num_kv_heads, num_rows, own_slot, num_own, ROWS, HEAD_DIM, OUT, CHUNK
            )
            _write(out, merged, seq, kv_head, num_kv_heads, num_queries, group, ROWS, HEAD_DIM, OUT)
            gl.store(counter, 0)  # for the next layer


@dataclass(frozen=True)
class Config:
    """How an item is done."""

    tokens: int  # of a warp's part of a tile
    num_warps: int
    stages: int  # tiles of keys and values that shared memory holds
    max_regs: int | None = None  # per thread, where the compiler would take more than lets programs share an SM


def pick(head_dim: int, itemsize: int, rows: int) -> Config:
    """The configuration for a head of `head_dim` values of `itemsize` bytes in the cache and `rows` columns."""
    if rows > 8:
        return Config(16, 4, 3 if head_dim * itemsize <= 128 else 2)
    if itemsize == 1:
        return {64: Config(32, 4, 3), 128: Config(16, 4, 3), 256: Config(16, 4, 2)}[head_dim]
    return {64: Config(32, 4, 2), 128: Config(16, 4, 2), 256: Config(16, 2, 2)}[head_dim]


def configs(head_dim: int, itemsize: int, rows: int = 8) -> list[Config]:
    """What a sweep tries; the first is `pick`'s."""
    shipped = pick(head_dim, itemsize, rows)
    tried = [(16, 4, 2), (16, 4, 3), (16, 4, 4), (32, 4, 2, 128), (16, 2, 3), (16, 2, 4), (32, 2, 2), (32, 2, 3)]
    fits = [c for c in (Config(*t) for t in tried) if ring_bytes(head_dim, itemsize, c) < 220 * 1024]
    return [shipped, *(c for c in fits if c != shipped)]


def ring_bytes(head_dim: int, itemsize: int, config: Config) -> int:
    return 2 * config.stages * config.tokens * config.num_warps * head_dim * itemsize


def columns_of(num_rows: int) -> int:
    """Columns of the products for sequences of `num_rows` query rows per kv head."""
    return 8 if num_rows <= 8 else 16


def box(head_dim: int, itemsize: int, page_size: int, config: Config) -> list[int]:
    """Rows and columns, of 16 bits, of one copy."""
    return [min(page_size, config.tokens * config.num_warps), min(64, head_dim * itemsize // 2)]


def describe(pages: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """The cache in elements of 16 bits as rows [P * 2 * page_size, K * E] for TMA, which can leave out a box's rows
    from any one on: see prefill_attention/warp_groups.py."""
    row = pages.shape[3] * pages.shape[4]
    shape, strides = [0x7FFF0000, 0x7FFF0000, FAR.value, row], [2**34 - row, row, row, 1]
    return TensorDescriptor(pages, shape, strides, [1, 1, rows, columns], gl.NVMMASharedLayout(2 * columns, 16, 4))


def launch(
    q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window, *, config: Config | None = None
):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = kv_lens.shape[0]
    assert q.stride(2) == 1 and kv_pages.is_contiguous() and page_table.stride(1) == 1 and kv_lens.is_contiguous()
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
    rows = columns_of(num_queries * group)
    config = config or pick(head_dim, kv_pages.element_size(), rows)
    partial = torch.empty((room.num_slots, num_heads * num_queries, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty((room.num_slots, num_heads * num_queries), dtype=torch.float32, device=q.device)
    values = kv_pages if kv_scales is None else kv_pages.view(torch.uint16)
    _attend[(num_kv_heads, room.num_items)](
        q,
        describe(values, *box(head_dim, kv_pages.element_size(), page_size, config)),
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
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        WARPS=config.num_warps,
        TOKENS=config.tokens,
        ROWS=rows,
        STAGES=config.stages,
        MASKED=num_queries > 1 or window > 0,
        CHUNK=MERGED_AT_ONCE,
        FIELDS=FIELDS,
        num_warps=config.num_warps,
        **({"maxnreg": config.max_regs} if config.max_regs else {}),
        **overlap.launch(),
    )
    return out


def aot_of(head_dim: int, page_size: int, fp8: bool, config: Config, rows: int = 4) -> Aot:
    itemsize = 1 if fp8 else 2
    shape = box(head_dim, itemsize, page_size, config)
    layout = gl.NVMMASharedLayout(2 * shape[1], 16, 4)
    signature = {"q": "*bf16", "pages": f"tensordesc<{'u16' if fp8 else 'bf16'}{[1, 1, *shape]},{layout!r}>"}
    signature |= {"kv_scales": "*u8"} if fp8 else {}
    signature |= dict.fromkeys(("page_table", "kv_lens", "plan"), "*i32")
    signature |= {"out": "*bf16", "partial": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    numbers = ("num_queries", "group", "window", "counters_at", "stride_q_token", "stride_q_head", "stride_table")
    signature |= dict.fromkeys(numbers, "i32")
    constexprs: dict[str, Any] = {"sinks": None} if fp8 else {"sinks": None, "kv_scales": None}
    constexprs |= {"HEAD_DIM": head_dim, "PAGE": page_size, "WARPS": config.num_warps, "TOKENS": config.tokens}
    constexprs |= {"ROWS": columns_of(rows), "STAGES": config.stages, "MASKED": rows > 4, "CHUNK": MERGED_AT_ONCE}
    constexprs |= {"FIELDS": FIELDS, "PDL": True}
    divisible = ("q", "out", "partial", "lse", "stride_q_token", "stride_q_head", *(("kv_scales",) if fp8 else ()))
    wants = ("mma", "tma", "movmatrix")
    return Aot(_attend, signature, constexprs, config.num_warps, 1, divisible, wants, maxnreg=config.max_regs)


def _aot():
    for head_dim, page_size in ((128, 64), (128, 256), (64, 64), (256, 64)):
        for fp8 in (False, True):
            yield aot_of(head_dim, page_size, fp8, pick(head_dim, 1 if fp8 else 2, 8))
    yield aot_of(128, 64, True, pick(128, 1, 16), rows=16)
    yield aot_of(128, 64, False, pick(128, 2, 16), rows=16)


def _takes(case) -> bool:
    num_rows = case.num_queries * case.group
    fits = (
        case.head_dim in (64, 128, 256) and case.page_size % 64 == 0 and num_rows <= (8 if case.head_dim == 256 else 16)
    )
    shares = case.has_prefixes and not case.window
    return fits and not shares and case.dtype in (torch.bfloat16, torch.float16)


@decode_attention.kernel(needs="sm90a", when=_takes, interpretable=False, aot=_aot)
def turned(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    return launch(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window)
