"""One row per program, the whole row in registers: the sum never goes back to memory before it is normed."""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.add_rms_norm.reference import add_rms_norm
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot


@triton.jit
def _add_one_row(
    x, residual, weight, y, total, stride_x, stride_residual, dim, eps, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < dim
    gain = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    added = tl.load(x + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    kept = tl.load(residual + row * stride_residual + cols, mask=mask, other=0.0).to(tl.float32)
    rounded = (kept + added).to(total.dtype.element_ty)
    tl.store(total + row * dim + cols, rounded, mask=mask)
    wide = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=0) / dim + eps)
    tl.store(y + row * dim + cols, (wide * scale * gain).to(y.dtype.element_ty), mask=mask)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _aot():
    for dtype in ("*bf16", "*fp16"):
        for block in (1024, 4096, 8192):
            yield Aot(
                _add_one_row,
                dict.fromkeys(("x", "residual", "weight", "y", "total"), dtype)
                | {"stride_x": "i32", "stride_residual": "i32", "dim": "i32", "eps": "fp32"},
                {"BLOCK": block, "PDL": True},
                num_warps=_num_warps(block),
                divisible=("x", "residual", "weight", "y", "total", "stride_x", "stride_residual", "dim"),
                wants=("ld.v4",),
            )


@add_rms_norm.kernel(needs="sm80", when=lambda case: case.dim <= 16384, batch_invariant=True, aot=_aot)
def one_row(x, residual, weight, eps):
    num_tokens, dim = x.shape
    assert dim == 1 or x.stride(1) == residual.stride(1) == 1, "rows must be contiguous"
    y, total = (torch.empty((num_tokens, dim), dtype=x.dtype, device=x.device) for _ in range(2))
    if num_tokens:
        block = triton.next_power_of_2(dim)
        _add_one_row[(num_tokens,)](
            x, residual, weight, y, total, x.stride(0), residual.stride(0), dim, eps,
            BLOCK=block, num_warps=_num_warps(block), **overlap.launch(),
        )  # fmt: skip
    return y, total
