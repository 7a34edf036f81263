"""DeepSeek-V3 (arXiv:2412.19437; transformers: DeepseekV3ForCausalLM).

Latent attention in every layer. The first layers have an MLP, the others experts: chosen within the best groups by
their sigmoid and a bias that balances their load, beside shared ones that every token goes to.
Axes: D model, H heads, E experts, k of them for each token, I inner width of an expert, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

from nanodeploy.errors import ConfigError
from nanodeploy.models.fields import boolean, integer, number, only
from nanodeploy.models.layers.decoder import CausalLM, Layer
from nanodeploy.models.layers.experts import Routing
from nanodeploy.models.layers.latent_attention import LatentAttention, LatentDims
from nanodeploy.models.layers.mlp import MLP
from nanodeploy.models.layers.moe import MoE
from nanodeploy.models.layers.rope import Rope


@dataclass(frozen=True)
class Shape:
    vocab_size: int  # V
    num_layers: int
    hidden_size: int  # D
    attention: LatentDims
    intermediate_size: int  # of an MLP
    moe_intermediate_size: int  # I
    routing: Routing
    num_shared_experts: int
    sparse: tuple[bool, ...]  # of each layer: whether it has experts
    num_mtp_layers: int  # which the checkpoint has behind the others, and which only drafts want
    eps: float
    rope: Rope
    tied: bool  # the output layer is the embedding

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Shape":
        """Read config.json. Raises ConfigError for a value that is wrong or a variant that is not implemented."""
        only(config, "hidden_act", "silu", "silu")
        only(config, "attention_bias", False, False)
        only(config, "rope_interleave", True, True)
        num_layers = integer(config, "num_hidden_layers")
        num_dense = integer(config, "first_k_dense_replace", least=0)
        every = integer(config, "moe_layer_freq", 1)
        rope = Rope.from_hf(config, _rope_dim(config))
        return Shape(
            vocab_size=integer(config, "vocab_size"),
            num_layers=num_layers,
            hidden_size=integer(config, "hidden_size"),
            attention=_attention(config),
            intermediate_size=integer(config, "intermediate_size"),
            moe_intermediate_size=integer(config, "moe_intermediate_size"),
            routing=_routing(config),
            num_shared_experts=integer(config, "n_shared_experts", 0, least=0),
            sparse=tuple(i >= num_dense and i % every == 0 for i in range(num_layers)),
            num_mtp_layers=integer(config, "num_nextn_predict_layers", 0, least=0),
            eps=number(config, "rms_norm_eps", 1e-6),
            rope=rope,
            tied=boolean(config, "tie_word_embeddings", False),
        )


def _rope_dim(config: dict[str, Any]) -> int:
    dim = integer(config, "qk_rope_head_dim")
    if dim % 2:
        raise ConfigError(f"config.json: qk_rope_head_dim is {dim}; rotary positions want an even one.")
    return dim


def _attention(config: dict[str, Any]) -> LatentDims:
    num_heads = integer(config, "num_attention_heads")
    only(config, "num_key_value_heads", num_heads, num_heads)
    return LatentDims(
        num_heads=num_heads,
        q_rank=None if config.get("q_lora_rank") is None else integer(config, "q_lora_rank"),
        rank=integer(config, "kv_lora_rank"),
        nope_dim=integer(config, "qk_nope_head_dim"),
        rope_dim=_rope_dim(config),
        value_dim=integer(config, "v_head_dim"),
    )


def _routing(config: dict[str, Any]) -> Routing:
    only(config, "scoring_func", "sigmoid", "sigmoid")
    only(config, "topk_method", "noaux_tc", "noaux_tc")
    num_experts, top_k = integer(config, "n_routed_experts"), integer(config, "num_experts_per_tok")
    num_groups, top_groups = integer(config, "n_group"), integer(config, "topk_group")
    if num_experts % num_groups:
        raise ConfigError(f"config.json: n_routed_experts {num_experts} is no multiple of n_group {num_groups}.")
    if top_groups > num_groups:
        raise ConfigError(f"config.json: topk_group is {top_groups}; there are {num_groups} groups (n_group).")
    num_kept = num_experts // num_groups * top_groups
    if top_k > num_kept:
        raise ConfigError(
            f"config.json: num_experts_per_tok is {top_k}; {top_groups} of {num_groups} groups (topk_group, n_group) "
            f"keep {num_kept} of the {num_experts} experts (n_routed_experts)."
        )
    return Routing(
        num_experts,
        top_k,
        scoring="sigmoid",
        num_groups=num_groups,
        top_groups=top_groups,
        renormalise=boolean(config, "norm_topk_prob", True),
        scale=number(config, "routed_scaling_factor"),
        has_bias=True,
    )


class Model(CausalLM):
    def __init__(self, shape: Shape):
        dim, eps = shape.hidden_size, shape.eps

        def layer(sparse: bool) -> Layer:
            attention = LatentAttention(dim, shape.attention, shape.rope.logit_gain)
            if not sparse:
                return Layer(dim, eps, attention, MLP(dim, shape.intermediate_size))
            mixture = MoE(dim, shape.moe_intermediate_size, shape.routing, shape.num_shared_experts)
            return Layer(dim, eps, attention, mixture)

        super().__init__(shape.vocab_size, dim, eps, shape.rope, shape.tied, [layer(sparse) for sparse in shape.sparse])
        self.shape = shape
        # The layers that draft further tokens (multi-token prediction): speculative decoding will load them.
        drafting = range(shape.num_layers, shape.num_layers + shape.num_mtp_layers)
        self.ignored_tensors += tuple(f"model.layers.{index}.*" for index in drafting)
