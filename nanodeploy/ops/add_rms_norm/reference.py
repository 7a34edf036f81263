import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x, residual, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape)))
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and norm the sum (arXiv:1910.07467).

    x, residual [T, D], rows may be strided; weight [D]. Returns (y, new_residual), both [T, D] in x.dtype:
    new_residual = x + residual, rounded; y = RMS norm of the rounded sum. Sums in fp32.
    """
    total = x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype).contiguous(), total.contiguous()
