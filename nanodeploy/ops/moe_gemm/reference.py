from collections.abc import Callable

import torch
from torch import Tensor

from nanodeploy.ops.layouts import E4M3, FP8_BLOCK
from nanodeploy.ops.quantize_fp8.reference import quantised, spread
from nanodeploy.ops.registry import op


def out_dtype(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if x.dtype == E4M3 else x.dtype


@op(out=lambda x, *_: x.new_empty(x.shape, dtype=out_dtype(x)))
def moe_gemm(
    x: Tensor,
    x_scales: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
) -> Tensor:
    """The experts of a mixture, each a SwiGLU MLP: out[t] = sum over j of weights[t, j] * mlp[ids[t, j]](x[t]).

    mlp[e](x) = down[e] @ (silu(G[e] @ x) * (U[e] @ x)), gate_up[e] = [G[e]; U[e]]. x [T, D], rows may be strided; ids
    [T, k] int32, -1: no expert here (padding, or an expert of another rank), nothing is added; weights [T, k] fp32;
    gate_up [E, 2I, D], down [E, D, I]. Returns [T, D] in x.dtype. Sums in fp32, over j from first to last; rounded to
    x.dtype are the result, h = silu(.) * (.), and, in some kernels, each weighted mlp[e](x) before the sum over j.

    FP8 (ops/layouts.py): weights float8_e4m3fn with fp32 scales by blocks of 128 x 128, last blocks may be partial:
    gate_up_scales [E, 2 ceil(I/128), ceil(D/128)], G's blocks, then U's; down_scales [E, ceil(D/128), ceil(I/128)].
    Tokens then are quantised as by ops.quantize_fp8: h straight from fp32; x of 16 or 32 bits; or x comes in e4m3, with
    x_scales [T, ceil(D/128)] fp32 of any strides (a block of them as ops.quantize_fp8 lays them out is fastest), and
    the result is bf16.
    """
    fp8 = gate_up_scales is not None
    wide = torch.promote_types(out_dtype(x), torch.float32)
    tokens = x.to(wide)
    if x_scales is not None:
        tokens = tokens * spread(x_scales.to(wide), tokens.shape[1])
    elif fp8:
        tokens = rounded(tokens)
    h_rounded = rounded if fp8 else (lambda h: h.to(x.dtype).to(wide))
    return mixed(tokens, h_rounded, ids, weights, gate_up, gate_up_scales, down, down_scales).to(out_dtype(x))


def mixed(
    tokens: Tensor,
    h_rounded: Callable[[Tensor], Tensor],
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
) -> Tensor:
    """The same of tokens in fp32 or wider, in their dtype; h_rounded: what is left of rows h."""
    wide = tokens.dtype
    parts = torch.zeros((*ids.shape, tokens.shape[1]), dtype=wide, device=tokens.device)  # [T, k, D]
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (
            torch.nn.functional.linear(tokens[token], dequantised(*half, wide))
            for half in zip(gate_up[expert].chunk(2), halves(gate_up_scales, expert))
        )
        h = h_rounded(torch.nn.functional.silu(gate) * up)
        second = dequantised(down[expert], None if down_scales is None else down_scales[expert], wide)
        parts[token, slot] = torch.nn.functional.linear(h, second) * weights[token, slot, None].to(wide)
    out = torch.zeros_like(tokens)
    for slot in range(ids.shape[1]):
        out += parts[:, slot]
    return out


def halves(gate_up_scales: Tensor | None, expert: int) -> tuple[Tensor | None, ...]:
    """The scales of an expert's G, and of its U."""
    return (None, None) if gate_up_scales is None else gate_up_scales[expert].chunk(2)


def dequantised(weight: Tensor, scales: Tensor | None, wide: torch.dtype) -> Tensor:
    """A weight [N, D] in `wide`; scales [ceil(N/128), ceil(D/128)] or None."""
    if scales is None:
        return weight.to(wide)
    by_row = scales.to(wide).repeat_interleave(FP8_BLOCK, dim=0)[: weight.shape[0]]
    return weight.to(wide) * spread(by_row, weight.shape[1])


def rounded(values: Tensor) -> Tensor:
    """What is left of rows after quantisation."""
    small, scales = quantised(values)
    return small.to(values.dtype) * spread(scales.to(values.dtype), values.shape[1])
