"""What one forward pass is told: the Batch, and the caches that layers ask for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.errors import ConfigError
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK, KVLayout, LatentLayout
from nanodeploy.ops.paged_attention import Rows


@dataclass(frozen=True)
class Batch:
    """The tokens of one step. Sequences stand in order: first the decodes (one token each), then the prefill chunks.

    Only T, the number of tokens, varies between calls for a layer, so a layer compiles once.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, where to store each token's KV: page * page_size + offset; -1 is padding
    rows: Rows  # which of the tokens are whose
    logit_rows: Tensor  # [N] int64, rows of T whose logits are wanted


@dataclass(frozen=True)
class KVPages:
    """A layer keeps keys and values of every token, in pages."""

    num_kv_heads: int
    head_dim: int

    def layout(self, page_size: int, dtype: torch.dtype) -> KVLayout:
        return KVLayout(page_size, self.num_kv_heads, self.head_dim, dtype)


@dataclass(frozen=True)
class LatentPages:
    """A layer keeps a latent of every token, and a key that its heads share, in pages."""

    rank: int
    rope_dim: int

    def layout(self, page_size: int, dtype: torch.dtype) -> LatentLayout:
        """Raises ConfigError where this model has no FP8 cache."""
        if dtype == E4M3 and self.rank % FP8_BLOCK:
            raise ConfigError(
                f"--kv_cache_dtype fp8: the model's latents have {self.rank} values (kv_lora_rank); FP8 pages hold "
                f"multiples of {FP8_BLOCK}. Use --kv_cache_dtype auto."
            )
        return LatentLayout(page_size, self.rank, self.rope_dim, dtype)


CacheNeeds = KVPages | LatentPages  # what grows: index pages, recurrent state, windows
