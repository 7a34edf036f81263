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


# FP8 with scales by blocks, as DeepSeek-V3's checkpoints have it (arXiv:2412.19437, section 3.3). A weight [N, K] is
# e4m3 with an fp32 scale for each FP8_BLOCK rows and columns (`weight_scale_inv` in checkpoints), value = e4m3 * scale;
# the last block of an axis may be partial. Tokens [T, K] have a scale for each row and FP8_BLOCK columns. Those lie
# transposed, a row of them for each block of columns, and each row is a multiple of 16 bytes long, as TMA wants it.
FP8_BLOCK = 128
E4M3 = torch.float8_e4m3fn
LEAST_SCALE = 2.0**-126  # the least normal fp32: its reciprocal is finite


class Quantised(NamedTuple):
    """Tokens in FP8."""

    values: Tensor  # [T, K] float8_e4m3fn
    scales: Tensor  # [T, ceil(K / FP8_BLOCK)] fp32, from empty_token_scales
    dtype: torch.dtype  # of the values before; products with weights come in it


def num_fp8_blocks(size: int) -> int:
    """Blocks of FP8_BLOCK along an axis of `size`."""
    return -(-size // FP8_BLOCK)


def empty_token_scales(num_tokens: int, dim: int, device: torch.device) -> Tensor:
    """Room for the scales of tokens [T, dim]: [T, ceil(dim / FP8_BLOCK)] fp32, strides (1, the next multiple of 4 above
    T). Above, not from T on: torch.compile takes a stride of T for the size, and other sizes would compile again."""
    padded = (num_tokens // 4 + 1) * 4
    return torch.empty((num_fp8_blocks(dim), padded), dtype=torch.float32, device=device).t()[:num_tokens]


def fp8_scales(amax: Tensor) -> Tensor:
    """The scales of blocks whose largest magnitudes are `amax` (fp32 or wider): amax / 448, 1 of zeros.

    Values are multiplied by the reciprocal and rounded to nearest. A NaN stays one, an infinity becomes one.
    """
    return torch.where(amax > 0, (amax / E4M3_MAX).clamp(min=LEAST_SCALE), 1)


class LatentCache(NamedTuple):
    """One layer's paged latents (multi-head latent attention, arXiv:2405.04434)."""

    pages: Tensor  # [P, page_size, rank + rope_dim]; of fp8 [P, page_size, token_bytes] uint8


@dataclass(frozen=True)
class LatentLayout:
    """What one layer of latent attention keeps of every token: the latent [rank], from which each head makes its key
    and its value, and a key [rope_dim] rotated by the position, which all heads share. A token's slot is
    page * page_size + offset.

    Pages of a 16 or 32 bit dtype are [P, page_size, rank + rope_dim]: normed latent, then rotated key.
    Pages of float8_e4m3fn are bytes, [P, page_size, token_bytes] uint8. A token's are
      rank           e4m3, value = e4m3 * scale of its block of FP8_BLOCK
      4 * blocks     the blocks' scales, fp32, powers of two: the least by which the block fits e4m3
      2 * rope_dim   the rotated key in bf16
    which for rank 512 and rope_dim 64 are the 656 bytes of FlashMLA's "FP8 with scale" format. Any fp32 scales are
    right there; powers of two make a value exact in bf16, so kernels may scale before a product or after it.
    """

    page_size: int  # tokens
    rank: int
    rope_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.scaled and self.rank % FP8_BLOCK:
            raise ValueError(f"latents of rank {self.rank} have no fp8 layout: it wants a multiple of {FP8_BLOCK}")

    @property
    def scaled(self) -> bool:
        return self.dtype == E4M3

    @property
    def token_bytes(self) -> int:
        if self.scaled:
            return self.rank + 4 * (self.rank // FP8_BLOCK) + 2 * self.rope_dim
        return (self.rank + self.rope_dim) * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        return self.page_size * self.token_bytes

    def shape(self, num_pages: int) -> tuple[int, int, int]:
        return (num_pages, self.page_size, self.token_bytes if self.scaled else self.rank + self.rope_dim)

    def empty(self, num_pages: int, device: torch.device) -> LatentCache:
        """The cache itself, not cleared."""
        dtype = torch.uint8 if self.scaled else self.dtype
        return LatentCache(torch.empty(self.shape(num_pages), dtype=dtype, device=device))


Cache = KVCache | LatentCache  # what a layer keeps


def pack_latents(latents: Tensor, keys: Tensor) -> Tensor:
    """Tokens as fp8 pages hold them, [N, token_bytes] uint8. latents [N, rank], keys [N, rope_dim], fp32 or wider."""
    blocks = latents.unflatten(-1, (-1, FP8_BLOCK))
    scales = scale_values(scale_bytes(blocks.abs().amax(-1)), torch.float32)  # [N, blocks]
    values = (blocks / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).flatten(-2)
    parts = values.view(torch.uint8), scales.view(torch.uint8), keys.to(torch.bfloat16).view(torch.uint8)
    return torch.cat(parts, dim=-1)


def unpack_latents(packed: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """Tokens of fp8 pages [N, token_bytes] uint8 as [N, rank + rope_dim] in `dtype` (fp32 or wider)."""
    widths = (rank, 4 * (rank // FP8_BLOCK), packed.shape[-1] - rank - 4 * (rank // FP8_BLOCK))
    values, scales, keys = (part.contiguous() for part in packed.split(widths, dim=-1))
    blocks = values.view(E4M3).to(dtype).unflatten(-1, (-1, FP8_BLOCK))
    latents = (blocks * scales.view(torch.float32).to(dtype).unsqueeze(-1)).flatten(-2)
    return torch.cat((latents, keys.view(torch.bfloat16).to(dtype)), dim=-1)
