"""One row per program, the whole row in registers."""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.rms_norm.reference import rms_norm


@triton.jit
def _one_row(x, weight, out, stride_x, dim, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < dim
    gain = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    wait(PDL)
    values = tl.load(x + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / dim + eps)
    tl.store(out + row * dim + cols, (values * scale * gain).to(out.dtype.element_ty), mask=mask)


def _num_warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _aot():
    for block in (1024, 4096, 8192):
        yield Aot(
            _one_row,
            {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "stride_x": "i32", "dim": "i32", "eps": "fp32"},
            {"BLOCK": block, "PDL": True},
            num_warps=_num_warps(block),
            divisible=("x", "weight", "out", "stride_x", "dim"),
        )


@rms_norm.kernel(needs="sm80", when=lambda case: case.dim <= 16384, batch_invariant=True, aot=_aot)
def one_row(x, weight, eps):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0]:
        block = triton.next_power_of_2(x.shape[1])
        _one_row[(x.shape[0],)](
            x, weight, out, x.stride(0), x.shape[1], eps,
            BLOCK=block, num_warps=_num_warps(block), **overlap.launch(),
        )  # fmt: skip
    return out
