"""Qwen3, dense (arXiv:2505.09388; transformers: Qwen3ForCausalLM).

Grouped-query attention whose heads are normed before they are rotated, SwiGLU, RMS norms ahead of each block.
Axes: T tokens of a step, N of them whose logits are wanted, D model, H query heads, K kv heads, E head dim,
I inner width of the MLP, V vocabulary. Attribute names are the checkpoint's.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nanodeploy import ops
from nanodeploy.errors import ConfigError
from nanodeploy.models.batch import Batch, CacheNeeds, KVPages
from nanodeploy.models.checkpoint import Stack
from nanodeploy.models.fields import integer, number, only
from nanodeploy.models.layers.linear import Embedding, Linear
from nanodeploy.models.layers.norm import RMSNorm
from nanodeploy.models.layers.regional import compile_layers, mark_sizes
from nanodeploy.models.layers.rope import Rope
from nanodeploy.models.model import LanguageModel
from nanodeploy.ops.layouts import KVCache


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
            tied=bool(config.get("tie_word_embeddings", False)),
        )


def _refuse_windows(config: dict[str, Any], num_layers: int) -> None:
    """Sliding windows are off in every Qwen3 that was published; a config that turns them on is another model."""
    windowed = config.get("use_sliding_window") and config.get("sliding_window")
    kinds = config.get("layer_types") or (
        ["sliding_attention"] if windowed and config.get("max_window_layers", 28) < num_layers else []
    )
    if set(kinds) - {"full_attention"}:
        raise ConfigError("config.json asks for sliding-window layers; nanodeploy's Qwen3 has full attention only.")


class Attention(nn.Module):
    checkpoint: ClassVar = {"qkv.weight": Stack("q_proj.weight", "k_proj.weight", "v_proj.weight")}

    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.scale = shape.head_dim**-0.5
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.qkv = Linear(shape.hidden_size, q_size, kv_size, kv_size, shard="rows")
        self.q_norm = RMSNorm(shape.head_dim, shape.eps)
        self.k_norm = RMSNorm(shape.head_dim, shape.eps)
        self.o_proj = Linear(q_size, shape.hidden_size, shard="cols")

    def forward(self, x: Tensor, batch: Batch, cache: KVCache, cos_sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, H + K + K, E]
        q, k, v = heads.split([rows // self.head_dim for rows in self.qkv.parts], dim=1)
        norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        q = ops.rope_store_kv(q, k, v, *cache, batch.positions, batch.slots, cos_sin, *norms, False)
        mixed = ops.paged_attention(q, cache, batch.rows, self.scale)  # [T, H, E]
        return self.o_proj(mixed.flatten(1))


class MLP(nn.Module):
    checkpoint: ClassVar = {"gate_up.weight": Stack("gate_proj.weight", "up_proj.weight")}

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_up = Linear(shape.hidden_size, shape.intermediate_size, shape.intermediate_size, shard="rows")
        self.down_proj = Linear(shape.intermediate_size, shape.hidden_size, shard="cols")

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.linear_silu_mul(x, self.gate_up.weight))


class Layer(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.eps)
        self.mlp = MLP(shape)

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: KVCache, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [T, D], the last layer's output, is yet to be added to residual [T, D]; so is the x that returns."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, batch, cache, cos_sin)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.heads = shape.num_heads, shape.num_kv_heads
        self.embed_tokens = Embedding(shape.vocab_size, shape.hidden_size, shard="rows")
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.eps)
        self.register_buffer("cos_sin", shape.rope.table(), persistent=False)
        self.compiled = False

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        x = self.embed_tokens(batch.tokens)
        batch = replace(batch, rows=batch.rows.planned(*self.heads))
        residual = torch.zeros_like(x)  # so that the first layer is a layer like the others, and compiles as one
        if self.compiled:
            mark_sizes(batch, x, residual, caches[0])
        for layer, cache in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, batch, cache, self.cos_sin)
        x, _ = self.norm(x[batch.logit_rows], residual[batch.logit_rows])
        return x


class Model(LanguageModel):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape)
        self.lm_head = None if shape.tied else Linear(shape.hidden_size, shape.vocab_size, shard="rows")
        self.vocab_size = shape.vocab_size
        self.max_model_len = shape.rope.max_len
        if shape.tied:  # some tied checkpoints carry the output layer all the same; as in transformers, it has no say
            self.ignored_tensors = frozenset({"lm_head.weight"})

    def cache_needs(self) -> list[CacheNeeds]:
        return [KVPages(self.shape.num_kv_heads, self.shape.head_dim)] * self.shape.num_layers

    def forward(self, batch: Batch, caches: list[KVCache]) -> Tensor:
        return self.model(batch, caches)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return ops.linear(hidden, head.weight)

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        compile_layers(self.model.layers, backend)
        self.model.compiled = True
