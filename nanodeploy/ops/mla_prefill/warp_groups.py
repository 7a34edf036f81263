"""Expanded, with attention by warp groups that have roles (FlashAttention-3, arXiv:2407.08608): Gluon, sm_90 alone.

Gathering and making keys and values is expanded.py's; the loop is that of prefill_attention/warp_groups, where it is
explained. Here every head has keys of its own, in slices of 64 columns of which the last are the rotated keys that all
heads share, and a program's next item is the same head's: its keys and values stay in the L2 cache.
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
from nanodeploy.ops.mla_prefill.absorbed import expandable
from nanodeploy.ops.mla_prefill.expanded import launch
from nanodeploy.ops.mla_prefill.reference import mla_prefill
from nanodeploy.ops.mla_prefill.tokens import Gathered
from nanodeploy.ops.prefill_attention.warp_groups import LOWEST, _post, _take, _tile
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E

CONSUMERS = gl.constexpr(2)  # warp groups of 64 tokens
SLICE = gl.constexpr(64)  # columns of one TMA copy: 128 bytes, as the swizzle is wide
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _produce(
    keys,
    values,
    rotated_keys,
    kv_lens,
    cu_q_lens,
    starts,
    num_tokens,
    num_seqs,
    num_tiles,
    num_items,
    num_rows,
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
    NOPE: gl.constexpr,
    VALUE: gl.constexpr,
    RANK: gl.constexpr,
    R: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One warp: keys of tile i, then values of tile i + 1, in the order in which they are wanted."""
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    SLICES: gl.constexpr = (NOPE + R) // SLICE
    V_SLICES: gl.constexpr = VALUE // SLICE
    done = 0
    taken = 0
    item = gl.program_id(0)
    _post(item, items, item_full, item_empty, taken)
    while item < num_items:
        head, seq, _q_begin, q_len, first_row = _tile(
            item, cu_q_lens, 1, num_tokens, num_seqs, num_tiles, num_items, BLOCK_M, True, 1
        )
        if (seq >= 0) & (seq < num_seqs) & (first_row < q_len):
            kv_len = gl.load(kv_lens + seq)
            end = gl.minimum(kv_len - q_len + first_row + BLOCK_M, kv_len)
            count = (end + BLOCK_N - 1) // BLOCK_N
            start_row = gl.load(starts + seq)
            for tile in range(count - 1, -2, -1):
                if tile >= 0:
                    stage = done % STAGES
                    row = start_row + tile * BLOCK_N
                    mbarrier.wait(k_empty.index(stage), (done // STAGES & 1) ^ 1)
                    mbarrier.expect(k_full.index(stage), BLOCK_N * (NOPE + R) * 2)
                    for part in gl.static_range(SLICES):
                        to = k_ring.index(stage * SLICES + part)
                        if part * SLICE < NOPE:
                            at = [head * num_rows + row, part * SLICE]
                            tma.async_copy_global_to_shared(keys, at, k_full.index(stage), to)
                        else:
                            at = [row, RANK + part * SLICE - NOPE]
                            tma.async_copy_global_to_shared(rotated_keys, at, k_full.index(stage), to)
                if tile < count - 1:
                    before = done - 1
                    stage = before % STAGES
                    row = head * num_rows + start_row + (tile + 1) * BLOCK_N
                    mbarrier.wait(v_empty.index(stage), (before // STAGES & 1) ^ 1)
                    mbarrier.expect(v_full.index(stage), BLOCK_N * VALUE * 2)
                    for part in gl.static_range(V_SLICES):
                        to = v_ring.index(stage * V_SLICES + part)
                        tma.async_copy_global_to_shared(values, [row, part * SLICE], v_full.index(stage), to)
                done += 1
            done -= 1
        taken += 1
        item = gl.num_programs(0) + gl.atomic_add(next_item, 1, sem="relaxed")
        _post(item, items, item_full, item_empty, taken)


@gluon.jit
def _scores(q_first, q_rest, k_ring, stage, SLICES: gl.constexpr, FIRST: gl.constexpr, BLOCK_N: gl.constexpr):
    """The queries' products with one tile of keys: issued, not waited for."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    scores = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    for part in gl.static_range(SLICES):
        keys = k_ring.index(stage * SLICES + part).permute((1, 0))
        if part < FIRST:
            scores = warpgroup_mma(q_first.index(part), keys, scores, use_acc=part > 0, is_async=True)
        else:
            scores = warpgroup_mma(q_rest.index(part - FIRST), keys, scores, use_acc=part > 0, is_async=True)
    return scores


@gluon.jit
def _round(
    q_first,
    q_rest,
    k_ring,
    values,
    k_full,
    k_empty,
    v_full,
    v_empty,
    done,
    tile,
    weights,
    mixed,
    highest,
    total,
    limits,
    scale_log2,
    SLICES: gl.constexpr,
    FIRST: gl.constexpr,
    STAGES: gl.constexpr,
    WEIGHTS: gl.constexpr,
    MASK: gl.constexpr,
):
    """Scores and weights of `tile`, the `done`-th of the ring, and the tile before it added to `mixed`."""
    BLOCK_N: gl.constexpr = weights.shape[1]
    SCORES: gl.constexpr = weights.type.layout
    stage = done % STAGES
    stage_before = (done - 1) % STAGES
    mbarrier.wait(k_full.index(stage), done // STAGES & 1)
    scores = _scores(q_first, q_rest, k_ring, stage, SLICES, FIRST, BLOCK_N)
    # Rounded only here: carried from round to round as 16-bit values, each would sit in a register of its own.
    packed = gl.convert_layout(weights.to(values.dtype), WEIGHTS)
    mbarrier.wait(v_full.index(stage_before), (done - 1) // STAGES & 1)
    mixed = warpgroup_mma(packed, values.index(stage_before), mixed, is_async=True)
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
    return weights, mixed, risen, total


@gluon.jit
def _load_queries(to, q, at, present, column):
    """64 columns of this warp group's queries, from `column` on, into shared memory."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])  # 16 bytes a thread
    columns = gl.expand_dims(column + gl.arange(0, 64, layout=gl.SliceLayout(0, WIDE)), 0)
    values = gl.load(q + gl.expand_dims(at, 1) + columns, mask=gl.expand_dims(present, 1), other=0.0)
    to.store(values)


@gluon.jit
def _consume(
    q_nope,
    q_rope,
    kv_lens,
    cu_q_lens,
    out,
    scale_log2,
    num_tokens,
    num_seqs,
    num_tiles,
    num_items,
    num_heads,
    first_head,
    stride_q,
    stride_q_head,
    stride_rope,
    stride_rope_head,
    q_tiles,
    q_rests,
    k_ring,
    v_ring,
    k_full,
    k_empty,
    v_full,
    v_empty,
    items,
    item_full,
    item_empty,
    NOPE: gl.constexpr,
    VALUE: gl.constexpr,
    R: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    WHO: gl.constexpr,
):
    """Warp group WHO: tokens 64 * WHO to 64 * WHO + 63 of every tile."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    BLOCK_M: gl.constexpr = 64 * CONSUMERS
    SLICES: gl.constexpr = (NOPE + R) // SLICE
    FIRST: gl.constexpr = VALUE // SLICE  # slices of queries that lie where the results will
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, MIXED, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // VALUE, VALUE // 8], [4, 1], [1, 0])  # 16 bytes a thread
    result = q_tiles.index(WHO)
    q_first = result._reinterpret(DTYPE, [FIRST, 64, SLICE], SWIZZLED)
    q_rest = q_rests.index(WHO)._reinterpret(DTYPE, [q_rests.shape[1] // 64, 64, SLICE], SWIZZLED)
    values = v_ring._reinterpret(DTYPE, [STAGES, BLOCK_N, VALUE], SWIZZLED)
    done = 0
    taken = 0
    item = _take(items, item_full, item_empty, taken)
    while item < num_items:
        head, seq, q_begin, q_len, first_row = _tile(
            item, cu_q_lens, 1, num_tokens, num_seqs, num_tiles, num_items, BLOCK_M, True, 4
        )
        if first_row < q_len:
            head += first_head
            wide_rows = first_row + WHO * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
            dims = gl.expand_dims(gl.arange(0, VALUE, layout=gl.SliceLayout(0, WIDE)), 0)
            there = gl.expand_dims(wide_rows < q_len, 1)
            where = out + gl.expand_dims(((q_begin + wide_rows).to(gl.int64) * num_heads + head) * VALUE, 1) + dims
            if (seq < 0) | (seq == num_seqs):
                gl.store(where, gl.zeros([64, VALUE], DTYPE, WIDE), mask=there)
            else:
                rows = first_row + WHO * 64 + gl.arange(0, 64, layout=ROW)
                tokens = (q_begin + rows).to(gl.int64)
                nope_at, rope_at = tokens * stride_q + head * stride_q_head, tokens * stride_rope
                rope_at += head * stride_rope_head
                gl.thread_barrier()  # the results of the item before have left this room
                for part in gl.static_range(SLICES):
                    to = q_first.index(part) if part < FIRST else q_rest.index(part - FIRST)
                    if part * SLICE < NOPE:
                        _load_queries(to, q_nope, nope_at, rows < q_len, part * SLICE)
                    else:
                        _load_queries(to, q_rope, rope_at, rows < q_len, part * SLICE - NOPE)
                fence_async_shared()
                gl.thread_barrier()
                kv_len = gl.load(kv_lens + seq)
                context = kv_len - q_len
                end = gl.minimum(context + first_row + BLOCK_M, kv_len)
                count = (end + BLOCK_N - 1) // BLOCK_N
                # Every row sees all of the tiles before `unmasked`.
                unmasked = gl.minimum((context + first_row + WHO * 64 + 1) // BLOCK_N, count - 1)
                rows = first_row + WHO * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
                limits = gl.minimum(context + rows, kv_len - 1)  # the last position that each row sees

                stage = done % STAGES
                mbarrier.wait(k_full.index(stage), done // STAGES & 1)
                scores = _scores(q_first, q_rest, k_ring, stage, SLICES, FIRST, BLOCK_N)
                scores = warpgroup_mma_wait(0, deps=[scores])
                mbarrier.arrive(k_empty.index(stage), count=1)
                columns = (count - 1) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, SCORES))
                scores = gl.where(gl.expand_dims(columns, 0) <= gl.expand_dims(limits, 1), scores, float("-inf"))
                highest = gl.maximum(gl.max(scores, 1) * scale_log2, LOWEST)
                weights = gl.exp2(scores * scale_log2 - gl.expand_dims(highest, 1))
                total = gl.sum(weights, 1)
                mixed = gl.zeros([64, VALUE], gl.float32, MIXED)
                for tile in range(count - 2, unmasked - 1, -1):
                    done += 1
                    weights, mixed, highest, total = _round(
                        q_first, q_rest, k_ring, values, k_full, k_empty, v_full, v_empty, done, tile, weights,
                        mixed, highest, total, limits, scale_log2, SLICES, FIRST, STAGES, WEIGHTS, True,
                    )  # fmt: skip
                for tile in range(unmasked - 1, -1, -1):
                    done += 1
                    weights, mixed, highest, total = _round(
                        q_first, q_rest, k_ring, values, k_full, k_empty, v_full, v_empty, done, tile, weights,
                        mixed, highest, total, limits, scale_log2, SLICES, FIRST, STAGES, WEIGHTS, False,
                    )  # fmt: skip
                stage = done % STAGES
                packed = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
                mbarrier.wait(v_full.index(stage), done // STAGES & 1)
                mixed = warpgroup_mma(packed, values.index(stage), mixed, is_async=True)
                mixed, packed = warpgroup_mma_wait(0, deps=[mixed, packed])
                mbarrier.arrive(v_empty.index(stage), count=1)
                done += 1
                inverse = gl.convert_layout(1.0 / total, gl.SliceLayout(1, MIXED))
                result.store((mixed * gl.expand_dims(inverse, 1)).to(DTYPE))  # through the queries' room: wide stores
                gl.store(where, result.load(WIDE), mask=there)
        taken += 1
        item = _take(items, item_full, item_empty, taken)


# One compilation for any lengths and any slice of the batch's rows.
@gluon.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_tiles", "num_items", "num_rows", "num_heads", "first_head"],
    do_not_specialize_on_alignment=["kv_lens", "cu_q_lens"],
)
def _attend(
    q_nope,
    q_rope,
    keys,
    values,
    rotated_keys,
    kv_lens,
    cu_q_lens,
    starts,
    next_item,
    out,
    scale_log2,
    num_tokens,
    num_seqs,
    num_tiles,
    num_items,
    num_rows,
    num_heads,
    first_head,
    stride_q,
    stride_q_head,
    stride_rope,
    stride_rope_head,
    NOPE: gl.constexpr,
    VALUE: gl.constexpr,
    RANK: gl.constexpr,
    R: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGS: gl.constexpr,
):
    """A program takes item (tile of tokens, head) after item, whoever is free the next; longest contexts first.

    keys [heads * num_rows, NOPE], values [heads * num_rows, VALUE], rotated_keys [num_rows, RANK + R] for TMA.
    """
    DTYPE: gl.constexpr = out.dtype.element_ty
    SLICES: gl.constexpr = (NOPE + R) // SLICE
    REST: gl.constexpr = gl.constexpr(64 * max(SLICES - VALUE // SLICE, 1))
    q_tiles = gl.allocate_shared_memory(DTYPE, [CONSUMERS, 64, VALUE], SWIZZLED)
    q_rests = gl.allocate_shared_memory(DTYPE, [CONSUMERS, REST, SLICE], SWIZZLED)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES * SLICES, BLOCK_N, SLICE], SWIZZLED)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES * (VALUE // SLICE), BLOCK_N, SLICE], SWIZZLED)
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
                    q_nope, q_rope, kv_lens, cu_q_lens, out, scale_log2, num_tokens, num_seqs, num_tiles, num_items,
                    num_heads, first_head, stride_q, stride_q_head, stride_rope, stride_rope_head, q_tiles, q_rests,
                    k_ring, v_ring, k_full, k_empty, v_full, v_empty, items, item_full, item_empty,
                    NOPE, VALUE, R, BLOCK_N, STAGES, 0,
                ),
            ),
            (
                _consume,
                (
                    q_nope, q_rope, kv_lens, cu_q_lens, out, scale_log2, num_tokens, num_seqs, num_tiles, num_items,
                    num_heads, first_head, stride_q, stride_q_head, stride_rope, stride_rope_head, q_tiles, q_rests,
                    k_ring, v_ring, k_full, k_empty, v_full, v_empty, items, item_full, item_empty,
                    NOPE, VALUE, R, BLOCK_N, STAGES, 1,
                ),
            ),
            (
                _produce,
                (
                    keys, values, rotated_keys, kv_lens, cu_q_lens, starts, num_tokens, num_seqs, num_tiles, num_items,
                    num_rows, k_ring, v_ring, k_full, k_empty, v_full, v_empty, next_item, items, item_full,
                    item_empty, NOPE, VALUE, RANK, R, BLOCK_N, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGS, 24],
    )  # fmt: skip


@dataclass(frozen=True)
class Config:
    block_n: int  # tokens of context per round
    stages: int  # tiles of keys, and as many of values, that shared memory holds


THREADS = 128 * (CONSUMERS.value + 1)
MAX_REGS = 65536 // THREADS // 8 * 8  # per thread at the start, before the warp groups share them out
CONSUMER_REGS = 240


def pick(value_dim: int) -> Config:
    return Config(128, 2) if value_dim == 128 else Config(64, 2)


def configs() -> list[Config]:
    """What a sweep tries for DeepSeek-V3's dims; the first is `pick`'s."""
    return [pick(128), Config(64, 4), Config(64, 3)]


def describe(matrix: Tensor, block_n: int) -> TensorDescriptor:
    """The matrix for TMA, in boxes of block_n rows and SLICE columns."""
    return TensorDescriptor.from_tensor(matrix, [block_n, SLICE.value], SWIZZLED.value)


def attend(
    q_nope: Tensor,
    q_rope: Tensor,
    keys: Tensor,
    values: Tensor,
    gathered: Gathered,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    out: Tensor,
    first_head: int,
    scale: float,
    config: Config,
) -> None:
    """As expanded.attend."""
    num_tokens, num_heads, nope_dim = q_nope.shape
    num_seqs, rope_dim, value_dim = kv_lens.shape[0], q_rope.shape[2], values.shape[2]
    num_tiles = num_tokens // (64 * CONSUMERS.value) + num_seqs + 2
    num_items = num_tiles * keys.shape[0]
    _attend[(min(num_items, machine.num_sms()),)](
        q_nope,
        q_rope,
        describe(keys.flatten(0, 1), config.block_n),
        describe(values.flatten(0, 1), config.block_n),
        describe(gathered.tokens, config.block_n),
        kv_lens,
        cu_q_lens,
        gathered.starts,
        torch.zeros(1, dtype=torch.int32, device=out.device),
        out,
        scale * LOG2_E,
        num_tokens,
        num_seqs,
        num_tiles,
        num_items,
        keys.shape[1],
        num_heads,
        first_head,
        *q_nope.stride()[:2],
        *q_rope.stride()[:2],
        NOPE=nope_dim,
        VALUE=value_dim,
        RANK=gathered.tokens.shape[1] - rope_dim,
        R=rope_dim,
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        REGS=CONSUMER_REGS,
        num_warps=4,
        maxnreg=MAX_REGS,
    )


def aot_of(config: Config, nope_dim: int, value_dim: int, dtype: str = "bf16") -> Aot:
    box = f"tensordesc<{dtype}[{config.block_n}, {SLICE.value}],{SWIZZLED.value!r}>"
    pointers = dict.fromkeys(("q_nope", "q_rope", "out"), f"*{dtype}")
    boxes = dict.fromkeys(("keys", "values", "rotated_keys"), box)
    indices = dict.fromkeys(("kv_lens", "cu_q_lens", "starts", "next_item"), "*i32")
    integers = ("num_tokens", "num_seqs", "num_tiles", "num_items", "num_rows", "num_heads", "first_head")
    strides = ("stride_q", "stride_q_head", "stride_rope", "stride_rope_head")
    constexprs = {"NOPE": nope_dim, "VALUE": value_dim, "RANK": 512, "R": 64, "BLOCK_N": config.block_n}
    return Aot(
        _attend,
        {**pointers, **boxes, **indices, "scale_log2": "fp32", **dict.fromkeys((*integers, *strides), "i32")},
        constexprs | {"STAGES": config.stages, "REGS": CONSUMER_REGS},
        divisible=(*pointers, "next_item", *strides),
        wants=("wgmma", "tma", "setmaxnreg"),
        max_spills=400,  # of what an item keeps for its end; ptxas puts none into the loop over full tiles
        maxnreg=MAX_REGS,
    )


def _aot():
    yield aot_of(pick(128), 128, 128)
    yield aot_of(pick(256), 192, 256)


def takes(case) -> bool:
    shapes = (case.nope_dim, case.value_dim) in ((128, 128), (192, 256)) and case.rope_dim == 64
    return shapes and case.rank % 64 == 0 and expandable(case)


@mla_prefill.kernel(needs="sm90a", when=takes, interpretable=False, aot=_aot)
def warp_groups(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, num_context):
    contexts = pages, page_table, kv_lens, cu_q_lens
    return launch(q_nope, q_rope, *contexts, w_uk, w_uv, scale, num_context, pick(w_uv.shape[1]), attend)
