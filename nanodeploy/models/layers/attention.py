"""Attention over keys and values of every token, kept as they are.

Axes: T tokens of a step, D model, H query heads, K kv heads, E head dim.
"""

from typing import ClassVar

from torch import Tensor, nn

from nanodeploy import ops
from nanodeploy.models.batch import Batch, KVPages
from nanodeploy.models.checkpoint import Stack
from nanodeploy.models.layers.linear import Linear
from nanodeploy.models.layers.norm import RMSNorm
from nanodeploy.ops.layouts import KVCache, Quantised
from nanodeploy.ops.paged_attention import Rows


class GroupedQueryAttention(nn.Module):
    """H / K query heads share a key and value head (arXiv:2305.13245); heads are normed before they are rotated."""

    checkpoint: ClassVar = {"qkv.weight": Stack("q_proj.weight", "k_proj.weight", "v_proj.weight")}

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, eps: float):
        super().__init__()
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.heads = num_heads, num_kv_heads
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.qkv = Linear(dim, q_size, kv_size, kv_size, shard="rows")
        self.q_norm = RMSNorm(head_dim, eps)
        self.k_norm = RMSNorm(head_dim, eps)
        self.o_proj = Linear(q_size, dim, shard="cols")

    def cache_need(self) -> KVPages:
        return KVPages(self.heads[1], self.head_dim)

    def planned(self, rows: Rows) -> Rows:
        """With the plan that all layers like this one share in a step."""
        return rows.planned(*self.heads)

    @property
    def takes_fp8(self) -> bool:
        return self.qkv.takes_fp8

    def forward(self, x: Tensor | Quantised, batch: Batch, cache: KVCache, cos_sin: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        num_heads, num_kv_heads = self.heads
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [T, H + K + K, E]
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        norms = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
        q = ops.rope_store_kv(q, k, v, *cache, batch.positions, batch.slots, cos_sin, *norms, False)
        mixed = ops.paged_attention(q, cache, batch.rows, self.scale)  # [T, H, E]
        return self.o_proj(mixed.flatten(1))
