import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x, gate, weight, eps: x.new_empty(x.shape))
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm of each head, times a gate: what ends a Gated DeltaNet layer (arXiv:2412.06464).

    x and gate [T, H, V], tokens may be strided; weight [V] in any dtype. Returns
    x / sqrt(mean(x^2) + eps) * weight * silu(gate) over the last axis, [T, H, V] in x.dtype, contiguous. In fp32, one
    rounding.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    values = x.to(wide)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    return (values * scale * weight.to(wide) * torch.nn.functional.silu(gate.to(wide))).to(x.dtype)
