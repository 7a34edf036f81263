"""Byte layouts of what is cached. Allocator, kernels and transports all ask here; nothing is computed twice."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KVLayout:
    """One layer's paged keys and values: [P, 2, page_size, K, E], index 0 of axis 1 keys, 1 values.

    A token's slot is page * page_size + offset. Head-minor rows, so one token's keys of all heads are contiguous.
    """

    page_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def shape(self, num_pages: int) -> tuple[int, int, int, int, int]:
        return (num_pages, 2, self.page_size, self.num_kv_heads, self.head_dim)

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.token_bytes


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens`."""
    return math.ceil(num_tokens / page_size)
