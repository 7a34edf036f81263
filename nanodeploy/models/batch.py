"""What one forward pass is told: the Batch, and the caches that layers ask for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.layouts import KVLayout
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


CacheNeeds = KVPages  # grows into a union: latent pages, index pages, recurrent state, windows
