"""Qwen3, mixture of experts (arXiv:2505.09388; transformers: Qwen3MoeForCausalLM).

Qwen3 with experts in the place of most or all of its MLPs: softmax over all, the best k, no shared expert.
Axes: D model, E experts, k of them for each token, I inner width of an expert.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from nanodeploy.errors import ConfigError
from nanodeploy.models import qwen3
from nanodeploy.models.fields import boolean, integer, only
from nanodeploy.models.layers.decoder import CausalLM
from nanodeploy.models.layers.experts import Routing
from nanodeploy.models.layers.mlp import MLP
from nanodeploy.models.layers.moe import MoE


@dataclass(frozen=True)
class Shape(qwen3.Shape):
    """intermediate_size is the inner width of the MLPs of dense layers."""

    moe_intermediate_size: int  # I
    routing: Routing
    sparse: tuple[bool, ...]  # of each layer: whether it has experts

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Shape":
        """Read config.json. Raises ConfigError for a value that is wrong or a variant that is not implemented."""
        dense = qwen3.Shape.from_hf(config)
        only(config, "qkv_bias", False, False)
        only(config, "use_qk_norm", True, True)
        only(config, "use_sliding_window", False, False)
        only(config, "shared_expert_intermediate_size", 0, 0)
        # transformers 5 writes num_local_experts
        num_experts = integer(config, "num_experts", config.get("num_local_experts"))
        top_k = integer(config, "num_experts_per_tok")
        if top_k > num_experts:
            raise ConfigError(f"config.json: num_experts_per_tok is {top_k}; there are {num_experts} (num_experts).")
        step = integer(config, "decoder_sparse_step", 1)
        return Shape(
            **vars(dense),
            moe_intermediate_size=integer(config, "moe_intermediate_size"),
            routing=Routing(num_experts, top_k, renormalise=boolean(config, "norm_topk_prob", False)),
            sparse=tuple((i + 1) % step == 0 and i not in _mlp_only(config) for i in range(dense.num_layers)),
        )


def _mlp_only(config: dict[str, Any]) -> list[int]:
    """Indices of layers that are dense whatever decoder_sparse_step says."""
    value = config.get("mlp_only_layers") or []
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise ConfigError(f"config.json: mlp_only_layers is {value!r}; wanted a list of layer indices.")
    return value


class Model(CausalLM):
    def __init__(self, shape: Shape):
        def mlp(sparse: bool) -> nn.Module:
            if sparse:
                return MoE(shape.hidden_size, shape.moe_intermediate_size, shape.routing)
            return MLP(shape.hidden_size, shape.intermediate_size)

        sizes = shape.vocab_size, shape.hidden_size, shape.eps
        super().__init__(*sizes, shape.rope, shape.tied, qwen3.layers(shape, map(mlp, shape.sparse)))
        self.shape = shape
