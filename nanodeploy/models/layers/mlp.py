from typing import ClassVar

from torch import Tensor, nn

from nanodeploy.models.batch import Batch
from nanodeploy.models.checkpoint import Stack
from nanodeploy.models.layers.linear import Linear
from nanodeploy.ops.layouts import Quantised


class MLP(nn.Module):
    """SwiGLU (arXiv:2002.05202): down(silu(gate x) * (up x)). Axes: T tokens, D model."""

    checkpoint: ClassVar = {"gate_up.weight": Stack("gate_proj.weight", "up_proj.weight")}

    def __init__(self, dim: int, inner: int):
        super().__init__()
        self.gate_up = Linear(dim, inner, inner, shard="rows")
        self.down_proj = Linear(inner, dim, shard="cols")

    @property
    def takes_fp8(self) -> bool:
        return self.gate_up.takes_fp8

    def forward(self, x: Tensor | Quantised, batch: Batch) -> Tensor:
        """x [T, D] -> [T, D]. What kind of token stands in a row is nothing to it."""
        return self.down_proj(self.gate_up.silu_mul(x, fp8=self.down_proj.takes_fp8))
