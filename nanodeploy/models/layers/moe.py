from typing import ClassVar

from torch import Tensor, nn

from nanodeploy.models.batch import Batch
from nanodeploy.models.layers.experts import Experts, Router, Routing
from nanodeploy.models.layers.linear import in_fp8
from nanodeploy.models.layers.mlp import MLP


class MoE(nn.Module):
    """A mixture of experts in the place of an MLP, and beside it, if it has any, the experts that every token goes to.

    Axes: T tokens, D model. The shared experts, all of one width, are one MLP as wide as they are together.
    """

    takes_fp8: ClassVar = False  # the router wants the tokens as they are

    def __init__(self, dim: int, inner: int, routing: Routing, num_shared: int = 0):
        super().__init__()
        self.gate = Router(dim, routing)
        self.experts = Experts(routing.num_experts, dim, inner)
        self.shared_experts = MLP(dim, num_shared * inner) if num_shared else None

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """x [T, D] -> [T, D]. Tokens that are padding go to no expert."""
        ids, weights = self.gate(x, batch.slots)
        if self.shared_experts is None:
            return self.experts(x, ids, weights)
        both_fp8 = self.experts.takes_fp8 and self.shared_experts.takes_fp8
        given = in_fp8(x) if both_fp8 else x  # quantised once for the two
        return self.experts(given, ids, weights) + self.shared_experts(given, batch)
