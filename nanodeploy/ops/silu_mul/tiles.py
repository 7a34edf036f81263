"""One stretch of one row per program: 16 bytes of the gate and of its factor per thread."""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.silu_mul.reference import silu_mul

BLOCK = 1024


@triton.jit
def _silu_mul(x, out, stride_x, dim, BLOCK: tl.constexpr, PDL: tl.constexpr):
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < dim
    wait(PDL)
    gate = tl.load(x + row * stride_x + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + dim + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * dim + cols, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=mask)


def _aot():
    for dtype in ("*bf16", "*fp16"):
        yield Aot(
            _silu_mul,
            {"x": dtype, "out": dtype, "stride_x": "i32", "dim": "i32"},
            {"BLOCK": BLOCK, "PDL": True},
            divisible=("x", "out", "stride_x", "dim"),
            wants=("ld.v4",),
        )


@silu_mul.kernel(needs="sm80", batch_invariant=True, aot=_aot)
def tiles(x):
    num_tokens, dim = x.shape[0], x.shape[1] // 2
    assert x.stride(1) == 1, "rows must be contiguous"
    out = torch.empty((num_tokens, dim), dtype=x.dtype, device=x.device)
    if num_tokens:
        _silu_mul[(num_tokens, triton.cdiv(dim, BLOCK))](x, out, x.stride(0), dim, BLOCK=BLOCK, **overlap.launch())
    return out
