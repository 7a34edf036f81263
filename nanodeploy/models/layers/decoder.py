"""What every decoder-only family has around its attention and MLPs.

Axes: T tokens of a step, N of them whose logits are wanted, D model, V vocabulary. Attribute names are those of
checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nanodeploy import ops
from nanodeploy.models.batch import Batch, CacheNeeds
from nanodeploy.models.layers.linear import Embedding, Linear
from nanodeploy.models.layers.norm import RMSNorm
from nanodeploy.models.layers.regional import compile_layers, mark_sizes
from nanodeploy.models.layers.rope import Rope
from nanodeploy.models.model import LanguageModel


class Layer(nn.Module):
    """Attention, then an MLP or what stands in its place, each behind a norm and added to the residual stream.

    Both say what they take by `takes_fp8`; attention also what it keeps, `cache_need()`, and with `planned(rows)` what
    all layers may share of a step.
    """

    def __init__(self, dim: int, eps: float, attention: nn.Module, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = RMSNorm(dim, eps)
        self.self_attn: Any = attention
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp: Any = mlp

    def forward(
        self, x: Tensor, residual: Tensor, batch: Batch, cache: tuple[Tensor | None, ...], cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x [T, D], the last layer's output, is yet to be added to residual [T, D]; so is the x that returns."""
        normed, residual = self.input_layernorm(x, residual, self.self_attn.takes_fp8)
        x = self.self_attn(normed, batch, cache, cos_sin)
        normed, residual = self.post_attention_layernorm(x, residual, self.mlp.takes_fp8)
        return self.mlp(normed, batch), residual


class Decoder(nn.Module):
    def __init__(self, vocab_size: int, dim: int, eps: float, rope: Rope, layers: Sequence[Layer]):
        super().__init__()
        self.embed_tokens = Embedding(vocab_size, dim, shard="rows")
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(dim, eps)
        self.register_buffer("cos_sin", rope.table(), persistent=False)
        self.compiled = False

    def forward(self, batch: Batch, caches: list[Any]) -> Tensor:
        x = self.embed_tokens(batch.tokens)
        first: Any = self.layers[0]
        batch = replace(batch, rows=first.self_attn.planned(batch.rows))
        residual = torch.zeros_like(x)  # so that the first layer is a layer like the others, and compiles as one
        seen: set[type] = set()
        for layer, cache in zip(self.layers, caches, strict=True):
            if self.compiled and type(layer.mlp) not in seen:  # code of its own
                seen.add(type(layer.mlp))
                mark_sizes(batch, x, residual, cache)
            x, residual = layer(x, residual, batch, cache, self.cos_sin)
        x, _ = self.norm(x[batch.logit_rows], residual[batch.logit_rows])
        return x


class CausalLM(LanguageModel):
    """A decoder and an output layer. A family's file says of which layers it is made."""

    def __init__(self, vocab_size: int, dim: int, eps: float, rope: Rope, tied: bool, layers: Sequence[Layer]):
        """tied: the output layer is the embedding."""
        super().__init__()
        self.model = Decoder(vocab_size, dim, eps, rope, layers)
        self.lm_head = None if tied else Linear(dim, vocab_size, shard="rows")
        self.vocab_size = vocab_size
        self.max_model_len = rope.max_len
        if tied:  # some tied checkpoints carry the output layer all the same; as in transformers, it has no say
            self.ignored_tensors = ("lm_head.weight",)

    def cache_needs(self) -> list[CacheNeeds]:
        layers: Any = self.model.layers
        return [layer.self_attn.cache_need() for layer in layers]

    def forward(self, batch: Batch, caches: list[Any]) -> Tensor:
        return self.model(batch, caches)

    def logits(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return ops.linear(hidden, head.weight)

    def compile_layers(self, backend: str | Callable = "inductor") -> None:
        compile_layers(self.model.layers, backend)
        self.model.compiled = True
