import torch
from torch import Tensor

from nanodeploy.ops.layouts import E4M3, E4M3_MAX, FP8_BLOCK, empty_token_scales, fp8_scales, num_fp8_blocks
from nanodeploy.ops.registry import op


@op(out=lambda x: (x.new_empty(x.shape, dtype=E4M3), empty_token_scales(x.shape[0], x.shape[1], x.device)))
def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens in FP8, with a scale for each row and 128 columns (ops/layouts.py; arXiv:2412.19437, section 3.3).

    x [T, K] in 16 or 32 bits, rows may be strided. Returns (values [T, K] float8_e4m3fn, scales [T, ceil(K / 128)]
    fp32, from empty_token_scales): scale = max|x| / 448 of the block (1 of zeros), values = x * (1 / scale), rounded to
    nearest. In fp32.
    """
    return quantised(x.to(torch.promote_types(x.dtype, torch.float32)))


def quantised(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The same of values in fp32 or wider."""
    num_blocks = num_fp8_blocks(wide.shape[1])
    blocks = torch.nn.functional.pad(wide, (0, num_blocks * FP8_BLOCK - wide.shape[1])).unflatten(1, (num_blocks, -1))
    scales = fp8_scales(blocks.abs().amax(-1))
    small = (blocks * (1 / scales)[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    values = torch.empty(wide.shape, dtype=E4M3, device=wide.device).copy_(small.flatten(1)[:, : wide.shape[1]])
    return values, empty_token_scales(wide.shape[0], wide.shape[1], wide.device).copy_(scales)


def spread(scales: Tensor, dim: int) -> Tensor:
    """Scales [..., ceil(dim / 128)] for every one of `dim` columns."""
    return scales.repeat_interleave(FP8_BLOCK, dim=-1)[..., :dim]
