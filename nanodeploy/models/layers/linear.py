"""Matrix layers. Axes: T tokens, V vocabulary.

`shard` says how a layer is cut when several devices hold one model; a layer alone does not depend on it:
"rows" cuts the weight's rows, each device makes some of the outputs; "cols" cuts its columns, each device takes some
of the inputs and the outputs are summed; None is held whole by each.

A layer may hold its weight in FP8 (ops/layouts.py); whether it does is settled before weights load, by
models/quantize.py. Such a layer takes its input as it comes, or in FP8 already from what stands before it.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from nanodeploy import ops
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK, Quantised, num_fp8_blocks

Shard = Literal["rows", "cols"] | None


class Linear(nn.Module):
    """y = x W^T without bias. Several `out_features` are projections of one input, fused: their rows stand stacked."""

    keep_fp32: ClassVar = frozenset({"weight_scale_inv"})

    def __init__(self, in_features: int, *out_features: int, shard: Shard = None):
        super().__init__()
        self.parts = out_features  # rows of each projection; a fused layer is cut part by part
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(sum(out_features), in_features), requires_grad=False)
        self.weight_scale_inv: nn.Parameter | None = None  # of an FP8 weight; the parts' stand stacked

    @property
    def takes_fp8(self) -> bool:
        """Whether the weight is in FP8."""
        return self.weight_scale_inv is not None

    def quantise(self) -> None:
        """Hold the weight in FP8 from now on, its values to be filled anew."""
        device, (_, in_features) = self.weight.device, self.weight.shape
        num_blocks = sum(map(num_fp8_blocks, self.parts)), num_fp8_blocks(in_features)
        self.weight = nn.Parameter(torch.empty_like(self.weight, dtype=E4M3), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.empty(num_blocks, device=device), requires_grad=False)

    def forward(self, x: Tensor | Quantised) -> Tensor:
        """x [T, in] -> [T, sum of out]."""
        if self.weight_scale_inv is None:
            return ops.linear(x, self.weight)
        values, scales, dtype = in_fp8(x)
        if not any(rows % FP8_BLOCK for rows in self.parts[:-1]):
            return ops.linear_fp8(values, scales, self.weight, self.weight_scale_inv, dtype)
        # A part ends within a block, so that the next one's blocks begin elsewhere: no model of a common size has that.
        weights = self.weight.split(self.parts)
        weight_scales = self.weight_scale_inv.split([num_fp8_blocks(rows) for rows in self.parts])
        return torch.cat([ops.linear_fp8(values, scales, *part, dtype) for part in zip(weights, weight_scales)], dim=-1)

    def silu_mul(self, x: Tensor | Quantised, fp8: bool = False) -> Tensor | Quantised:
        """Of a layer of two equal parts, gate and up: silu(x gate^T) * (x up^T), [T, I]; `fp8`: for an FP8 weight."""
        if fp8:
            both = self(x)
            values, scales = ops.silu_mul_fp8(both)
            return Quantised(values, scales, both.dtype)
        return ops.silu_mul(self(x)) if self.takes_fp8 else ops.linear_silu_mul(x, self.weight)


def in_fp8(x: Tensor | Quantised) -> Quantised:
    """Tokens [T, D] quantised, unless they are."""
    if isinstance(x, Quantised):
        return x
    values, scales = ops.quantize_fp8(x)
    return Quantised(values, scales, x.dtype)


class Embedding(nn.Module):
    """Rows of a table, [V, D]."""

    def __init__(self, num_rows: int, dim: int, shard: Shard = None):
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.empty(num_rows, dim), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] int64 -> [T, D]."""
        return nn.functional.embedding(tokens, self.weight)
