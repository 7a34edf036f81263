"""Qwen3, dense (arXiv:2505.09388; transformers: Qwen3ForCausalLM).

Grouped-query attention whose heads are normed before they are rotated, SwiGLU, RMS norms ahead of each block.
Axes: D model, H query heads, K kv heads, E head dim, I inner width of the MLP, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from nanodeploy.errors import ConfigError
from nanodeploy.models.fields import boolean, integer, number, only
from nanodeploy.models.layers.attention import GroupedQueryAttention
from nanodeploy.models.layers.decoder import CausalLM, Layer
from nanodeploy.models.layers.mlp import MLP
from nanodeploy.models.layers.rope import Rope


@dataclass(frozen=True)
class Shape:
    vocab_size: int  # V
    num_layers: int
    hidden_size: int  # D
    num_heads: int  # H
    num_kv_heads: int  # K
    head_dim: int  # E; H * E need not be D
    intermediate_size: int  # I
    eps: float
    rope: Rope
    tied: bool  # the output layer is the embedding

    @staticmethod
    def from_hf(config: dict[str, Any]) -> "Shape":
        """Read config.json. Raises ConfigError for a value that is wrong or a variant that is not implemented."""
        only(config, "hidden_act", "silu", "silu")
        only(config, "attention_bias", False, False)
        only(config, "partial_rotary_factor", 1.0, 1.0)
        num_layers = integer(config, "num_hidden_layers")
        _refuse_windows(config, num_layers)
        num_heads = integer(config, "num_attention_heads")
        num_kv_heads = integer(config, "num_key_value_heads", num_heads)
        head_dim = integer(config, "head_dim", 128)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {num_heads} is no multiple of num_key_value_heads {num_kv_heads}."
            )
        if head_dim % 2:
            raise ConfigError(f"config.json: head_dim is {head_dim}; rotary positions want an even one.")
        return Shape(
            vocab_size=integer(config, "vocab_size"),
            num_layers=num_layers,
            hidden_size=integer(config, "hidden_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            intermediate_size=integer(config, "intermediate_size"),
            eps=number(config, "rms_norm_eps", 1e-6),
            rope=Rope.from_hf(config, head_dim),
            tied=boolean(config, "tie_word_embeddings", False),
        )


def _refuse_windows(config: dict[str, Any], num_layers: int) -> None:
    """Sliding windows are off in every Qwen3 that was published; a config that turns them on is another model."""
    windowed = config.get("use_sliding_window") and config.get("sliding_window")
    kinds = config.get("layer_types") or (
        ["sliding_attention"] if windowed and config.get("max_window_layers", 28) < num_layers else []
    )
    if set(kinds) - {"full_attention"}:
        raise ConfigError("config.json asks for sliding-window layers; nanodeploy's Qwen3 has full attention only.")


def layers(shape: Shape, mlps: Iterable[nn.Module]) -> list[Layer]:
    """One layer around each MLP, or what stands in its place."""
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim
    return [
        Layer(shape.hidden_size, shape.eps, GroupedQueryAttention(shape.hidden_size, *sizes, shape.eps), mlp)
        for mlp in mlps
    ]


class Model(CausalLM):
    def __init__(self, shape: Shape):
        mlps = (MLP(shape.hidden_size, shape.intermediate_size) for _ in range(shape.num_layers))
        sizes = shape.vocab_size, shape.hidden_size, shape.eps
        super().__init__(*sizes, shape.rope, shape.tied, layers(shape, mlps))
        self.shape = shape
