import torch
from torch import Tensor

from nanodeploy.ops.layouts import E4M3, empty_token_scales
from nanodeploy.ops.quantize_fp8.reference import quantised
from nanodeploy.ops.registry import op


@op(
    out=lambda x, residual, weight, eps: (
        x.new_empty(x.shape, dtype=E4M3),
        empty_token_scales(x.shape[0], x.shape[1], x.device),
        x.new_empty(x.shape),
    )
)
def add_rms_norm_fp8(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """ops.add_rms_norm whose norm goes straight from fp32 to FP8, as ops.quantize_fp8 has it.

    x, residual [T, D], rows may be strided; weight [D]. Returns (values [T, D] float8_e4m3fn, scales [T, ceil(D / 128)]
    fp32, new_residual [T, D] in x.dtype). Sums in fp32.
    """
    total = x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return *quantised(wide * scale * weight.to(wide.dtype)), total.contiguous()
