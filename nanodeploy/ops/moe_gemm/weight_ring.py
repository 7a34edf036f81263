"""Some tokens for each expert: both products in one launch, whose stream of weights never pauses. Gluon, sm_90 alone.

A program per SM has three parts. One warp copies tiles of weights by TMA into a ring of shared memory, item after item,
without asking whether anybody has used the last one yet. A second part brings the tokens' values that belong to each
tile. A warp group multiplies, weights on the left, so that the few tokens are the tensor core's N.

Items of the second product want h whole for their tile of tokens. Programs count what is done of it, and only the part
that brings h waits for that count: weights of the second product are on their way while others still work at the first.
All programs are on the machine at once, so whoever is waited for runs. The kernel that adds the parts up clears the
counts.
"""

import functools
from dataclasses import dataclass

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
from nanodeploy.ops.layouts import E4M3, E4M3_MAX, FP8_BLOCK, LEAST_SCALE, num_fp8_blocks
from nanodeploy.ops.moe_align import counted
from nanodeploy.ops.moe_gemm import tiles
from nanodeploy.ops.moe_gemm.reference import moe_gemm, out_dtype
from nanodeploy.ops.quantize_fp8.tiles import tiles as quantise
from nanodeploy.ops.registry import Aot

BLOCK = gl.constexpr(128)  # columns of a step
_MAX, _LEAST = gl.constexpr(E4M3_MAX), gl.constexpr(LEAST_SCALE)
MAX_TILES = 8192
MAX_TOKENS = 1024
SHARED_BYTES = 224 * 1024  # of a program, for the ring


@dataclass(frozen=True)
class Config:
    tokens: int  # per tile
    half: int  # rows of the weight in each of the two tiles of a step
    stages: int  # steps in flight
    carriers: int  # warps that bring the tokens
    num_warps: int  # that multiply

    @property
    def max_regs(self) -> int:
        """Registers per thread at the start, before the parts share them out."""
        num_warps = self.num_warps + (self.carriers + 1 + 3) // 4 * 4
        return min(168, 2**16 // (32 * num_warps) // 8 * 8)


def config(tokens: int, fp8: bool) -> Config:
    """Two tiles of 16 KB a step; as many steps as there is room for."""
    half = 128 if fp8 else 64
    step_bytes = 2**15 + tokens * BLOCK.value * (1 if fp8 else 2) + 12 * tokens * fp8
    carriers = 1 if tokens <= 16 else 2 if tokens <= 32 else 4
    return Config(tokens, half, min(6, SHARED_BYTES // step_bytes), carriers, 8 if fp8 and tokens >= 64 else 4)


@gluon.jit
def _step(count, STAGES: gl.constexpr):
    """(stage, phase) of the ring's `count`-th step."""
    return count % STAGES, count // STAGES & 1


@gluon.jit
def _copy_weights(desc, ring, full, empty, count, x0, y0, x1, y1, num_steps, STAGES: gl.constexpr):
    """All steps of an item: rows from (x0, y0) on, and from (x1, y1) on."""
    for step in range(num_steps):
        stage, phase = _step(count, STAGES)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        mbarrier.expect(full.index(stage), 2 * desc.block_type.nbytes)
        first = ring.index(stage * 2)
        second = ring.index(stage * 2 + 1)
        shape: gl.constexpr = desc.block_type.shape
        box: gl.constexpr = desc.layout
        tma.async_copy_global_to_shared(
            desc, [x0, y0, step * BLOCK], full.index(stage), first._reinterpret(first.dtype, shape, box)
        )
        tma.async_copy_global_to_shared(
            desc, [x1, y1, step * BLOCK], full.index(stage), second._reinterpret(second.dtype, shape, box)
        )
        count += 1
    return count


@gluon.jit
def _weights(
    gate_up, down, tile_experts, ring, full, empty, used, num_n1, num_n2, HALF: gl.constexpr, STAGES: gl.constexpr,
    STEPS1: gl.constexpr, STEPS2: gl.constexpr,
):  # fmt: skip
    """The warp that copies weights."""
    count = 0
    for index in range(gl.program_id(0), used * num_n1, gl.num_programs(0)):
        expert = gl.load(tile_experts + index // num_n1)
        row = index % num_n1 * HALF
        count = _copy_weights(gate_up, ring, full, empty, count, 2 * expert, row, 2 * expert + 1, row, STEPS1, STAGES)
    for index in range(_second_start(used * num_n1), used * num_n2, gl.num_programs(0)):
        expert = gl.load(tile_experts + index // num_n2)
        row = index % num_n2 * 2 * HALF
        count = _copy_weights(down, ring, full, empty, count, expert, row, expert, row + HALF, STEPS2, STAGES)


@gluon.jit
def _second_start(num_first):
    """A program's first item of the second product, so that the turns go on where the first product's ended."""
    num_programs = gl.num_programs(0)
    return (gl.program_id(0) - num_first % num_programs + num_programs) % num_programs


@gluon.jit
def _carry(
    source, scales, stride_scale, scale0, scale1, ring, scale_ring, full, empty, count, num_steps,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr, LAYOUT: gl.constexpr, LINE: gl.constexpr,
):  # fmt: skip
    """Bring the tile's rows [TOKENS] from `source` on, for all steps of an item; in FP8 with all that scales a step:
    the tokens' scales, and those of the weight's two tiles, repeated."""
    cols = gl.expand_dims(gl.arange(0, BLOCK, layout=gl.SliceLayout(0, LAYOUT)), 0)
    rows = gl.expand_dims(source, 1) + cols
    for step in range(num_steps):
        stage, phase = _step(count, STAGES)
        mbarrier.wait(empty.index(stage), phase ^ 1)
        async_copy.async_copy_global_to_shared(ring.index(stage), rows + step * BLOCK)
        if FP8:
            same = gl.zeros([TOKENS], gl.int32, LINE)
            async_copy.async_copy_global_to_shared(scale_ring.index(stage * 3), scales + step * stride_scale)
            async_copy.async_copy_global_to_shared(scale_ring.index(stage * 3 + 1), scale0 + step + same)
            async_copy.async_copy_global_to_shared(scale_ring.index(stage * 3 + 2), scale1 + step + same)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        count += 1
    return count


@gluon.jit
def _tokens(
    x, x_scales, gate_up_scales, h, h_scales, down_scales, rows, tile_experts, done, ring, scale_ring, full, empty,
    used, num_n1, num_n2, num_slots, top_k, stride_x, stride_x_token, stride_x_scale, num_rows,
    TOKENS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, STEPS1: gl.constexpr, STEPS2: gl.constexpr,
    FP8: gl.constexpr, CARRIERS: gl.constexpr,
):  # fmt: skip
    """The warps that bring x, and h as soon as it is there."""
    VECTOR: gl.constexpr = 16 if FP8 else 8  # 16 bytes
    ACROSS: gl.constexpr = 128 // VECTOR
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [CARRIERS, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [CARRIERS], [0])
    lanes = gl.arange(0, TOKENS, layout=gl.SliceLayout(1, LAYOUT))
    line = gl.arange(0, TOKENS, layout=LINE)
    count = 0
    for index in range(gl.program_id(0), used * num_n1, gl.num_programs(0)):
        tile = index // num_n1
        n = index % num_n1
        token = gl.minimum(gl.load(rows + tile * TOKENS + lanes), num_slots - 1) // top_k  # nobody brings the last one
        source = x + token.to(gl.int64) * stride_x
        scale_at = gate_up_scales
        scale0 = gate_up_scales
        scale1 = gate_up_scales
        if FP8:
            same = gl.minimum(gl.load(rows + tile * TOKENS + line), num_slots - 1) // top_k
            scale_at = x_scales + same * stride_x_token
            expert = gl.load(tile_experts + tile).to(gl.int64)
            scale0 = gate_up_scales + (expert * 2 * num_n1 + n) * STEPS1
            scale1 = scale0 + num_n1 * STEPS1
        count = _carry(
            source, scale_at, stride_x_scale, scale0, scale1, ring, scale_ring, full, empty, count, STEPS1,
            TOKENS, STAGES, FP8, LAYOUT, LINE,
        )  # fmt: skip
    inner: gl.constexpr = STEPS2 * BLOCK
    for index in range(_second_start(used * num_n1), used * num_n2, gl.num_programs(0)):
        tile = index // num_n2
        n = index % num_n2
        source = h + (tile * TOKENS + lanes).to(gl.int64) * inner
        scale_at = down_scales
        scale0 = down_scales
        scale1 = down_scales
        if FP8:
            scale_at = h_scales + tile * TOKENS + line
            expert = gl.load(tile_experts + tile).to(gl.int64)
            scale0 = down_scales + (expert * 2 * num_n2 + 2 * n) * STEPS2
            scale1 = scale0 + STEPS2
        ready = gl.atomic_add(done + tile, 0, sem="acquire")
        while ready < num_n1:
            ready = gl.atomic_add(done + tile, 0, sem="acquire")
        gl.thread_barrier()
        count = _carry(
            source, scale_at, num_rows, scale0, scale1, ring, scale_ring, full, empty, count, STEPS2,
            TOKENS, STAGES, FP8, LAYOUT, LINE,
        )  # fmt: skip


@gluon.jit
def _products(
    w_ring, x_ring, scale_ring, full, empty, count, num_steps,
    TOKENS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, FP8: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """The two tiles' sums over an item's steps, each [HALF, TOKENS]."""
    first = gl.zeros([HALF, TOKENS], gl.float32, SUMS)
    second = gl.zeros([HALF, TOKENS], gl.float32, SUMS)
    products = first
    for _ in range(num_steps):
        stage, phase = _step(count, STAGES)
        mbarrier.wait(full.index(stage), phase)
        fence_async_shared()  # the tokens were not brought by TMA
        values = x_ring.index(stage).permute((1, 0))
        if FP8:
            products = warpgroup_mma(w_ring.index(stage * 2), values, products, use_acc=False, is_async=True)
            scale = scale_ring.index(stage * 3).load(gl.SliceLayout(0, SUMS))
            factor = gl.expand_dims(scale * scale_ring.index(stage * 3 + 1).load(gl.SliceLayout(0, SUMS)), 0)
            factor_2 = gl.expand_dims(scale * scale_ring.index(stage * 3 + 2).load(gl.SliceLayout(0, SUMS)), 0)
            products = warpgroup_mma_wait(0, deps=[products])
            first = gl.fma(products, factor.broadcast_to(first.shape), first)
            products = warpgroup_mma(w_ring.index(stage * 2 + 1), values, products, use_acc=False, is_async=True)
            products = warpgroup_mma_wait(0, deps=[products])
            second = gl.fma(products, factor_2.broadcast_to(second.shape), second)
        else:
            first = warpgroup_mma(w_ring.index(stage * 2), values, first, is_async=True)
            second = warpgroup_mma(w_ring.index(stage * 2 + 1), values, second, is_async=True)
            first, second = warpgroup_mma_wait(0, deps=[first, second])
        mbarrier.arrive(empty.index(stage), count=1)
        count += 1
    return first, second, count


@gluon.jit
def _multiply(
    h, h_scales, parts, rows, weights, done, w_ring, x_ring, scale_ring, full, empty, used, num_n1, num_n2, num_slots,
    num_rows,
    TOKENS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, STEPS1: gl.constexpr, STEPS2: gl.constexpr,
    FP8: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The warps that multiply."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, TOKENS, 32 if FP8 else 16])
    WIDE: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, WARPS], [0, 1])  # 16 bytes of one token a thread
    WIDE_H: gl.constexpr = gl.BlockedLayout([16, 1], [8, 4], [1, WARPS], [0, 1]) if FP8 else WIDE
    inner: gl.constexpr = STEPS2 * BLOCK
    dim: gl.constexpr = STEPS1 * BLOCK
    down = gl.expand_dims(gl.arange(0, HALF, layout=gl.SliceLayout(1, WIDE)), 1)
    down_h = gl.expand_dims(gl.arange(0, HALF, layout=gl.SliceLayout(1, WIDE_H)), 1)
    across_h = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, WIDE_H))
    across_sums = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, SUMS))
    count = 0
    for index in range(gl.program_id(0), used * num_n1, gl.num_programs(0)):
        tile = index // num_n1
        n = index % num_n1
        gate, up, count = _products(
            w_ring, x_ring, scale_ring, full, empty, count, STEPS1, TOKENS, HALF, STAGES, FP8, SUMS
        )
        result = gate / (1 + gl.exp(-gate)) * up
        if FP8:
            amax = gl.max(gl.abs(result), axis=0)
            scale = gl.where(amax > 0, gl.maximum(gl.div_rn(amax, gl.full_like(amax, _MAX)), _LEAST), 1.0)
            gl.store(h_scales + n * num_rows + tile * TOKENS + across_sums, scale)
            result = result * gl.expand_dims(gl.div_rn(gl.full_like(scale, 1.0), scale), 0)
        places = (tile * TOKENS + across_h).to(gl.int64) * inner + n * HALF
        gl.store(h + gl.expand_dims(places, 0) + down_h, gl.convert_layout(result.to(h.dtype.element_ty), WIDE_H))
        gl.thread_barrier()  # all of it is stored before it is counted
        gl.atomic_add(done + tile, 1, sem="release")
    start = _second_start(used * num_n1)
    first_tile = gl.minimum(start, used * num_n2) // num_n2  # as there may be no item for this program
    slots = gl.load(rows + gl.minimum(first_tile, used - 1) * TOKENS + across_sums, mask=used > 0, other=0)
    for index in range(start, used * num_n2, gl.num_programs(0)):
        n = index % num_n2
        weight = gl.expand_dims(gl.load(weights + slots, mask=slots < num_slots, other=0.0), 0)
        next_index = gl.minimum(index + gl.num_programs(0), used * num_n2 - 1)
        next_slots = gl.load(rows + next_index // num_n2 * TOKENS + across_sums)
        first, second, count = _products(
            w_ring, x_ring, scale_ring, full, empty, count, STEPS2, TOKENS, HALF, STAGES, FP8, SUMS
        )
        slots = gl.convert_layout(slots, gl.SliceLayout(0, WIDE))
        at = parts + gl.expand_dims(slots.to(gl.int64) * dim + n * 2 * HALF, 0) + down
        there = gl.expand_dims(slots < num_slots, 0)
        gl.store(at, gl.convert_layout((first * weight).to(parts.dtype.element_ty), WIDE), mask=there)
        gl.store(at + HALF, gl.convert_layout((second * weight).to(parts.dtype.element_ty), WIDE), mask=there)
        slots = next_slots


@gluon.jit(do_not_specialize=["num_slots", "most_tiles", "num_rows", "stride_x_scale"])
def _experts(
    x, x_scales, gate_up, gate_up_scales, h, h_scales, down, down_scales, rows, tile_experts, weights, parts, done,
    num_slots, top_k, most_tiles, stride_x, stride_x_token, stride_x_scale, num_rows,
    TOKENS: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, CARRIERS: gl.constexpr, STEPS1: gl.constexpr,
    STEPS2: gl.constexpr, FP8: gl.constexpr, WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """parts [T * k, D]: weight * mlp(x) of every slot, at the slot's number. h [M, I] is scratch."""
    if PDL:
        gdc_launch_dependents()
    DTYPE: gl.constexpr = x.dtype.element_ty
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 8 if FP8 else 16, 2)
    w_ring = gl.allocate_shared_memory(DTYPE, [STAGES * 2, HALF, BLOCK], SHARED)
    x_ring = gl.allocate_shared_memory(DTYPE, [STAGES, TOKENS, BLOCK], SHARED)
    scale_ring = gl.allocate_shared_memory(
        gl.float32, [STAGES * 3 if FP8 else 1, TOKENS], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + 32 * CARRIERS)  # the weights' bytes, and each thread that brings tokens
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    if PDL:
        gdc_wait()
    num_n1: gl.constexpr = STEPS2 * BLOCK // HALF
    num_n2: gl.constexpr = STEPS1 * BLOCK // (2 * HALF)
    used = 0
    lanes = gl.arange(0, 1024, layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    for first in range(0, most_tiles, 1024):
        experts = gl.load(tile_experts + first + lanes, mask=first + lanes < most_tiles, other=-1)
        used += gl.sum((experts >= 0).to(gl.int32), axis=0)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    h, h_scales, parts, rows, weights, done, w_ring, x_ring, scale_ring, full, empty, used,
                    num_n1, num_n2, num_slots, num_rows, TOKENS, HALF, STAGES, STEPS1, STEPS2, FP8, WARPS,
                ),
            ),
            (
                _tokens,
                (
                    x, x_scales, gate_up_scales, h, h_scales, down_scales, rows, tile_experts, done, x_ring,
                    scale_ring, full, empty, used, num_n1, num_n2, num_slots, top_k, stride_x, stride_x_token,
                    stride_x_scale, num_rows, TOKENS, HALF, STAGES, STEPS1, STEPS2, FP8, CARRIERS,
                ),
            ),
            (
                _weights,
                (gate_up, down, tile_experts, w_ring, full, empty, used, num_n1, num_n2, HALF, STAGES, STEPS1, STEPS2),
            ),
        ],
        [CARRIERS, 1],
        [56, 32],
    )  # fmt: skip


@functools.cache
def _done(device: torch.device) -> torch.Tensor:
    """Counts of what is done of each tile's h. Each call leaves them at 0; calls run one by one."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def run(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales, chosen: Config) -> torch.Tensor:
    """moe_gemm by one configuration; bench/sweeps/moe_gemm.py calls this too."""
    (num_tokens, dim), (num_experts, _, inner) = x.shape, down.shape
    assert gate_up.is_contiguous() and down.is_contiguous(), "weights must be contiguous"
    out = torch.empty((num_tokens, dim), dtype=out_dtype(x), device=x.device)
    if num_tokens == 0:
        return out
    fp8 = gate_up_scales is not None
    if fp8 and x_scales is None:
        x, x_scales = quantise(x)
    x = tiles.for_copies(x)
    num_slots, top_k = ids.numel(), ids.shape[1]
    rows, tile_experts = counted.run(ids, num_experts, chosen.tokens)
    num_rows, most_tiles = rows.numel(), tile_experts.numel()
    h = torch.empty((num_rows, inner), dtype=x.dtype, device=x.device)
    h_scales = torch.empty((num_fp8_blocks(inner), num_rows), dtype=torch.float32, device=x.device) if fp8 else None
    parts = torch.empty((num_slots, dim), dtype=out.dtype, device=x.device)
    done = _done(x.device)
    shape, layout = [1, chosen.half, FP8_BLOCK], gl.NVMMASharedLayout(128, 8 * x.element_size(), 3)
    _experts[(machine.num_sms(),)](
        x,
        x_scales,
        TensorDescriptor(gate_up, [2 * num_experts, inner, dim], [inner * dim, dim, 1], shape, layout),
        gate_up_scales,
        h,
        h_scales,
        TensorDescriptor(down, [num_experts, dim, inner], [dim * inner, inner, 1], shape, layout),
        down_scales,
        rows,
        tile_experts,
        weights,
        parts,
        done,
        num_slots,
        top_k,
        most_tiles,
        x.stride(0),
        *(x_scales.stride() if fp8 else (0, 0)),
        num_rows,
        **_constexprs(chosen, dim, inner, fp8),
        num_warps=chosen.num_warps,
        maxnreg=chosen.max_regs,
        **overlap.launch(),
    )
    tiles.combine(parts, ids, out, done, most_tiles)
    return out


def _constexprs(chosen: Config, dim: int, inner: int, fp8: bool) -> dict[str, int]:
    how = {"TOKENS": chosen.tokens, "HALF": chosen.half, "STAGES": chosen.stages, "CARRIERS": chosen.carriers}
    return {**how, "STEPS1": dim // FP8_BLOCK, "STEPS2": inner // FP8_BLOCK, "FP8": fp8, "WARPS": chosen.num_warps}


def aot(chosen: Config, dim: int, inner: int, fp8: bool) -> Aot:
    """One configuration, to compile offline."""
    kind, layout = ("fp8e4nv", gl.NVMMASharedLayout(128, 8, 3)) if fp8 else ("bf16", gl.NVMMASharedLayout(128, 16, 3))
    desc = f"tensordesc<{kind}[1, {chosen.half}, {FP8_BLOCK}],{layout!r}>"
    pointers = dict.fromkeys(("x", "h"), f"*{kind}") | dict.fromkeys(("rows", "tile_experts", "done"), "*i32")
    pointers |= {"weights": "*fp32", "parts": "*bf16"}
    sizes = ("num_slots", "top_k", "most_tiles", "stride_x", "stride_x_token", "stride_x_scale", "num_rows")
    scales = ("x_scales", "gate_up_scales", "h_scales", "down_scales")
    constexprs = _constexprs(chosen, dim, inner, fp8) | {"PDL": True} | ({} if fp8 else dict.fromkeys(scales))
    return Aot(
        _experts,
        pointers
        | {"gate_up": desc, "down": desc}
        | dict.fromkeys(sizes, "i32")
        | (dict.fromkeys(scales, "*fp32") if fp8 else {}),
        constexprs,
        chosen.num_warps,
        divisible=(*pointers, "stride_x"),
        wants=("wgmma", "tma", "cp.async", "setmaxnreg", "griddepcontrol.wait"),
        maxnreg=chosen.max_regs,
    )


def _aot():
    for dim, inner, fp8 in ((2048, 768, False), (7168, 2048, True)):
        for tokens in (16, 32, 64):
            yield aot(config(tokens, fp8), dim, inner, fp8)


def _takes(case) -> bool:
    half = 128 if case.scaled else 64
    whole = case.dim % (2 * half) == 0 and case.inner % 128 == 0
    plain = case.dtype in (torch.bfloat16, torch.float16) or (case.scaled and case.dtype == E4M3)
    # Room for the tiles of 16 tokens, the smallest.
    return plain and whole and case.num_tokens <= MAX_TOKENS and case.num_experts + MAX_TOKENS <= MAX_TILES


@moe_gemm.kernel(needs="sm90a", when=_takes, batch_invariant=True, order="k16", interpretable=False, aot=_aot)
def weight_ring(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales):
    tokens = tokens_per_tile(ids.numel(), down.shape[0])
    chosen = config(tokens, gate_up_scales is not None)
    return run(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales, chosen)


def tokens_per_tile(num_slots: int, num_experts: int) -> int:
    """So many that few experts need a second tile, for which their weights would be read again."""
    per_expert = num_slots / num_experts
    return 16 if per_expert <= 8 else 32 if per_expert <= 20 else 64
