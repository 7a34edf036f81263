"""Prefill for --deterministic by warp groups with roles: warp_groups.py in the order of ops/running_softmax.py.

A round is that of warp_groups.py, but tiles of context come from the first to the last, in stretches. Where one ends,
its state joins the sum of those before it, while the first scores of the next are worked out. Gives a token the bits
of fixed_order.py and of decode_attention's kernels of that order. Gluon, sm_90 alone.
"""

from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nanodeploy.ops import machine
from nanodeploy.ops.layouts import SPLIT_TOKENS
from nanodeploy.ops.prefill_attention.reference import prefill_attention
from nanodeploy.ops.prefill_attention.warp_groups import (
    BOX,
    LOG2_E,
    LOWEST,
    _copy,
    _page_ids,
    _post,
    _take,
    _tile,
    describe,
)
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import tile_tokens

TILE = gl.constexpr(64)  # tile_tokens of the head_dims that this kernel takes
CONSUMERS = gl.constexpr(2)
BLOCK_M = gl.constexpr(128)  # packed rows of an item, 64 for each consumer


@gluon.jit
def _produce(
    pages, page_table, kv_lens, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items, stride_table,
    k_ring, v_ring, k_full, k_empty, v_full, v_empty, next_item, items, item_full, item_empty,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: keys of tile i + 1, then values of tile i, in the order in which they are wanted."""
    done = 0
    taken = 0
    item = gl.program_id(0)
    _post(item, items, item_full, item_empty, taken)
    while item < num_items:
        kv_head, seq, _q_begin, q_len, first_row = _tile(
            item, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items, BLOCK_M, False, 1
        )
        if (seq >= 0) & (seq < num_seqs) & (first_row < q_len * group):
            kv_len = gl.load(kv_lens + seq)
            end = gl.minimum(kv_len - q_len + (first_row + BLOCK_M - 1) // group + 1, kv_len)
            count = (end + TILE - 1) // TILE
            table = page_table + seq.to(gl.int64) * stride_table
            ids = _page_ids(table, 0, kv_len, PAGE, TILE)
            _copy(pages, ids, k_ring, k_full, k_empty, done, 0, kv_len, kv_head, 0, HEAD_DIM, PAGE, TILE, STAGES)
            for tile in range(count):
                next_ids = _page_ids(table, tile + 1, kv_len, PAGE, TILE)  # before the waits, which hide its latency
                if tile + 1 < count:
                    _copy(
                        pages, next_ids, k_ring, k_full, k_empty, done + 1, tile + 1, kv_len, kv_head, 0,
                        HEAD_DIM, PAGE, TILE, STAGES,
                    )  # fmt: skip
                _copy(pages, ids, v_ring, v_full, v_empty, done, tile, kv_len, kv_head, 1, HEAD_DIM, PAGE, TILE, STAGES)
                ids = next_ids
                done += 1
        taken += 1
        item = gl.num_programs(0) + gl.atomic_add(next_item, 1, sem="relaxed")
        _post(item, items, item_full, item_empty, taken)


@gluon.jit
def _scores(queries, keys, k_full, done, STAGES: gl.constexpr, SCORES: gl.constexpr):
    """Begin the products of the queries with the ring's `done`-th tile of keys."""
    stage = done % STAGES
    mbarrier.wait(k_full.index(stage), done // STAGES & 1)
    zeros = gl.zeros([64, TILE], gl.float32, SCORES)
    return warpgroup_mma(queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _begin_values(values, v_full, done, weights, mixed, STAGES: gl.constexpr, WEIGHTS: gl.constexpr):
    """Begin adding the ring's `done`-th tile of values. Also returns the rounded weights, which it reads meanwhile."""
    stage = done % STAGES
    packed = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
    mbarrier.wait(v_full.index(stage), done // STAGES & 1)
    return warpgroup_mma(packed, values.index(stage), mixed, is_async=True), packed


@gluon.jit
def _weights(scores, highest, tile, unmasked, limits, scale_log2):
    """running_softmax.add_tile up to the weights: (maximum, weights, shrink of what is there, sum of the weights)."""
    SCORES: gl.constexpr = scores.type.layout
    if tile >= unmasked:
        columns = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(gl.expand_dims(columns, 0) <= gl.expand_dims(limits, 1), scores, float("-inf"))
    risen = gl.maximum(highest, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(gl.fma(scores, scale_log2, -gl.expand_dims(risen, 1)))
    # running_softmax.row_sums
    counts = (weights + 1.0).to(gl.int32, bitcast=True) - 0x3F800000
    return risen, weights, gl.exp2(highest - risen), gl.sum(counts, 1).to(gl.float32) * 1.1920928955078125e-07


@gluon.jit
def _add_stretch(all_highest, all_total, all_mixed, highest, total, mixed):
    """running_softmax.add_stretch; nothing is (LOWEST, 0, 0)."""
    MIXED: gl.constexpr = gl.SliceLayout(1, mixed.type.layout)
    risen = gl.maximum(all_highest, highest)
    shrink, weight = gl.exp2(all_highest - risen), gl.exp2(highest - risen)
    wide_shrink = gl.expand_dims(gl.convert_layout(shrink, MIXED), 1)
    wide_weight = gl.expand_dims(gl.convert_layout(weight, MIXED), 1)
    all_total = gl.fma(total, weight, all_total * shrink)
    return risen, all_total, gl.fma(mixed, wide_weight, all_mixed * wide_shrink)


@gluon.jit
def _consume(
    q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items, stride_q_token,
    stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty, items, item_full, item_empty,
    HEAD_DIM: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Warp group WHO: rows 64 * WHO to 64 * WHO + 63 of every tile of rows."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])  # 16 bytes a thread
    ROW: gl.constexpr = gl.SliceLayout(1, SCORES)
    PER_STRETCH: gl.constexpr = SPLIT // TILE
    keys = k_ring._reinterpret(DTYPE, [STAGES, TILE, HEAD_DIM], q_tiles.layout)
    values = v_ring._reinterpret(DTYPE, [STAGES, TILE, HEAD_DIM], q_tiles.layout)
    queries = q_tiles.index(WHO)
    num_heads = num_items // num_tiles * group
    done = 0
    taken = 0
    item = _take(items, item_full, item_empty, taken)
    while item < num_items:
        kv_head, seq, q_begin, q_len, first_row = _tile(
            item, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items, BLOCK_M, False, 4
        )
        if first_row < q_len * group:
            wide_rows = first_row + WHO * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
            dims = gl.expand_dims(gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, WIDE)), 0)
            present = gl.expand_dims(wide_rows < q_len * group, 1)
            tokens = (q_begin + wide_rows // group).to(gl.int64)
            heads = kv_head * group + wide_rows % group
            where = out + gl.expand_dims((tokens * num_heads + heads) * HEAD_DIM, 1) + dims
            if (seq < 0) | (seq == num_seqs):
                gl.store(where, gl.zeros([64, HEAD_DIM], DTYPE, WIDE), mask=present)
            else:
                from_q = q + gl.expand_dims(tokens * stride_q_token + heads * stride_q_head, 1) + dims
                queries.store(gl.load(from_q, mask=present, other=0.0))
                fence_async_shared()
                gl.thread_barrier()
                kv_len = gl.load(kv_lens + seq)
                context = kv_len - q_len
                end = gl.minimum(context + (first_row + BLOCK_M - 1) // group + 1, kv_len)
                count = (end + TILE - 1) // TILE
                unmasked = (context + (first_row + WHO * 64) // group + 1) // TILE  # every row sees all tiles before it
                rows = first_row + WHO * 64 + gl.arange(0, 64, layout=ROW)
                limits = gl.minimum(context + rows // group, kv_len - 1)  # the last position that each row sees

                nothing = gl.full([64], LOWEST, gl.float32, ROW)
                all_highest = nothing
                all_total = gl.zeros([64], gl.float32, ROW)
                all_mixed = gl.zeros([64, HEAD_DIM], gl.float32, MIXED)
                scores = _scores(queries, keys, k_full, done, STAGES, SCORES)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.arrive(k_empty.index(done % STAGES), count=1)
                highest, weights, shrink, total = _weights(scores, nothing, 0, unmasked, limits, scale_log2)
                mixed = gl.zeros([64, HEAD_DIM], gl.float32, MIXED)
                for first in range(0, count, PER_STRETCH):
                    # The stretch's first tile has its weights already; what they weigh is not added yet.
                    for tile in range(first + 1, gl.minimum(first + PER_STRETCH, count)):
                        scores = _scores(queries, keys, k_full, done + 1, STAGES, SCORES)
                        mixed, packed = _begin_values(values, v_full, done, weights, mixed, STAGES, WEIGHTS)
                        scores = warpgroup_mma_wait(1, deps=[scores])
                        mbarrier.arrive(k_empty.index((done + 1) % STAGES), count=1)
                        highest, weights, shrink, sums = _weights(scores, highest, tile, unmasked, limits, scale_log2)
                        total = gl.fma(total, shrink, sums)
                        mixed, packed = warpgroup_mma_wait(0, deps=[mixed, packed])
                        mbarrier.arrive(v_empty.index(done % STAGES), count=1)
                        mixed = mixed * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, MIXED)), 1)
                        done += 1
                    if first + PER_STRETCH < count:
                        scores = _scores(queries, keys, k_full, done + 1, STAGES, SCORES)
                        mixed, packed = _begin_values(values, v_full, done, weights, mixed, STAGES, WEIGHTS)
                        scores = warpgroup_mma_wait(1, deps=[scores])
                        mbarrier.arrive(k_empty.index((done + 1) % STAGES), count=1)
                        next_highest, weights, shrink, sums = _weights(
                            scores, nothing, first + PER_STRETCH, unmasked, limits, scale_log2
                        )
                        mixed, packed = warpgroup_mma_wait(0, deps=[mixed, packed])
                        mbarrier.arrive(v_empty.index(done % STAGES), count=1)
                        all_highest, all_total, all_mixed = _add_stretch(
                            all_highest, all_total, all_mixed, highest, total, mixed
                        )
                        highest = next_highest
                        total = sums
                        mixed = gl.zeros([64, HEAD_DIM], gl.float32, MIXED)
                        done += 1
                mixed, packed = _begin_values(values, v_full, done, weights, mixed, STAGES, WEIGHTS)
                mixed, packed = warpgroup_mma_wait(0, deps=[mixed, packed])
                mbarrier.arrive(v_empty.index(done % STAGES), count=1)
                done += 1
                all_highest, all_total, all_mixed = _add_stretch(
                    all_highest, all_total, all_mixed, highest, total, mixed
                )
                wide_total = gl.expand_dims(gl.convert_layout(all_total, gl.SliceLayout(1, MIXED)), 1)
                queries.store((all_mixed / wide_total).to(DTYPE))  # through the queries' room: wide stores
                gl.store(where, queries.load(WIDE), mask=present)
        taken += 1
        item = _take(items, item_full, item_empty, taken)


# One compilation for any lengths and any slice of the batch's rows.
@gluon.jit(
    do_not_specialize=["group", "num_tokens", "num_seqs", "num_tiles", "num_items", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens", "cu_q_lens"],
)
def _attend(
    q, pages, page_table, kv_lens, cu_q_lens, next_item, out, scale_log2, group, num_tokens, num_seqs, num_tiles,
    num_items, stride_q_token, stride_q_head, stride_table,
    HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr, STAGES: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """A program takes item (tile of rows, kv head) after item, whoever is free the next; longest contexts first."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    BOXES: gl.constexpr = HEAD_DIM // BOX
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, HEAD_DIM], SHARED)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, BOX, BOX], SHARED)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES * BOXES, BOX, BOX], SHARED)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    items = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    item_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    item_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items,
                    stride_q_token, stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                    items, item_full, item_empty, HEAD_DIM, SPLIT, STAGES, 0,
                ),
            ),
            (
                _consume,
                (
                    q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items,
                    stride_q_token, stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                    items, item_full, item_empty, HEAD_DIM, SPLIT, STAGES, 1,
                ),
            ),
            (
                _produce,
                (
                    pages, page_table, kv_lens, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items,
                    stride_table, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                    next_item, items, item_full, item_empty, HEAD_DIM, PAGE, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    stages: int  # tiles of keys, and as many of values, that shared memory holds
    persistent: bool  # one program per SM that takes many items, or one per item


MAX_REGS = 168  # per thread at the start; the consumers take 240, of which the producer leaves 24


def pick(head_dim: int) -> Config:
    return Config(4, False)


def configs(head_dim: int) -> list[Config]:
    """What a sweep tries; the first is `pick`'s."""
    return [pick(head_dim), Config(4, True), Config(3, False)]


def launch(q, kv_pages, page_table, kv_lens, cu_q_lens, scale, split_tokens, config: Config):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = page_table.shape[0]
    group = num_heads // num_kv_heads
    assert q.stride(2) == 1 and kv_pages.is_contiguous() and page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous() and tile_tokens(head_dim) == TILE.value
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    num_tiles = num_tokens * group // BLOCK_M.value + num_seqs + 2
    num_items = num_tiles * num_kv_heads
    _attend[(min(num_items, machine.num_sms()) if config.persistent else num_items,)](
        q,
        describe(kv_pages),
        page_table,
        kv_lens,
        cu_q_lens,
        torch.zeros(1, dtype=torch.int32, device=q.device),
        out,
        scale * LOG2_E,
        group,
        num_tokens,
        num_seqs,
        num_tiles,
        num_items,
        *q.stride()[:2],
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        SPLIT=split_tokens,
        STAGES=config.stages,
        REGS=240,
        num_warps=4,
        maxnreg=MAX_REGS,
        enable_fp_fusion=False,  # every fused multiply-add is written out: none is left to the compiler
    )
    return out


def aot_of(config: Config, head_dim: int, page_size: int) -> Aot:
    pages = f"tensordesc<bf16[1, 1, {BOX.value}, {BOX.value}],{gl.NVMMASharedLayout(128, 16, 4)!r}>"
    signature = {"q": "*bf16", "pages": pages, "page_table": "*i32", "kv_lens": "*i32", "cu_q_lens": "*i32"}
    signature |= {"next_item": "*i32", "out": "*bf16", "scale_log2": "fp32"}
    integers = ("group", "num_tokens", "num_seqs", "num_tiles", "num_items", "stride_q_token", "stride_q_head")
    constexprs = {"HEAD_DIM": head_dim, "PAGE": page_size, "SPLIT": SPLIT_TOKENS, "STAGES": config.stages, "REGS": 240}
    return Aot(
        _attend,
        signature | dict.fromkeys((*integers, "stride_table"), "i32"),
        constexprs,
        divisible=("q", "next_item", "out", "stride_q_token", "stride_q_head"),
        wants=("wgmma", "tma", "setmaxnreg"),
        max_spills=400,  # of what an item keeps for its end
        maxnreg=MAX_REGS,
    )


def _aot():
    for head_dim, page_size in ((128, 64), (128, 256), (64, 64)):
        yield aot_of(pick(head_dim), head_dim, page_size)


def _takes(case) -> bool:
    plain = not case.has_sinks and not case.window and case.split_tokens > 0 and case.split_tokens % TILE.value == 0
    pages = case.page_size % 64 == 0 and case.kv_dtype == case.dtype and case.dtype in (torch.bfloat16, torch.float16)
    return plain and pages and case.head_dim in (64, 128) and case.group <= 16


@prefill_attention.kernel(
    needs="sm90a", when=_takes, batch_invariant=True, order="stretches", interpretable=False, aot=_aot
)
def stretch_groups(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens):
    return launch(q, kv_pages, page_table, kv_lens, cu_q_lens, scale, split_tokens, pick(q.shape[2]))
