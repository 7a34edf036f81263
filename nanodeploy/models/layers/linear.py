"""Matrix layers. Axes: T tokens, V vocabulary.

`shard` says how a layer is cut when several devices hold one model; a layer alone does not depend on it:
"rows" cuts the weight's rows, each device makes some of the outputs; "cols" cuts its columns, each device takes some
of the inputs and the outputs are summed; None is held whole by each.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from nanodeploy import ops

Shard = Literal["rows", "cols"] | None


class Linear(nn.Module):
    """y = x W^T without bias. Several `out_features` are projections of one input, fused: their rows stand stacked."""

    def __init__(self, in_features: int, *out_features: int, shard: Shard = None):
        super().__init__()
        self.parts = out_features  # rows of each projection; a fused layer is cut part by part
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(sum(out_features), in_features), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, sum of out]."""
        return ops.linear(x, self.weight)


class Embedding(nn.Module):
    """Rows of a table, [V, D]."""

    def __init__(self, num_rows: int, dim: int, shard: Shard = None):
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(num_rows, dim), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] int64 -> [T, D]."""
        return nn.functional.embedding(tokens, self.weight)
