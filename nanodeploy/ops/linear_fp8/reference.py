import torch
from torch import Tensor

from nanodeploy.ops.layouts import FP8_BLOCK, num_fp8_blocks
from nanodeploy.ops.registry import op


@op(out=lambda x, x_scales, weight, weight_scales, dtype: x.new_empty((x.shape[0], weight.shape[0]), dtype=dtype))
def linear_fp8(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A projection in FP8: x @ weight^T, both e4m3 with scales by blocks (ops/layouts.py; arXiv:2412.19437, 3.3).

    x [T, K] float8_e4m3fn, rows may be strided; x_scales [T, ceil(K / 128)] fp32, any strides, a block of them as
    ops.quantize_fp8 lays them out is fastest; weight [N, K] float8_e4m3fn, contiguous; weight_scales [ceil(N / 128),
    ceil(K / 128)] fp32, contiguous; last blocks may be partial. Returns [T, N] in `dtype`.

    The products of each 128 columns are summed first, then scaled by x_scale * weight_scale and added up in fp32, from
    the first block to the last; rounded once.
    """
    wide = torch.promote_types(x_scales.dtype, torch.float32)
    total = torch.zeros((x.shape[0], weight.shape[0]), dtype=wide, device=x.device)
    by_row = weight_scales.to(wide).repeat_interleave(FP8_BLOCK, dim=0)[: weight.shape[0]]
    for block in range(num_fp8_blocks(x.shape[1])):
        columns = slice(block * FP8_BLOCK, (block + 1) * FP8_BLOCK)
        products = torch.nn.functional.linear(x[:, columns].to(wide), weight[:, columns].to(wide))
        total += products * (x_scales[:, block, None].to(wide) * by_row[None, :, block])
    return total if wide == torch.float64 else total.to(dtype)  # in float64 it is the gate's truth, not to be rounded
