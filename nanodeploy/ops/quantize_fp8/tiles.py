"""A few blocks of 128 columns per program: read once, 16 bytes a thread, the scale found in registers."""

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import overlap
from nanodeploy.ops.e4m3 import block_scales, to_e4m3
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK, empty_token_scales
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.quantize_fp8.reference import quantize_fp8
from nanodeploy.ops.registry import Aot

VALUES = 1024  # per program
_BLOCK = tl.constexpr(FP8_BLOCK)


@triton.jit(do_not_specialize=["num_tokens"])
def _quantize(
    x, values, scales, num_tokens, dim, stride_x, stride_scales,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    go(PDL)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    cols = blocks[None, :, None] * _BLOCK + tl.arange(0, _BLOCK)[None, None, :]
    rows = tokens.to(tl.int64)[:, None, None]
    inside = (tokens < num_tokens)[:, None, None] & (cols < dim)
    wait(PDL)
    wide = tl.load(x + rows * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
    scale, factor = block_scales(tl.max(tl.abs(wide), axis=2))
    tl.store(values + rows * dim + cols, to_e4m3(wide * factor[:, :, None], INTERPRETED), mask=inside)
    at = scales + blocks.to(tl.int64)[None, :] * stride_scales + tokens[:, None]
    tl.store(at, scale, mask=(tokens < num_tokens)[:, None] & (blocks * _BLOCK < dim)[None, :])


def tokens_per_program(num_tokens: int) -> int:
    """Where there are many, the scales of several go to one stretch of memory."""
    return 4 if num_tokens >= 512 else 1


def _aot():
    for dtype in ("*bf16", "*fp16"):
        for num_tokens in (1, 8192):
            tokens = tokens_per_program(num_tokens)
            yield Aot(
                _quantize,
                {"x": dtype, "values": "*fp8e4nv", "scales": "*fp32"}
                | dict.fromkeys(("num_tokens", "dim", "stride_x", "stride_scales"), "i32"),
                {"TOKENS": tokens, "BLOCKS": VALUES // FP8_BLOCK // tokens, "INTERPRETED": False, "PDL": True},
                divisible=("x", "values", "scales", "dim", "stride_x"),
                wants=("ld.v4", "cvt.rn.satfinite.e4m3x2"),
            )


@quantize_fp8.kernel(needs="sm89", batch_invariant=True, aot=_aot)
def tiles(x):
    num_tokens, dim = x.shape
    assert dim == 1 or x.stride(1) == 1, "rows must be contiguous"
    values = torch.empty((num_tokens, dim), dtype=E4M3, device=x.device)
    scales = empty_token_scales(num_tokens, dim, x.device)
    if num_tokens:
        tokens = tokens_per_program(num_tokens)
        blocks = VALUES // FP8_BLOCK // tokens
        grid = triton.cdiv(num_tokens, tokens), triton.cdiv(dim, blocks * FP8_BLOCK)
        _quantize[grid](
            x, values, scales, num_tokens, dim, x.stride(0), scales.stride(1),
            TOKENS=tokens, BLOCKS=blocks, INTERPRETED=triton_interpret(), **overlap.launch(),
        )  # fmt: skip
    return values, scales
