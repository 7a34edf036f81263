import torch
from torch import Tensor, nn

from nanodeploy import ops
from nanodeploy.ops.layouts import Quantised


class RMSNorm(nn.Module):
    """Root mean square norm with a learned gain over the last axis, D."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor, fp8: bool = False) -> tuple[Tensor | Quantised, Tensor]:
        """Add a block's output x to the residual stream, both [T, D]; returns (norm of the sum, the sum).

        fp8: the norm in FP8, for a layer whose weight is.
        """
        if not fp8:
            return ops.add_rms_norm(x, residual, self.weight, self.eps)
        values, scales, total = ops.add_rms_norm_fp8(x, residual, self.weight, self.eps)
        return Quantised(values, scales, x.dtype), total
