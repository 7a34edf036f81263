"""One token, or hardly more: nothing but the stream of the weights counts. More than one are tiles.py's.

One token: dot products with rows of its experts' weights, elementwise in registers; nothing is sorted. A program of
the first kernel makes a few values of h for one slot; one of the second goes through all slots in their order for a
few columns of the result, so that nothing is left to combine.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import overlap
from nanodeploy.ops.e4m3 import block_scales, to_e4m3
from nanodeploy.ops.layouts import FP8_BLOCK
from nanodeploy.ops.moe_gemm import tiles
from nanodeploy.ops.moe_gemm.reference import moe_gemm, out_dtype
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

MAX_TOKENS = 4


@dataclass(frozen=True)
class Config:
    rows: int  # of the weight, per program
    block: int  # of the inner axis, per step; the steps are unrolled
    num_warps: int


# What bench/sweeps/moe_gemm.py found: (D, I, fp8) -> of the first product, of the second.
TUNED: dict[tuple[int, int, bool], tuple[Config, Config]] = {}


def configs(dim: int, inner: int, fp8: bool) -> tuple[Config, Config]:
    """The measured configurations of a shape, else ones that fit it."""
    return TUNED.get((dim, inner, fp8)) or (_config(dim, fp8), _config(inner, fp8))


def _config(width: int, fp8: bool) -> Config:
    """Four rows (of one byte a value, two), in steps of a power of two that divides the width, if a large one does."""
    block = min(1024, width & -width)
    if block < 256:
        block = max(FP8_BLOCK if fp8 else 16, min(1024, triton.next_power_of_2(width)))
    return Config(2, block, max(1, min(4, block // 256))) if fp8 else Config(4, block, 4)


@triton.jit
def _weights(at, cols, WIDTH: tl.constexpr, BLOCK: tl.constexpr, there):
    """Rows [ROWS] of a weight from column `cols` on, as fp32; zeros where nothing is to be read."""
    if WIDTH % BLOCK == 0:
        mask = there & (cols >= 0)
    else:
        mask = there & (cols < WIDTH)
    return tl.load(at[:, None] + cols[None, :], mask=mask[None, :], other=0.0, eviction_policy="evict_first").to(
        tl.float32
    )


@triton.jit
def _requantised(values, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 values [BLOCK] as FP8 would keep them."""
    blocks = values.reshape(BLOCK // WIDTH, WIDTH)
    scale, factor = block_scales(tl.max(tl.abs(blocks), axis=1))
    return (to_e4m3(blocks * factor[:, None], INTERPRETED).to(tl.float32) * scale[:, None]).reshape(BLOCK)


@triton.jit
def _first(
    x, x_scales, ids, gate_up, gate_up_scales, h, inner, stride_x_scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """h [k, I] = silu(G x) * (U x), for each expert of the token."""
    go(PDL)
    blocks: tl.constexpr = (DIM + SCALED - 1) // SCALED  # of scales in a row of weights
    slot = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    wait(PDL)
    expert = tl.load(ids + slot).to(tl.int64)
    if expert >= 0:
        # Rows past the end read the last one; their results are not stored.
        gate_at = gate_up + (expert * 2 * inner + tl.minimum(rows, inner - 1)) * DIM
        up_at = gate_at + inner.to(tl.int64) * DIM
        gate = tl.zeros((ROWS, BLOCK), tl.float32)
        up = tl.zeros((ROWS, BLOCK), tl.float32)
        for step in tl.static_range(0, DIM, BLOCK):
            cols = step + lanes
            values = tl.load(x + cols, mask=cols < DIM, other=0.0).to(tl.float32)
            gate_values, up_values = values, values
            if gate_up_scales is not None:
                if x_scales is not None:
                    values *= tl.load(x_scales + cols // SCALED * stride_x_scale, mask=cols < DIM, other=0.0)
                else:
                    values = _requantised(values, SCALED, BLOCK, INTERPRETED)
                part = tl.cdiv(inner, SCALED) * blocks
                scale_at = gate_up_scales + expert * 2 * part + tl.program_id(0) * ROWS // SCALED * blocks
                scale_at += cols // SCALED
                gate_values = values * tl.load(scale_at, mask=cols < DIM, other=0.0)
                up_values = values * tl.load(scale_at + part, mask=cols < DIM, other=0.0)
            gate += _weights(gate_at, cols, DIM, BLOCK, True) * gate_values[None, :]
            up += _weights(up_at, cols, DIM, BLOCK, True) * up_values[None, :]
        total = tl.sum(gate, axis=1)
        result = total / (1 + tl.exp(-total)) * tl.sum(up, axis=1)
        tl.store(h + slot * inner + rows, result.to(h.dtype.element_ty), mask=rows < inner)


@triton.jit
def _second(
    h, ids, weights, down, down_scales, out, dim,
    INNER: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [D]: the sum over the slots of weight * (down @ h)."""
    go(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    wait(PDL)
    blocks: tl.constexpr = (INNER + SCALED - 1) // SCALED
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids + slot).to(tl.int64)
        there = expert >= 0
        weight = tl.load(weights + slot, mask=there, other=0.0)
        expert = tl.maximum(expert, 0)
        at = down + (expert * dim + tl.minimum(rows, dim - 1)) * INNER
        for step in tl.static_range(0, INNER, BLOCK):
            cols = step + lanes
            values = tl.load(h + slot * INNER + cols, mask=there & (cols < INNER), other=0.0).to(tl.float32)
            if down_scales is not None:
                scale_at = down_scales + (expert * tl.cdiv(dim, SCALED) + tl.program_id(0) * ROWS // SCALED) * blocks
                values = _requantised(values, SCALED, BLOCK, INTERPRETED)
                values *= tl.load(scale_at + cols // SCALED, mask=cols < INNER, other=0.0)
            total += _weights(at, cols, INNER, BLOCK, there) * (values * weight)[None, :]
    tl.store(out + rows, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=rows < dim)


def run(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales, first: Config, second: Config):
    """One pair of configurations; bench/sweeps/moe_gemm.py calls this too."""
    (_, dim, inner), top_k = down.shape, ids.shape[1]
    assert x.shape[0] == 1 and gate_up.is_contiguous() and down.is_contiguous(), "one token; rows must be contiguous"
    out = torch.empty((1, dim), dtype=out_dtype(x), device=x.device)
    scaled = gate_up_scales is not None
    if scaled:
        assert gate_up_scales.is_contiguous() and down_scales.is_contiguous(), "scales must be contiguous"
        assert FP8_BLOCK % first.rows == FP8_BLOCK % second.rows == 0, "rows of one program share their scales"
    h = torch.empty((top_k, inner), dtype=torch.float32 if scaled else x.dtype, device=x.device)
    _first[(triton.cdiv(inner, first.rows), top_k)](
        x, x_scales, ids, gate_up, gate_up_scales, h, inner, x_scales.stride(1) if x_scales is not None else 0,
        DIM=dim, **_constexprs(first), **overlap.launch(),
    )  # fmt: skip
    _second[(triton.cdiv(dim, second.rows),)](
        h,
        ids,
        weights,
        down,
        down_scales,
        out,
        dim,
        INNER=inner,
        TOP_K=top_k,
        **_constexprs(second),
        **overlap.launch(),
    )
    return out


def _constexprs(config: Config) -> dict[str, Any]:
    shape = {"ROWS": config.rows, "BLOCK": config.block, "SCALED": FP8_BLOCK, "INTERPRETED": triton_interpret()}
    return {**shape, "num_warps": config.num_warps}


def _aot():
    for dim, inner, fp8 in ((2048, 768, False), (2048, 768, True), (7168, 2048, True)):
        kind, scales = ("*fp8e4nv" if fp8 else "*bf16"), ("x_scales", "gate_up_scales", "down_scales")
        constexprs = {"SCALED": FP8_BLOCK, "INTERPRETED": False, "PDL": True} | ({} if fp8 else dict.fromkeys(scales))
        types = {"x": kind, "gate_up": kind, "down": kind, "ids": "*i32", "weights": "*fp32", "out": "*bf16"}
        types |= {"h": "*fp32" if fp8 else "*bf16"} | dict.fromkeys(("inner", "dim", "stride_x_scale"), "i32")
        types |= dict.fromkeys(scales, "*fp32") if fp8 else {}
        first, second = configs(dim, inner, fp8)
        for fn, config, own in ((_first, first, {"DIM": dim}), (_second, second, {"INNER": inner, "TOP_K": 8})):
            values: dict[str, Any] = constexprs | own | {"ROWS": config.rows, "BLOCK": config.block}
            signature = {name: type for name, type in types.items() if name in fn.arg_names}
            yield Aot(
                fn,
                signature,
                {name: value for name, value in values.items() if name in fn.arg_names},
                config.num_warps,
                divisible=tuple(name for name in signature if name != "stride_x_scale"),
                wants=("ld.v4", "griddepcontrol.wait"),
            )


def _takes(case) -> bool:
    return 1 <= case.num_tokens <= MAX_TOKENS and tiles.takes(case)


@moe_gemm.kernel(needs="sm90", when=_takes, aot=_aot)
def streamed(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales):
    args = (x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales)
    (num_experts, dim, inner), fp8 = down.shape, gate_up_scales is not None
    if x.shape[0] == 1:
        return run(*args, *configs(dim, inner, fp8))
    return tiles.run(*args, tiles.schedule(ids.numel(), num_experts, dim, inner, fp8))
