import torch
from torch import Tensor

from nanodeploy.ops.layouts import E4M3, empty_token_scales
from nanodeploy.ops.quantize_fp8.reference import quantised
from nanodeploy.ops.registry import op


@op(
    out=lambda x: (
        x.new_empty((x.shape[0], x.shape[1] // 2), dtype=E4M3),
        empty_token_scales(x.shape[0], x.shape[1] // 2, x.device),
    )
)
def silu_mul_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """ops.silu_mul whose result goes straight from fp32 to FP8, as ops.quantize_fp8 has it: the input of an FP8 weight.

    x [T, 2I], the gate's I columns first, rows may be strided. Returns (values [T, I] float8_e4m3fn, scales
    [T, ceil(I / 128)] fp32). Computed in fp32.
    """
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return quantised(torch.nn.functional.silu(gate) * up)
