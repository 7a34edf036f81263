"""Gated DeltaNet (arXiv:2412.06464): attention that keeps one state of a sequence, not its tokens.

Axes: T tokens of a step, D model, J heads of queries and keys, H heads of values, K and V their dims.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanodeploy.models.checkpoint import SCALES, Stack
from nanodeploy.models.layers.linear import Linear
from nanodeploy.ops.gated_delta_rule import StateRows, gated_delta_rule
from nanodeploy.ops.layouts import Quantised, num_fp8_blocks
from nanodeploy.ops.states import StateLayout, States


@dataclass(frozen=True)
class DeltaDims:
    num_key_heads: int  # J
    num_heads: int  # H
    key_dim: int  # K
    value_dim: int  # V
    width: int  # taps of the convolution

    @property
    def keys(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.num_heads * self.value_dim

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.keys + self.values


@dataclass(frozen=True)
class RecurrentState:
    """A layer keeps, of a whole sequence, the last inputs of a convolution and a state of each head, in slots."""

    dims: DeltaDims

    def layout(self, dtype: torch.dtype, state_dtype: torch.dtype = torch.float32) -> StateLayout:
        dims = self.dims
        heads = dims.num_heads, dims.value_dim, dims.key_dim
        return StateLayout(dims.channels, dims.width, *heads, dtype, state_dtype)


class QKVZ(Stack):
    """Four projections of which the checkpoint has the first three as one tensor."""

    def slices(self, owner: nn.Module, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
        q, k, v, z = owner.parts  # type: ignore[misc]
        names, rows = self.parts, [q + k + v, z]
        if parameter is not owner.weight:
            names, rows = tuple(name + SCALES for name in names), [num_fp8_blocks(q + k + v), num_fp8_blocks(z)]
        return zip(names, parameter.split(rows), strict=True)


class ConvWeight(nn.Module):
    """Taps of a depthwise convolution, [channels, 1, width], oldest input first. Cut by channels, as qkvz by rows."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.shard = "rows"
        self.weight = nn.Parameter(torch.empty(channels, 1, width), requires_grad=False)


class HeadNorm(nn.Module):
    """The gain of a norm over a head's values, [V] fp32; the same for all heads, held whole by each device."""

    keep_fp32: ClassVar = frozenset({"weight"})

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim), requires_grad=False)


class GatedDeltaNet(nn.Module):
    """Heads are cut between devices as those of attention are: qkvz, ba, conv1d, A_log and dt_bias by rows."""

    checkpoint: ClassVar = {
        "qkvz.weight": QKVZ("in_proj_qkv.weight", "in_proj_z.weight"),
        "ba.weight": Stack("in_proj_b.weight", "in_proj_a.weight"),
    }
    keep_fp32: ClassVar = frozenset({"A_log", "dt_bias"})
    shard = "rows"  # of A_log and dt_bias

    def __init__(self, dim: int, dims: DeltaDims, eps: float):
        super().__init__()
        self.dims = dims
        self.eps = eps
        self.qkvz = Linear(dim, dims.keys, dims.keys, dims.values, dims.values, shard="rows")
        # Never in FP8: so few rows are no block, and what forgets is no place to save.
        self.ba = Linear(dim, dims.num_heads, dims.num_heads, shard="rows")
        self.conv1d = ConvWeight(dims.channels, dims.width)
        self.A_log = nn.Parameter(torch.empty(dims.num_heads), requires_grad=False)
        self.dt_bias = nn.Parameter(torch.empty(dims.num_heads), requires_grad=False)
        self.norm = HeadNorm(dims.value_dim)
        self.out_proj = Linear(dims.values, dim, shard="cols")

    def cache_need(self) -> RecurrentState:
        return RecurrentState(self.dims)

    def forward(self, x: Tensor | Quantised, gates: Tensor, rows: StateRows, slots: States) -> Tensor:
        """x [T, D] -> [T, D]. gates: x in 16 bits or more, where x is in FP8; else x itself."""
        dims = self.dims
        qkv, z = self.qkvz(x).split([dims.channels, dims.values], dim=-1)
        b, a = self.ba(gates).split(dims.num_heads, dim=-1)
        z = z.unflatten(-1, (dims.num_heads, dims.value_dim))
        weights = self.conv1d.weight.squeeze(1), self.A_log, self.dt_bias, self.norm.weight
        mixed = gated_delta_rule(qkv, z, a, b, *weights, slots, rows, self.eps)  # [T, H, V]
        return self.out_proj(mixed.flatten(1))
