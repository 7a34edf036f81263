"""What one forward pass is told: the Batch, and the caches that layers ask for."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.layouts import KVLayout


@dataclass(frozen=True)
class Batch:
    """The tokens of one step. Sequences stand in order: first the decodes (one token each), then the prefill chunks.

    The per-sequence tensors may be longer than the batch (they are the runner's fixed buffers); `counts` says how many
    rows count. It lies on the host, so that an opaque op can read it without a sync and torch.compile never guards
    on it. Only T varies between calls, so a layer compiles once.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64, where to store each token's KV: page * page_size + offset; -1 is padding
    page_table: Tensor  # [S, max_pages] int32
    kv_lens: Tensor  # [S] int32, tokens of context including this step's; 0 is padding
    cu_q_lens: Tensor  # [S + 1] int32, first query row of each prefill chunk, counted from the first prefill token
    counts: Tensor  # [2] int32 on the host: number of decodes, number of prefill chunks
    logit_rows: Tensor  # [N] int64, rows of T whose logits are wanted


@dataclass(frozen=True)
class KVPages:
    """A layer keeps keys and values of every token, in pages."""

    num_kv_heads: int
    head_dim: int

    def layout(self, page_size: int, dtype: torch.dtype) -> KVLayout:
        return KVLayout(page_size, self.num_kv_heads, self.head_dim, dtype)


CacheNeeds = KVPages  # grows into a union: latent pages, index pages, recurrent state, windows
