"""Causal attention by warp groups with roles (FlashAttention-3, arXiv:2407.08608), written in Gluon for sm_90 alone.

A program of three or four warp groups: one warp copies keys and values by TMA into a ring of shared memory, each other
warp group owns 64 packed rows and does the rest. A round of one of those multiplies its queries with tile i's keys and
tile i-1's weights with its values at the same time, and works out tile i's softmax while the second product runs.
Tiles of context are taken from the last to the first, so the masked ones come first. NOTES.md has the details.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanodeploy.ops import machine
from nanodeploy.ops.prefill_attention.reference import prefill_attention
from nanodeploy.ops.registry import Aot

LOG2_E = 1.4426950408889634
BOX = gl.constexpr(64)  # rows and columns of one TMA copy: 128 bytes wide, as the swizzle is
FAR = gl.constexpr(1 << 30)  # rows of the descriptor's bounded axis
LOWEST = gl.constexpr(
    -3.0e38
)  # a maximum before any score: finite, so that a tile without a visible score adds nothing


@gluon.jit
def _tile(
    item,
    cu_q_lens,
    group,
    num_tokens,
    num_seqs,
    num_tiles,
    num_items,
    BLOCK_M: gl.constexpr,
    BY_HEAD: gl.constexpr,
    WARPS: gl.constexpr,
):
    """Where work item `item` lies: kv head, sequence (-1 and num_seqs: padding), its first token and length, first row.

    Sequence s owns the tiles from cu_q_lens[s] * group // BLOCK_M + s + 1 on, which is always room enough. Every warp
    finds it by itself.
    """
    if BY_HEAD:
        kv_head = item // num_tiles
        tile_id = num_tiles - 1 - item % num_tiles
    else:
        num_kv_heads = num_items // num_tiles
        kv_head = item % num_kv_heads
        tile_id = num_tiles - 1 - item // num_kv_heads
    lanes = gl.arange(0, 128, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    seq = -1
    for first in range(0, num_seqs + 1, 128):
        seqs = first + lanes
        inside = seqs <= num_seqs
        starts = gl.load(cu_q_lens + seqs, mask=inside, other=0) * group // BLOCK_M + seqs + 1
        seq += gl.sum((inside & (starts <= tile_id)).to(gl.int32), 0)
    q_begin = gl.load(cu_q_lens + seq, mask=seq >= 0, other=0)
    q_end = gl.load(cu_q_lens + seq + 1, mask=seq < num_seqs, other=num_tokens)
    first_row = (tile_id - q_begin * group // BLOCK_M - seq - 1) * BLOCK_M
    return kv_head, seq, q_begin, q_end - q_begin, first_row


@gluon.jit
def _post(item, items, item_full, item_empty, taken):
    """Tell the consumers what comes next, as the `taken`-th item of this program."""
    slot = taken % 2
    mbarrier.wait(item_empty.index(slot), (taken // 2 & 1) ^ 1)
    items.index(slot).store(gl.full([1], item, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(item_full.index(slot), count=1)


@gluon.jit
def _take(items, item_full, item_empty, taken):
    slot = taken % 2
    mbarrier.wait(item_full.index(slot), taken // 2 & 1)
    item = gl.max(items.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(item_empty.index(slot), count=1)
    return item


@gluon.jit
def _page_ids(table, tile, kv_len, PAGE: gl.constexpr, BLOCK_N: gl.constexpr):
    """Pages of the tile's one or two boxes; past the end, where the table holds garbage, 0 unread."""
    start = tile * BLOCK_N
    first = gl.load(table + start // PAGE, mask=(tile >= 0) & (start < kv_len), other=0)
    second = first
    if BLOCK_N > BOX:
        second = gl.load(table + (start + BOX) // PAGE, mask=(tile >= 0) & (start + BOX < kv_len), other=0)
    return first, second


@gluon.jit
def _copy(
    pages,
    ids,
    ring,
    full,
    empty,
    count,
    tile,
    kv_len,
    kv_head,
    KV: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Copy one tile of keys (KV 0) or values (KV 1) into the ring, as its `count`-th; rows past kv_len become zeros."""
    stage = count % STAGES
    mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * HEAD_DIM * 2)
    DOWN: gl.constexpr = BLOCK_N // BOX
    ACROSS: gl.constexpr = HEAD_DIM // BOX
    for down in gl.static_range(DOWN):
        start = tile * BLOCK_N + down * BOX
        valid = gl.minimum(gl.maximum(kv_len - start, 0), BOX)
        row = (ids[down] * 2 + KV) * PAGE + start % PAGE
        for across in gl.static_range(ACROSS):
            box = ring.index((stage * ACROSS + across) * DOWN + down)
            tma.async_copy_global_to_shared(
                pages,
                [FAR, row + valid, FAR - valid, kv_head * HEAD_DIM + across * BOX],
                full.index(stage),
                box._reinterpret(box.dtype, [1, 1, BOX, BOX], pages.layout),
            )


@gluon.jit
def _produce(
    pages,
    page_table,
    kv_lens,
    cu_q_lens,
    group,
    num_tokens,
    num_seqs,
    num_tiles,
    num_items,
    stride_table,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    next_item,
    items,
    item_full,
    item_empty,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    BY_HEAD: gl.constexpr,
):
    """One warp: keys of tile i, then values of tile i + 1, in the order in which they are wanted."""
    done = 0
    taken = 0
    item = gl.program_id(0)
    _post(item, items, item_full, item_empty, taken)
    while item < num_items:
        kv_head, seq, _q_begin, q_len, first_row = _tile(
            item, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items, BLOCK_M, BY_HEAD, 1
        )
        if (seq >= 0) & (seq < num_seqs) & (first_row < q_len * group):
            kv_len = gl.load(kv_lens + seq)
            end = gl.minimum(kv_len - q_len + (first_row + BLOCK_M - 1) // group + 1, kv_len)
            count = (end + BLOCK_N - 1) // BLOCK_N
            table = page_table + seq.to(gl.int64) * stride_table
            ids = _page_ids(table, count - 1, kv_len, PAGE, BLOCK_N)
            _copy(
                pages, ids, k_ring, k_full, k_empty, done, count - 1, kv_len, kv_head, 0,
                HEAD_DIM, PAGE, BLOCK_N, STAGES,
            )  # fmt: skip
            for tile in range(count - 2, -2, -1):
                next_ids = _page_ids(table, tile, kv_len, PAGE, BLOCK_N)  # before the waits, which hide its latency
                if tile >= 0:
                    _copy(
                        pages, next_ids, k_ring, k_full, k_empty, done + 1, tile, kv_len, kv_head, 0,
                        HEAD_DIM, PAGE, BLOCK_N, STAGES,
                    )  # fmt: skip
                _copy(
                    pages, ids, v_ring, v_full, v_empty, done, tile + 1, kv_len, kv_head, 1,
                    HEAD_DIM, PAGE, BLOCK_N, STAGES,
                )  # fmt: skip
                ids = next_ids
                done += 1
        taken += 1
        item = gl.num_programs(0) + gl.atomic_add(next_item, 1, sem="relaxed")
        _post(item, items, item_full, item_empty, taken)


@gluon.jit
def _await_turn(turns, turn, TURNS: gl.constexpr, WHO: gl.constexpr):
    if TURNS:
        mbarrier.wait(turns.index(WHO), (turn & 1) ^ (WHO == 0))


@gluon.jit
def _pass_turn(turns, turn, TURNS: gl.constexpr, WHO: gl.constexpr, CONSUMERS: gl.constexpr):
    if TURNS:
        mbarrier.arrive(turns.index((WHO + 1) % CONSUMERS), count=1)
    return turn + 1


@gluon.jit
def _round(
    queries,
    keys,
    values,
    k_full,
    k_empty,
    v_full,
    v_empty,
    turns,
    done,
    turn,
    tile,
    weights,
    mixed,
    highest,
    total,
    limits,
    scale_log2,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
    WHO: gl.constexpr,
    WEIGHTS: gl.constexpr,
    MASK: gl.constexpr,
):
    """Scores and weights of `tile`, the `done`-th of the ring, and the tile before it added to `mixed`."""
    BLOCK_N: gl.constexpr = weights.shape[1]
    SCORES: gl.constexpr = weights.type.layout
    stage = done % STAGES
    stage_before = (done - 1) % STAGES
    mbarrier.wait(k_full.index(stage), done // STAGES & 1)
    _await_turn(turns, turn, TURNS, WHO)
    zeros = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
    scores = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    # Rounded only here: carried from round to round as 16-bit values, each would sit in a register of its own.
    packed = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
    mbarrier.wait(v_full.index(stage_before), (done - 1) // STAGES & 1)
    mixed = warpgroup_mma(packed, values.index(stage_before), mixed, is_async=True)
    turn = _pass_turn(turns, turn, TURNS, WHO, CONSUMERS)
    scores = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if MASK:
        columns = tile * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(gl.expand_dims(columns, 0) <= gl.expand_dims(limits, 1), scores, float("-inf"))
    risen = gl.maximum(highest, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(risen, 1))
    shrink = gl.exp2(highest - risen)
    total = total * shrink + gl.sum(weights, 1)
    # `packed` is named so that its registers are not reused while the product still reads them.
    mixed, packed = warpgroup_mma_wait(0, deps=[mixed, packed])
    mbarrier.arrive(v_empty.index(stage_before), count=1)
    mixed = mixed * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, mixed.type.layout)), 1)
    return weights, mixed, risen, total, turn


@gluon.jit
def _consume(
    q,
    kv_lens,
    cu_q_lens,
    out,
    scale_log2,
    group,
    num_tokens,
    num_seqs,
    num_tiles,
    num_items,
    stride_q_token,
    stride_q_head,
    q_tiles,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    items,
    item_full,
    item_empty,
    turns,
    HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
    BY_HEAD: gl.constexpr,
    WHO: gl.constexpr,
):
    """Warp group WHO: rows 64 * WHO to 64 * WHO + 63 of every tile of rows."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])  # 16 bytes a thread
    keys = k_ring._reinterpret(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], q_tiles.layout)
    values = v_ring._reinterpret(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], q_tiles.layout)
    queries = q_tiles.index(WHO)
    num_heads = num_items // num_tiles * group
    done = 0
    turn = 0
    taken = 0
    item = _take(items, item_full, item_empty, taken)
    while item < num_items:
        kv_head, seq, q_begin, q_len, first_row = _tile(
            item, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items, BLOCK_M, BY_HEAD, 4
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
                count = (end + BLOCK_N - 1) // BLOCK_N
                # Every row sees all of the tiles before `unmasked`.
                unmasked = gl.minimum((context + (first_row + WHO * 64) // group + 1) // BLOCK_N, count - 1)
                rows = first_row + WHO * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
                limits = gl.minimum(context + rows // group, kv_len - 1)  # the last position that each row sees

                stage = done % STAGES
                mbarrier.wait(k_full.index(stage), done // STAGES & 1)
                _await_turn(turns, turn, TURNS, WHO)
                zeros = gl.zeros([64, BLOCK_N], gl.float32, SCORES)
                scores = warpgroup_mma(queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
                turn = _pass_turn(turns, turn, TURNS, WHO, CONSUMERS)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                columns = (count - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
                scores = gl.where(gl.expand_dims(columns, 0) <= gl.expand_dims(limits, 1), scores, float("-inf"))
                highest = gl.maximum(gl.max(scores, 1) * scale_log2, LOWEST)
                weights = gl.exp2(scores * scale_log2 - gl.expand_dims(highest, 1))
                total = gl.sum(weights, 1)
                mixed = gl.zeros([64, HEAD_DIM], gl.float32, MIXED)
                for tile in range(count - 2, unmasked - 1, -1):
                    done += 1
                    weights, mixed, highest, total, turn = _round(
                        queries, keys, values, k_full, k_empty, v_full, v_empty, turns, done, turn, tile, weights,
                        mixed, highest, total, limits, scale_log2, STAGES, CONSUMERS, TURNS, WHO, WEIGHTS, True,
                    )  # fmt: skip
                for tile in range(unmasked - 1, -1, -1):
                    done += 1
                    weights, mixed, highest, total, turn = _round(
                        queries, keys, values, k_full, k_empty, v_full, v_empty, turns, done, turn, tile, weights,
                        mixed, highest, total, limits, scale_log2, STAGES, CONSUMERS, TURNS, WHO, WEIGHTS, False,
                    )  # fmt: skip
                stage = done % STAGES
                packed = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
                mbarrier.wait(v_full.index(stage), done // STAGES & 1)
                mixed = warpgroup_mma(packed, values.index(stage), mixed, is_async=True)
                mixed, packed = warpgroup_mma_wait(0, deps=[mixed, packed])
                mbarrier.arrive(v_empty.index(stage), count=1)
                done += 1
                inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, MIXED))
                queries.store((mixed * gl.expand_dims(inverse, 1)).to(DTYPE))  # through the queries' room: wide stores
                gl.store(where, queries.load(WIDE), mask=present)
        taken += 1
        item = _take(items, item_full, item_empty, taken)


# One compilation for any lengths and any slice of the batch's rows.
@gluon.jit(
    do_not_specialize=["group", "num_tokens", "num_seqs", "num_tiles", "num_items", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens", "cu_q_lens"],
)
def _attend(
    q,
    pages,
    page_table,
    kv_lens,
    cu_q_lens,
    next_item,
    out,
    scale_log2,
    group,
    num_tokens,
    num_seqs,
    num_tiles,
    num_items,
    stride_q_token,
    stride_q_head,
    stride_table,
    HEAD_DIM: gl.constexpr,
    PAGE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    TURNS: gl.constexpr,
    BY_HEAD: gl.constexpr,
    REGS: gl.constexpr,
):
    """A program takes item (tile of rows, kv head) after item, whoever is free the next; longest contexts first."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    BOXES: gl.constexpr = BLOCK_N // BOX * (HEAD_DIM // BOX)
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
    turns = item_full
    if TURNS:
        turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(CONSUMERS):
            mbarrier.init(turns.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(item_full.index(i), count=1)
        mbarrier.init(item_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items,
                        stride_q_token, stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                        items, item_full, item_empty, turns,
                        HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, TURNS, BY_HEAD, 0,
                    ),
                ),
                (
                    _consume,
                    (
                        q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items,
                        stride_q_token, stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                        items, item_full, item_empty, turns,
                        HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, TURNS, BY_HEAD, 1,
                    ),
                ),
                (
                    _produce,
                    (
                        pages, page_table, kv_lens, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items,
                        stride_table, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                        next_item, items, item_full, item_empty, HEAD_DIM, PAGE, BLOCK_M, BLOCK_N, STAGES, BY_HEAD,
                    ),
                ),
            ],
            [4, 1],
            [REGS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items,
                        stride_q_token, stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                        items, item_full, item_empty, turns,
                        HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, TURNS, BY_HEAD, 0,
                    ),
                ),
                (
                    _consume,
                    (
                        q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items,
                        stride_q_token, stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                        items, item_full, item_empty, turns,
                        HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, TURNS, BY_HEAD, 1,
                    ),
                ),
                (
                    _consume,
                    (
                        q, kv_lens, cu_q_lens, out, scale_log2, group, num_tokens, num_seqs, num_tiles, num_items,
                        stride_q_token, stride_q_head, q_tiles, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                        items, item_full, item_empty, turns,
                        HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, CONSUMERS, TURNS, BY_HEAD, 2,
                    ),
                ),
                (
                    _produce,
                    (
                        pages, page_table, kv_lens, cu_q_lens, group, num_tokens, num_seqs, num_tiles, num_items,
                        stride_table, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                        next_item, items, item_full, item_empty, HEAD_DIM, PAGE, BLOCK_M, BLOCK_N, STAGES, BY_HEAD,
                    ),
                ),
            ],
            [4, 4, 1],
            [REGS, REGS, 24],
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    block_n: int  # tokens of context per round
    stages: int  # tiles of keys, and as many of values, that shared memory holds
    consumers: int  # warp groups of 64 packed rows, 2 or 3
    turns: bool  # whether these take turns at the tensor cores
    persistent: bool = True  # one program per SM that takes many items, or one per item
    by_head: bool = False

    @property
    def threads(self) -> int:
        return 128 * (self.consumers + 1)

    @property
    def maxnreg(self) -> int:
        """Registers per thread at the start, before the warp groups share them out."""
        return 65536 // self.threads // 8 * 8

    @property
    def regs(self) -> int:
        """Registers per thread of a consumer; the producer gives all but 24 of its own away."""
        return min(240, (self.maxnreg * (self.consumers + 1) - 24) // self.consumers // 8 * 8)


def pick(head_dim: int) -> Config:
    return {64: Config(128, 2, 2, False), 128: Config(128, 2, 2, False), 256: Config(64, 2, 2, False)}[head_dim]


def configs() -> list[Config]:
    """What a sweep tries at head_dim 128; the first is `pick`'s."""
    return [
        pick(128),
        Config(128, 2, 2, True),
        Config(128, 2, 2, False, persistent=False),
        Config(64, 4, 2, False),
        Config(64, 4, 2, True),
        Config(64, 3, 3, False),
        Config(64, 3, 3, True),
    ]


def describe(kv_pages: Tensor) -> TensorDescriptor:
    """The cache as rows [P * 2 * page_size, K * E] for TMA, which can leave out a box's rows from any one on.

    TMA fills what lies outside an axis with zeros. The third axis ends at FAR; the first two only bring the address
    back, which wraps at 2**64 bytes (the idea is of triton.tools.ragged_tma): row r with `valid` rows from it on is
    (FAR, r + valid, FAR - valid).
    """
    row = kv_pages.shape[3] * kv_pages.shape[4]
    shape, strides = [0x7FFF0000, 0x7FFF0000, FAR.value, row], [2**34 - row, row, row, 1]
    return TensorDescriptor(kv_pages, shape, strides, [1, 1, BOX.value, BOX.value], gl.NVMMASharedLayout(128, 16, 4))


def launch(q, kv_pages, page_table, kv_lens, cu_q_lens, scale, config: Config):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = page_table.shape[0]
    group = num_heads // num_kv_heads
    assert q.stride(2) == 1 and kv_pages.is_contiguous() and page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    num_tiles = num_tokens * group // (64 * config.consumers) + num_seqs + 2
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
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        CONSUMERS=config.consumers,
        TURNS=config.turns,
        BY_HEAD=config.by_head,
        REGS=config.regs,
        num_warps=4,
        maxnreg=config.maxnreg,
    )
    return out


def aot_of(config: Config, head_dim: int, page_size: int, dtype: str = "bf16") -> Aot:
    pages = f"tensordesc<{dtype}[1, 1, {BOX.value}, {BOX.value}],{gl.NVMMASharedLayout(128, 16, 4)!r}>"
    pointers = {
        "q": f"*{dtype}",
        "pages": pages,
        "page_table": "*i32",
        "kv_lens": "*i32",
        "cu_q_lens": "*i32",
        "next_item": "*i32",
        "out": f"*{dtype}",
    }
    integers = ("group", "num_tokens", "num_seqs", "num_tiles", "num_items", "stride_q_token", "stride_q_head")
    constexprs = {"HEAD_DIM": head_dim, "PAGE": page_size, "BLOCK_N": config.block_n, "STAGES": config.stages}
    constexprs |= {"CONSUMERS": config.consumers, "TURNS": config.turns, "BY_HEAD": config.by_head, "REGS": config.regs}
    return Aot(
        _attend,
        {**pointers, "scale_log2": "fp32", **dict.fromkeys((*integers, "stride_table"), "i32")},
        constexprs,
        divisible=("q", "next_item", "out", "stride_q_token", "stride_q_head"),
        wants=("wgmma", "tma", "setmaxnreg"),
        max_spills=400,  # of what an item keeps for its end; ptxas puts none into the loop over full tiles
        maxnreg=config.maxnreg,
    )


def _aot():
    for head_dim, page_size in ((128, 64), (128, 256), (64, 64), (256, 64)):
        yield aot_of(pick(head_dim), head_dim, page_size)
    yield aot_of(pick(128), 128, 64, "fp16")


def _takes(case) -> bool:
    plain = not case.has_sinks and not case.window and not case.split_tokens
    pages = case.page_size % 64 == 0 and case.kv_dtype == case.dtype and case.dtype in (torch.bfloat16, torch.float16)
    return plain and pages and case.head_dim in (64, 128, 256) and case.group <= 16


@prefill_attention.kernel(needs="sm90a", when=_takes, batch_invariant=True, interpretable=False, aot=_aot)
def warp_groups(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens):
    return launch(q, kv_pages, page_table, kv_lens, cu_q_lens, scale, pick(q.shape[2]))
