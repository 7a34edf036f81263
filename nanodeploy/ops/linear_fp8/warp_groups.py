"""Many tokens, order "k128", by warp groups with roles, written in Gluon for sm_90 alone (the idea is CUTLASS's).

One warp copies blocks of both operands by TMA into a ring of shared memory. Two or three warp groups own 64 tokens each
and the same 128 rows of the weight: while one of them scales the products of a block and adds them up, the tensor core
works for the others. Three read less for each product, and fill the registers.
"""

from dataclasses import dataclass

import torch
import triton
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
from nanodeploy.ops.layouts import FP8_BLOCK
from nanodeploy.ops.linear_fp8.reference import linear_fp8
from nanodeploy.ops.linear_fp8.tiles import for_tma, row_stride
from nanodeploy.ops.registry import Aot

GROUP = 8  # tiles of tokens that take a tile of the weight in turn, while the L2 cache has it
BLOCK = gl.constexpr(FP8_BLOCK)
BYTES = gl.NVMMASharedLayout(128, 8, 2)
HALVES = gl.NVMMASharedLayout(128, 16, 2)


@dataclass(frozen=True)
class Config:
    consumers: int  # warp groups of 64 tokens, 2 or 3
    num_stages: int  # blocks of both operands that shared memory holds

    @property
    def maxnreg(self) -> int:
        """Registers per thread at the start, before the warp groups share them out."""
        return 65536 // (128 * (self.consumers + 1)) // 8 * 8

    @property
    def regs(self) -> int:
        """Registers per thread of a consumer; the producer gives all but 24 of its own away."""
        return min(240, (self.maxnreg * (self.consumers + 1) - 24) // self.consumers // 8 * 8)


def pick(num_tokens: int, out_dim: int) -> Config:
    return Config(3, 3) if num_tokens > 1024 else Config(2, 6)


@gluon.jit
def _place(tile, num_t, num_n, GROUP: gl.constexpr):
    """(tile of tokens, tile of rows) number `tile`."""
    first = tile // (GROUP * num_n) * GROUP
    size = gl.minimum(num_t - first, GROUP)
    within = tile % (GROUP * num_n)
    return first + within % size, within // size


@gluon.jit
def _produce(
    x_desc, w_desc, x_ring, w_ring, full, empty, num_t, num_n, num_blocks,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp: block after block of each tile's operands."""
    count = 0
    for tile in range(gl.program_id(0), num_t * num_n, gl.num_programs(0)):
        t, n = _place(tile, num_t, num_n, GROUP)
        for block in range(num_blocks):
            stage = count % STAGES
            mbarrier.wait(empty.index(stage), (count // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), (CONSUMERS * 64 + BLOCK) * BLOCK)
            tma.async_copy_global_to_shared(w_desc, [n * BLOCK, block * BLOCK], full.index(stage), w_ring.index(stage))
            for part in gl.static_range(CONSUMERS):
                tma.async_copy_global_to_shared(
                    x_desc,
                    [(t * CONSUMERS + part) * 64, block * BLOCK],
                    full.index(stage),
                    x_ring.index(stage * CONSUMERS + part),
                )
            count += 1


@gluon.jit
def _consume(
    x_scales, weight_scales, out_desc, x_ring, w_ring, out_tiles, full, empty, num_tokens, num_t, num_n, num_blocks,
    stride_token, stride_block,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Warp group WHO: 64 tokens of every tile. Scales are fetched one block ahead."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32])
    lanes = gl.arange(0, 64, layout=gl.SliceLayout(1, SUMS))
    zeros = gl.zeros([64, BLOCK], gl.float32, SUMS)
    out_tile = out_tiles.index(WHO)
    count = 0
    for tile in range(gl.program_id(0), num_t * num_n, gl.num_programs(0)):
        t, n = _place(tile, num_t, num_n, GROUP)
        row = (t * CONSUMERS + WHO) * 64
        own = gl.minimum(row + lanes, num_tokens - 1) * stride_token
        weight_at = weight_scales + n * num_blocks
        scale, weight_scale = gl.load(x_scales + own), gl.load(weight_at)
        total = zeros
        for block in range(num_blocks):
            factor = gl.expand_dims(scale * weight_scale, 1)
            after = gl.minimum(block + 1, num_blocks - 1)
            scale, weight_scale = (
                gl.load(x_scales + after.to(gl.int64) * stride_block + own),
                gl.load(weight_at + after),
            )
            stage = count % STAGES
            mbarrier.wait(full.index(stage), count // STAGES & 1)
            x_tile, w_tile = x_ring.index(stage * CONSUMERS + WHO), w_ring.index(stage)
            products = warpgroup_mma(x_tile, w_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
            products = warpgroup_mma_wait(0, deps=[products])
            mbarrier.arrive(empty.index(stage), count=1)
            total = gl.fma(products, factor.broadcast_to(products.shape), total)
            count += 1
        tma.store_wait(0)  # the last tile has left
        gl.thread_barrier()
        out_tile.store(total.to(out_desc.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_desc, [row, n * BLOCK], out_tile)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "num_t", "num_n", "num_blocks", "stride_block"])
def _product(
    x_desc, w_desc, out_desc, x_scales, weight_scales, num_tokens, num_t, num_n, num_blocks, stride_token, stride_block,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, GROUP: gl.constexpr, REGS: gl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] @ weight [N, K]^T, both in e4m3 with their scales; a program takes tile after tile."""
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [STAGES * CONSUMERS, 64, BLOCK], x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK, BLOCK], w_desc.layout)
    out_tiles = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 64, BLOCK], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
            (
                _consume,
                (
                    x_scales, weight_scales, out_desc, x_ring, w_ring, out_tiles, full, empty, num_tokens, num_t, num_n,
                    num_blocks, stride_token, stride_block, CONSUMERS, STAGES, GROUP, 0,
                ),
            ),
            (
                _consume,
                (
                    x_scales, weight_scales, out_desc, x_ring, w_ring, out_tiles, full, empty, num_tokens, num_t, num_n,
                    num_blocks, stride_token, stride_block, CONSUMERS, STAGES, GROUP, 1,
                ),
            ),
            (
                _produce,
                (x_desc, w_desc, x_ring, w_ring, full, empty, num_t, num_n, num_blocks, CONSUMERS, STAGES, GROUP),
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
                    x_scales, weight_scales, out_desc, x_ring, w_ring, out_tiles, full, empty, num_tokens, num_t, num_n,
                    num_blocks, stride_token, stride_block, CONSUMERS, STAGES, GROUP, 0,
                ),
            ),
            (
                _consume,
                (
                    x_scales, weight_scales, out_desc, x_ring, w_ring, out_tiles, full, empty, num_tokens, num_t, num_n,
                    num_blocks, stride_token, stride_block, CONSUMERS, STAGES, GROUP, 1,
                ),
            ),
            (
                _consume,
                (
                    x_scales, weight_scales, out_desc, x_ring, w_ring, out_tiles, full, empty, num_tokens, num_t, num_n,
                    num_blocks, stride_token, stride_block, CONSUMERS, STAGES, GROUP, 2,
                ),
            ),
            (
                _produce,
                (x_desc, w_desc, x_ring, w_ring, full, empty, num_t, num_n, num_blocks, CONSUMERS, STAGES, GROUP),
            ),
            ],
            [4, 4, 1],
            [REGS, REGS, 24],
        )  # fmt: skip


def run(
    x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, dtype: torch.dtype,
    chosen: Config,
) -> torch.Tensor:  # fmt: skip
    """One configuration; bench/sweeps/linear_fp8.py calls this too."""
    (num_tokens, in_dim), out_dim = x.shape, weight.shape[0]
    assert weight.is_contiguous() and weight_scales.is_contiguous(), "the weight and its scales must be contiguous"
    out = torch.empty((num_tokens, out_dim), dtype=dtype, device=x.device)
    if num_tokens == 0:
        return out
    x = for_tma(x)
    num_t = triton.cdiv(num_tokens, 64 * chosen.consumers)
    num_n, num_blocks = triton.cdiv(out_dim, FP8_BLOCK), triton.cdiv(in_dim, FP8_BLOCK)
    _product[(min(num_t * num_n, machine.num_sms()),)](
        TensorDescriptor(x, [num_tokens, in_dim], [row_stride(x), 1], [64, FP8_BLOCK], BYTES),
        TensorDescriptor(weight, [out_dim, in_dim], [in_dim, 1], [FP8_BLOCK, FP8_BLOCK], BYTES),
        TensorDescriptor(out, [num_tokens, out_dim], [out_dim, 1], [64, FP8_BLOCK], HALVES),
        x_scales,
        weight_scales,
        num_tokens,
        num_t,
        num_n,
        num_blocks,
        *x_scales.stride(),
        CONSUMERS=chosen.consumers,
        STAGES=chosen.num_stages,
        GROUP=GROUP,
        REGS=chosen.regs,
        num_warps=4,
        maxnreg=chosen.maxnreg,
    )
    return out


def aot_of(chosen: Config, dtype: str = "bf16") -> Aot:
    """One configuration, to compile offline."""
    constexprs = {"CONSUMERS": chosen.consumers, "STAGES": chosen.num_stages, "GROUP": GROUP, "stride_token": 1}
    return Aot(
        _product,
        {
            "x_desc": f"tensordesc<fp8e4nv[64, {FP8_BLOCK}],{BYTES!r}>",
            "w_desc": f"tensordesc<fp8e4nv[{FP8_BLOCK}, {FP8_BLOCK}],{BYTES!r}>",
            "out_desc": f"tensordesc<{dtype}[64, {FP8_BLOCK}],{HALVES!r}>",
            **dict.fromkeys(("x_scales", "weight_scales"), "*fp32"),
            **dict.fromkeys(("num_tokens", "num_t", "num_n", "num_blocks", "stride_block"), "i32"),
        },
        constexprs | {"REGS": chosen.regs},
        divisible=("x_scales", "weight_scales"),
        wants=("wgmma", "tma", "setmaxnreg"),
        maxnreg=chosen.maxnreg,
    )


def _aot():
    for num_tokens in (128, 8192):
        yield aot_of(pick(num_tokens, 4096))
    yield aot_of(pick(8192, 4096), "fp16")


def _takes(case) -> bool:
    whole = case.in_dim % 16 == 0 and case.out_dim % 8 == 0  # rows of whole 16 bytes, as TMA wants them
    return case.dtype in (torch.bfloat16, torch.float16) and case.num_tokens > 64 and whole


@linear_fp8.kernel(needs="sm90a", when=_takes, batch_invariant=True, order="k128", interpretable=False, aot=_aot)
def warp_groups(x, x_scales, weight, weight_scales, dtype):
    return run(x, x_scales, weight, weight_scales, dtype, pick(x.shape[0], weight.shape[0]))
