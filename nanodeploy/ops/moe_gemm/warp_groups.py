"""Many tokens for each expert, by warp groups with roles, written in Gluon for sm_90 alone (the idea is CUTLASS's).

A program takes tile after tile of 128 tokens of one expert by 256 rows of its weight (in the first product, 128 of the
gate and the same 128 of up). One warp group fills a ring of shared memory: the weight comes by TMA, the tokens' rows by
their addresses. Two others own 64 tokens each; one that has none in the last tile of an expert leaves the tensor cores
to the other.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanodeploy.ops import machine, overlap
from nanodeploy.ops.layouts import E4M3, E4M3_MAX, LEAST_SCALE, num_fp8_blocks
from nanodeploy.ops.moe_align import counted
from nanodeploy.ops.moe_gemm import tiles
from nanodeploy.ops.moe_gemm.reference import moe_gemm, out_dtype
from nanodeploy.ops.quantize_fp8.tiles import tiles as quantise
from nanodeploy.ops.registry import Aot

TOKENS = gl.constexpr(128)  # per tile, half of them a warp group's
ROWS = gl.constexpr(128)  # of the weight, in each of the two parts of a tile
STAGES = 4  # steps in flight
GROUP = 8  # tiles of tokens that take a tile of the weight in turn, while the L2 cache has it
MAX_REGS = 168  # per thread at the start, of three warp groups
CONSUMER_REGS, PRODUCER_REGS = 224, 56  # after they have shared them out
MIN_TOKENS = 128  # fewer are not worth a tile
_MAX, _LEAST = gl.constexpr(E4M3_MAX), gl.constexpr(LEAST_SCALE)


@gluon.jit
def _place(index, num_tiles, num_n, GROUP: gl.constexpr):
    """(tile of tokens, tile of the weight's rows) number `index`."""
    first = index // (GROUP * num_n) * GROUP
    size = gl.minimum(num_tiles - first, GROUP)
    within = index % (GROUP * num_n)
    return first + within % size, within // size


@gluon.jit
def _produce(
    source, desc, rows, tile_experts, w_ring, x_ring, full, empty, used, num_n, num_slots, top_k, stride_source, steps,
    SECOND: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The warp group that fills the ring. source: x, or (SECOND) h, whose rows stand as the tiles have them."""
    BLOCK: gl.constexpr = x_ring.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, BLOCK // 8], [4, 8], [4, 1], [1, 0])  # 16 bytes a thread
    lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT)), 0)
    shape: gl.constexpr = desc.block_type.shape
    count = 0
    for index in range(gl.program_id(0), used * num_n, gl.num_programs(0)):
        tile, n = _place(index, used, num_n, GROUP)
        expert = gl.load(tile_experts + tile)
        if SECOND:
            x0, y0, x1, y1 = expert, n * 2 * ROWS, expert, n * 2 * ROWS + ROWS
            row = (tile * TOKENS + lanes).to(gl.int64)
            row_2 = row + 64
        else:
            x0, y0, x1, y1 = 2 * expert, n * ROWS, 2 * expert + 1, n * ROWS
            # Nobody brings the last one.
            row = (gl.minimum(gl.load(rows + tile * TOKENS + lanes), num_slots - 1) // top_k).to(gl.int64)
            row_2 = (gl.minimum(gl.load(rows + tile * TOKENS + 64 + lanes), num_slots - 1) // top_k).to(gl.int64)
        at = source + gl.expand_dims(row * stride_source, 1) + cols
        at_2 = source + gl.expand_dims(row_2 * stride_source, 1) + cols
        for step in range(steps):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 2 * desc.block_type.nbytes)
            part = w_ring.index(stage * 2)
            tma.async_copy_global_to_shared(
                desc, [x0, y0, step * BLOCK], full.index(stage), part._reinterpret(part.dtype, shape, desc.layout)
            )
            part = w_ring.index(stage * 2 + 1)
            tma.async_copy_global_to_shared(
                desc, [x1, y1, step * BLOCK], full.index(stage), part._reinterpret(part.dtype, shape, desc.layout)
            )
            async_copy.async_copy_global_to_shared(x_ring.index(stage * 2), at + step * BLOCK)
            async_copy.async_copy_global_to_shared(x_ring.index(stage * 2 + 1), at_2 + step * BLOCK)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            count += 1


@gluon.jit
def _put(room, values, to, offsets, there, LAYOUT: gl.constexpr):
    """Write values [64, 128] to the rows at `offsets`, through shared memory: 16 bytes of a row a thread."""
    room.store(values.to(room.dtype))
    cols = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT)), 0)
    gl.store(to + gl.expand_dims(offsets, 1) + cols, room.load(LAYOUT), mask=gl.expand_dims(there, 1))


@gluon.jit
def _sums(x_ring, w_ring, full, empty, count, steps, WHO: gl.constexpr, STAGES: gl.constexpr):
    """A tile's sums, each part [64, 128]. One product is always under way while the next is issued."""
    BLOCK: gl.constexpr = x_ring.shape[2]
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * ROWS, 16])
    both = w_ring._reinterpret(w_ring.dtype, [STAGES, 2 * ROWS, BLOCK], w_ring.layout)
    total = gl.zeros([64, 2 * ROWS], gl.float32, SUMS)
    for step in range(count, count + steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        fence_async_shared()  # the tokens were not brought by TMA
        total = warpgroup_mma(x_ring.index(stage * 2 + WHO), both.index(stage).permute((1, 0)), total, is_async=True)
        total = warpgroup_mma_wait(1, deps=[total])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > count)
    total = warpgroup_mma_wait(0, deps=[total])
    mbarrier.arrive(empty.index((count + steps - 1) % STAGES), count=1)
    return total.reshape([64, 2, ROWS]).permute([0, 2, 1]).split()


@gluon.jit
def _scaled_sums(
    x_ring, w_ring, full, empty, count, steps, scales, own, stride_scale, w_scale_at, stride_part,
    WHO: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The same in FP8. Scales are fetched one block ahead."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    first = gl.zeros([64, ROWS], gl.float32, SUMS)
    second = gl.zeros([64, ROWS], gl.float32, SUMS)
    products = gl.zeros([64, ROWS], gl.float32, SUMS)
    scale = gl.load(scales + own)
    w_scale = gl.load(w_scale_at)
    w_scale_2 = gl.load(w_scale_at + stride_part)
    for block in range(steps):
        stage = (count + block) % STAGES
        factor = gl.expand_dims(scale * w_scale, 1)
        factor_2 = gl.expand_dims(scale * w_scale_2, 1)
        after = gl.minimum(block + 1, steps - 1)
        scale = gl.load(scales + after * stride_scale + own)
        w_scale = gl.load(w_scale_at + after)
        w_scale_2 = gl.load(w_scale_at + stride_part + after)
        mbarrier.wait(full.index(stage), (count + block) // STAGES & 1)
        fence_async_shared()  # the tokens were not brought by TMA
        values = x_ring.index(stage * 2 + WHO)
        products = warpgroup_mma(
            values, w_ring.index(stage * 2).permute((1, 0)), products, use_acc=False, is_async=True
        )
        products = warpgroup_mma_wait(0, deps=[products])
        first = gl.fma(products, factor.broadcast_to(first.shape), first)
        products = warpgroup_mma(
            values, w_ring.index(stage * 2 + 1).permute((1, 0)), products, use_acc=False, is_async=True
        )
        products = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(empty.index(stage), count=1)
        second = gl.fma(products, factor_2.broadcast_to(second.shape), second)
    return first, second


@gluon.jit
def _consume(
    to, to_scales, rows, tile_experts, weights, x_scales, w_scales, w_ring, x_ring, room, full, empty, used, num_n,
    num_slots, top_k, stride_to, stride_x_token, stride_x_scale, num_rows, steps,
    SECOND: gl.constexpr, FP8: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Warp group WHO: 64 tokens of every tile. to: h, or (SECOND) the slots' parts; to_scales: of h in FP8."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32 if FP8 else 16])
    WIDE: gl.constexpr = (
        gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
        if FP8 and not SECOND
        else gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    )
    room = room.index(WHO)
    lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    wide_lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    total_items = used * num_n
    count = 0
    # What a tile's rows are is fetched one tile ahead.
    tile, _ = _place(gl.minimum(gl.program_id(0), total_items - 1), used, num_n, GROUP)
    slots = gl.load(rows + tile * TOKENS + WHO * 64 + lanes, mask=lanes < used * 64, other=0)
    any_here = gl.load(rows + tile * TOKENS + WHO * 64, mask=used > 0, other=0) < num_slots
    for index in range(gl.program_id(0), total_items, gl.num_programs(0)):
        tile, n = _place(index, used, num_n, GROUP)
        next_tile, _ = _place(gl.minimum(index + gl.num_programs(0), total_items - 1), used, num_n, GROUP)
        next_slots = gl.load(rows + next_tile * TOKENS + WHO * 64 + lanes)
        next_here = gl.load(rows + next_tile * TOKENS + WHO * 64) < num_slots
        if any_here:
            if SECOND:
                weight = gl.load(weights + slots, mask=slots < num_slots, other=0.0)
            if FP8:
                expert = gl.load(tile_experts + tile).to(gl.int64)
                part = steps if SECOND else num_n * steps
                w_scale_at = w_scales + (expert * 2 * num_n + (2 * n if SECOND else n)) * steps
                token = tile * TOKENS + WHO * 64 + lanes if SECOND else gl.minimum(slots, num_slots - 1) // top_k
                first, second = _scaled_sums(
                    x_ring, w_ring, full, empty, count, steps, x_scales, token * stride_x_token,
                    stride_x_scale, w_scale_at, part, WHO, STAGES,
                )  # fmt: skip
            else:
                first, second = _sums(x_ring, w_ring, full, empty, count, steps, WHO, STAGES)
            if SECOND:
                weight = gl.convert_layout(weight, gl.SliceLayout(1, first.type.layout))
                wide_slots = gl.convert_layout(slots, gl.SliceLayout(1, WIDE))
                offsets = wide_slots.to(gl.int64) * stride_to + n * 2 * ROWS
                _put(room, first * gl.expand_dims(weight, 1), to, offsets, wide_slots < num_slots, WIDE)
                _put(room, second * gl.expand_dims(weight, 1), to, offsets + ROWS, wide_slots < num_slots, WIDE)
            else:
                result = first / (1 + gl.exp(-first)) * second
                if FP8:
                    amax = gl.max(gl.abs(result), axis=1)
                    scale = gl.where(amax > 0, gl.maximum(gl.div_rn(amax, gl.full_like(amax, _MAX)), _LEAST), 1.0)
                    gl.store(to_scales + n * num_rows + tile * TOKENS + WHO * 64 + lanes, scale)
                    result = result * gl.expand_dims(gl.div_rn(gl.full_like(scale, 1.0), scale), 1)
                offsets = (tile * TOKENS + WHO * 64 + wide_lanes).to(gl.int64) * stride_to + n * ROWS
                _put(room, result, to, offsets, wide_lanes >= 0, WIDE)
        else:
            for step in range(count, count + steps):
                mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
        count += steps
        slots = next_slots
        any_here = next_here


@gluon.jit(do_not_specialize=["num_slots", "most_tiles", "num_rows", "stride_x_scale"])
def _product(
    source, x_scales, desc, w_scales, to, to_scales, rows, tile_experts, weights,
    num_slots, top_k, most_tiles, num_n, stride_source, stride_to, stride_x_token, stride_x_scale, num_rows, steps,
    SECOND: gl.constexpr, FP8: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
    CONSUMER_REGS: gl.constexpr, PRODUCER_REGS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The first product, h [M, I] from x [T, D], or the SECOND, parts [T * k, D] from h. DIM: the inner axis."""
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = source.dtype.element_ty
    BLOCK: gl.constexpr = 128 if FP8 else 64
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 8 if FP8 else 16, 2)
    OUT: gl.constexpr = gl.NVMMASharedLayout(128, 8 if FP8 and not SECOND else 16, 2)
    w_ring = gl.allocate_shared_memory(DTYPE, [STAGES * 2, ROWS, BLOCK], SHARED)
    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES * 2, 64, BLOCK], SHARED)
    room = gl.allocate_shared_memory(to.dtype.element_ty, [2, 64, ROWS], OUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 128)  # the weight's bytes, and each thread that brings tokens
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    if PDL:
        gdc_wait()
    used = 0
    lanes = gl.arange(0, 1024, layout=gl.BlockedLayout([4], [32], [4], [0]))
    for first in range(0, most_tiles, 1024):
        experts = gl.load(tile_experts + first + lanes, mask=first + lanes < most_tiles, other=-1)
        used += gl.sum((experts >= 0).to(gl.int32), axis=0)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    to, to_scales, rows, tile_experts, weights, x_scales, w_scales, w_ring, x_ring, room, full, empty,
                    used, num_n, num_slots, top_k, stride_to, stride_x_token, stride_x_scale, num_rows, steps,
                    SECOND, FP8, STAGES, GROUP, 0,
                ),
            ),
            (
                _consume,
                (
                    to, to_scales, rows, tile_experts, weights, x_scales, w_scales, w_ring, x_ring, room, full, empty,
                    used, num_n, num_slots, top_k, stride_to, stride_x_token, stride_x_scale, num_rows, steps,
                    SECOND, FP8, STAGES, GROUP, 1,
                ),
            ),
            (
                _produce,
                (
                    source, desc, rows, tile_experts, w_ring, x_ring, full, empty, used, num_n, num_slots, top_k,
                    stride_source, steps, SECOND, STAGES, GROUP,
                ),
            ),
        ],
        [4, 4],
        [CONSUMER_REGS, PRODUCER_REGS],
    )  # fmt: skip


SHAPE = {"STAGES": STAGES, "GROUP": GROUP, "CONSUMER_REGS": CONSUMER_REGS, "PRODUCER_REGS": PRODUCER_REGS}


def run(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales) -> torch.Tensor:
    (num_tokens, dim), (num_experts, _, inner) = x.shape, down.shape
    assert gate_up.is_contiguous() and down.is_contiguous(), "weights must be contiguous"
    out = torch.empty((num_tokens, dim), dtype=out_dtype(x), device=x.device)
    fp8 = gate_up_scales is not None
    if fp8 and x_scales is None:
        x, x_scales = quantise(x)
    x = tiles.for_copies(x)
    rows, tile_experts = counted.run(ids, num_experts, TOKENS.value)
    num_rows = rows.numel()
    h = torch.empty((num_rows, inner), dtype=x.dtype, device=x.device)
    h_scales = None
    if fp8:
        h_scales = torch.empty((num_fp8_blocks(inner), num_rows), dtype=torch.float32, device=x.device).t()
    parts = torch.empty((ids.numel(), dim), dtype=out.dtype, device=x.device)
    tiling = (rows, tile_experts)
    _launch(x, x_scales, gate_up.view(2 * num_experts, inner, dim), gate_up_scales, h, h_scales, *tiling, None, ids)
    _launch(h, h_scales, down, down_scales, parts, None, *tiling, weights, ids)
    tiles.combine(parts, ids, out)
    return out


def _launch(source, scales, weight, weight_scales, to, to_scales, rows, tile_experts, weights, ids) -> None:
    """One product: with weights the second."""
    (_, num_rows, dim), fp8, second = weight.shape, scales is not None, weights is not None
    block = 128 if fp8 else 64
    box, layout = [1, ROWS.value, block], gl.NVMMASharedLayout(128, 8 * source.element_size(), 3)
    _product[(machine.num_sms(),)](
        source,
        scales,
        TensorDescriptor(weight, list(weight.shape), list(weight.stride()), box, layout),
        weight_scales,
        to,
        to_scales,
        rows,
        tile_experts,
        weights,
        ids.numel(),
        ids.shape[1],
        tile_experts.numel(),
        num_rows // (2 * ROWS.value if second else ROWS.value),
        source.stride(0),
        to.stride(0),
        *(scales.stride() if fp8 else (0, 0)),
        rows.numel(),
        dim // block,
        SECOND=second,
        FP8=fp8,
        **SHAPE,
        num_warps=4,
        maxnreg=MAX_REGS,
        **overlap.launch(),
    )


def aot(fp8: bool, second: bool) -> Aot:
    """One product, to compile offline."""
    kind, layout = ("fp8e4nv", gl.NVMMASharedLayout(128, 8, 3)) if fp8 else ("bf16", gl.NVMMASharedLayout(128, 16, 3))
    pointers = {"source": f"*{kind}", "to": "*bf16" if second else f"*{kind}", "rows": "*i32", "tile_experts": "*i32"}
    pointers |= {"weights": "*fp32"} if second else {}
    scales = ("x_scales", "w_scales", *(() if second else ("to_scales",)))
    sizes = ("num_slots", "top_k", "most_tiles", "num_n", "stride_source", "stride_to", "num_rows", "steps")
    strides = ("stride_x_token", "stride_x_scale")
    signature = pointers | dict.fromkeys((*sizes, *strides), "i32") | (dict.fromkeys(scales, "*fp32") if fp8 else {})
    signature["desc"] = f"tensordesc<{kind}[1, {ROWS.value}, {128 if fp8 else 64}],{layout!r}>"
    constexprs = {"SECOND": second, "FP8": fp8, "PDL": True} | SHAPE
    absent = [name for name in ("x_scales", "w_scales", "to_scales", "weights") if name not in signature]
    return Aot(
        _product,
        signature,
        constexprs | dict.fromkeys(absent),
        divisible=(*pointers, "stride_source", "stride_to"),
        wants=("wgmma", "tma", "cp.async", "setmaxnreg", "griddepcontrol.wait"),
        maxnreg=MAX_REGS,
    )


def _aot():
    for fp8 in (False, True):
        for second in (False, True):
            yield aot(fp8, second)


def _takes(case) -> bool:
    whole = case.dim % (2 * ROWS.value) == 0 and case.inner % ROWS.value == 0
    plain = case.dtype in (torch.bfloat16, torch.float16) or (case.scaled and case.dtype == E4M3)
    return plain and whole and case.num_tokens >= MIN_TOKENS


@moe_gemm.kernel(needs="sm90a", when=_takes, batch_invariant=True, order="k16", interpretable=False, aot=_aot)
def warp_groups(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales):
    return run(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales)
