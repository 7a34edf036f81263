"""Byte layouts of what is cached. Allocator, kernels and transports all ask here; nothing is computed twice."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

E4M3_MAX = 448.0
SPLIT_TOKENS = 512  # --deterministic: attention sums its context in stretches of so many tokens
SCALE_BIAS = 127  # a scale byte b stands for 2 ** (b - 127); 255 for infinity, which no page holds


class KVCache(NamedTuple):
    """One layer's paged keys and values."""

    pages: Tensor  # [P, 2, page_size, K, E]; index 0 of axis 1 keys, 1 values
    scales: Tensor | None  # [P, 2, K, page_size] uint8, of e4m3 pages; None: the pages hold the values themselves


@dataclass(frozen=True)
class KVLayout:
    """One layer's paged keys and values: [P, 2, page_size, K, E], index 0 of axis 1 keys, 1 values.

    A token's slot is page * page_size + offset. Head-minor rows, so one token's keys of all heads are contiguous.

    Pages of float8_e4m3fn come with one scale for each token, kv head, and keys or values, a power of two kept as its
    exponent (e8m0, as in the OCP microscaling formats): value = e4m3 * 2 ** (byte - 127). A power of two costs no
    mantissa, one byte for E values, and is read back by a shift. A head's scales of one page are contiguous.
    """

    page_size: int  # tokens
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def scaled(self) -> bool:
        return self.dtype == torch.float8_e4m3fn

    def shape(self, num_pages: int) -> tuple[int, int, int, int, int]:
        return (num_pages, 2, self.page_size, self.num_kv_heads, self.head_dim)

    def scales_shape(self, num_pages: int) -> tuple[int, int, int, int]:
        return (num_pages, 2, self.num_kv_heads, self.page_size)

    def empty(self, num_pages: int, device: torch.device) -> KVCache:
        """The cache itself, not cleared."""
        pages = torch.empty(self.shape(num_pages), dtype=self.dtype, device=device)
        if not self.scaled:
            return KVCache(pages, None)
        return KVCache(pages, torch.empty(self.scales_shape(num_pages), dtype=torch.uint8, device=device))

    @property
    def token_bytes(self) -> int:
        return 2 * self.num_kv_heads * (self.head_dim * self.dtype.itemsize + (1 if self.scaled else 0))

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.token_bytes


def scale_bytes(amax: Tensor) -> Tensor:
    """The scale of values up to `amax` (fp32 or wider, not negative): the least power of two by which they fit e4m3.

    As its byte, uint8, 1 to 254; of zeros it is 127, that is 1.
    """
    mantissa, exponent = torch.frexp(amax.float())  # amax = mantissa * 2 ** exponent, 0.5 <= mantissa < 1
    # 448 is 0.875 * 2 ** 9
    byte = exponent - 9 + (mantissa > 0.875).int() + SCALE_BIAS
    return torch.where(amax > 0, byte.clamp(1, 254), SCALE_BIAS).to(torch.uint8)


def scale_values(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """What scale bytes stand for, in `dtype` (fp32 or wider)."""
    return torch.exp2(scales.to(dtype) - SCALE_BIAS)


def num_pages_for(num_tokens: int, page_size: int) -> int:
    """Pages that hold `num_tokens`."""
    return math.ceil(num_tokens / page_size)
