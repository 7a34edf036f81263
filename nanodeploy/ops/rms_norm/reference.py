import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x, weight, eps: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last axis (arXiv:1910.07467).

    x [T, D]; weight [D]; returns x / sqrt(mean(x^2) + eps) * weight, [T, D] in x.dtype. Sums in fp32, one rounding.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)
