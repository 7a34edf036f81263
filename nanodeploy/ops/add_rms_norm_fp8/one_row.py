"""One row per program, as in add_rms_norm/one_row.py; the norm's blocks of 128 columns are scaled in registers."""

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import overlap
from nanodeploy.ops.add_rms_norm_fp8.reference import add_rms_norm_fp8
from nanodeploy.ops.e4m3 import block_scales, to_e4m3
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK, empty_token_scales
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

_BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit
def _add_one_row(
    x, residual, weight, values, scales, total, stride_x, stride_residual, dim, stride_scales, eps,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    cols = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask = cols < dim
    gain = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    added = tl.load(x + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    kept = tl.load(residual + row * stride_residual + cols, mask=mask, other=0.0).to(tl.float32)
    rounded = (kept + added).to(total.dtype.element_ty)
    tl.store(total + row * dim + cols, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    norm = tl.rsqrt(tl.sum(tl.sum(wide * wide, axis=1), axis=0) / dim + eps)
    normed = wide * norm * gain
    scale, factor = block_scales(tl.max(tl.abs(normed), axis=1))
    tl.store(values + row * dim + cols, to_e4m3(normed * factor[:, None], INTERPRETED), mask=mask)
    tl.store(scales + blocks.to(tl.int64) * stride_scales + row, scale, mask=blocks * _BLOCK < dim)


def _launch(dim: int) -> dict[str, int]:
    blocks = triton.next_power_of_2(triton.cdiv(dim, FP8_BLOCK))
    return {"BLOCKS": blocks, "num_warps": min(16, max(1, blocks // 2))}


def _aot():
    pointers = ("x", "residual", "weight", "total")
    strides = ("stride_x", "stride_residual", "dim", "stride_scales")
    for dtype in ("*bf16", "*fp16"):
        for dim in (1024, 4096, 7168):
            launch = _launch(dim)
            yield Aot(
                _add_one_row,
                dict.fromkeys(pointers, dtype)
                | {"values": "*fp8e4nv", "scales": "*fp32", **dict.fromkeys(strides, "i32"), "eps": "fp32"},
                {"BLOCKS": launch["BLOCKS"], "INTERPRETED": False, "PDL": True},
                num_warps=launch["num_warps"],
                divisible=(*pointers, "values", "scales", "stride_x", "stride_residual", "dim"),
                wants=("ld.v4", "cvt.rn.satfinite.e4m3x2"),
            )


@add_rms_norm_fp8.kernel(needs="sm89", when=lambda case: case.dim <= 16384, batch_invariant=True, aot=_aot)
def one_row(x, residual, weight, eps):
    num_tokens, dim = x.shape
    assert dim == 1 or x.stride(1) == residual.stride(1) == 1, "rows must be contiguous"
    values = torch.empty((num_tokens, dim), dtype=E4M3, device=x.device)
    scales = empty_token_scales(num_tokens, dim, x.device)
    total = torch.empty((num_tokens, dim), dtype=x.dtype, device=x.device)
    if num_tokens:
        _add_one_row[(num_tokens,)](
            x, residual, weight, values, scales, total, x.stride(0), residual.stride(0), dim, scales.stride(1), eps,
            INTERPRETED=triton_interpret(), **_launch(dim), **overlap.launch(),
        )  # fmt: skip
    return values, scales, total
