import torch
from torch import Tensor, nn

from nanodeploy import ops


class RMSNorm(nn.Module):
    """Root mean square norm with a learned gain over the last axis, D."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Add a block's output x to the residual stream, both [T, D]; returns (norm of the sum, the sum)."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
