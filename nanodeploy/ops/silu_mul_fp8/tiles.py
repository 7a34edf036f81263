"""One stretch of one row per program, as in silu_mul/tiles.py, of whole blocks of 128 columns."""

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import overlap
from nanodeploy.ops.e4m3 import block_scales, to_e4m3
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK, empty_token_scales
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.silu_mul_fp8.reference import silu_mul_fp8

BLOCKS = 8  # of 128 columns, per program
_BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit
def _silu_mul(
    x, values, scales, stride_x, dim, stride_scales,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    cols = blocks[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask = cols < dim
    wait(PDL)
    gate = tl.load(x + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + dim + cols, mask=mask, other=0.0).to(tl.float32)
    wide = gate / (1 + tl.exp(-gate)) * up
    scale, factor = block_scales(tl.max(tl.abs(wide), axis=1))
    tl.store(values + row * dim + cols, to_e4m3(wide * factor[:, None], INTERPRETED), mask=mask)
    tl.store(scales + blocks.to(tl.int64) * stride_scales + row, scale, mask=blocks * _BLOCK < dim)


def _aot():
    for dtype in ("*bf16", "*fp16"):
        yield Aot(
            _silu_mul,
            {"x": dtype, "values": "*fp8e4nv", "scales": "*fp32"}
            | dict.fromkeys(("stride_x", "dim", "stride_scales"), "i32"),
            {"BLOCKS": BLOCKS, "INTERPRETED": False, "PDL": True},
            divisible=("x", "values", "scales", "stride_x", "dim"),
            wants=("ld.v4", "cvt.rn.satfinite.e4m3x2"),
        )


@silu_mul_fp8.kernel(needs="sm89", batch_invariant=True, aot=_aot)
def tiles(x):
    num_tokens, dim = x.shape[0], x.shape[1] // 2
    assert x.stride(1) == 1, "rows must be contiguous"
    values = torch.empty((num_tokens, dim), dtype=E4M3, device=x.device)
    scales = empty_token_scales(num_tokens, dim, x.device)
    if num_tokens:
        _silu_mul[(num_tokens, triton.cdiv(dim, BLOCKS * FP8_BLOCK))](
            x, values, scales, x.stride(0), dim, scales.stride(1),
            BLOCKS=BLOCKS, INTERPRETED=triton_interpret(), **overlap.launch(),
        )  # fmt: skip
    return values, scales
