"""Mixture-of-experts layers. Axes: T tokens, E experts, k of them per token, D model, I inner width of an expert."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanodeploy import ops
from nanodeploy.models.checkpoint import PerExpert
from nanodeploy.ops.layouts import E4M3, Quantised, num_fp8_blocks


@dataclass(frozen=True)
class Routing:
    """How a model routes, as ops.moe_route takes it."""

    num_experts: int  # E
    top_k: int
    scoring: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0
    has_bias: bool = False  # a learned correction of the choice, e_score_correction_bias


class Router(nn.Module):
    """Chooses experts: logits in fp32 whatever the model's dtype, as a choice hangs on small differences."""

    keep_fp32: ClassVar = frozenset({"e_score_correction_bias"})  # parameters that the model's dtype does not touch

    def __init__(self, dim: int, routing: Routing):
        super().__init__()
        self.routing = routing
        self.weight = nn.Parameter(torch.empty(routing.num_experts, dim), requires_grad=False)
        if routing.has_bias:
            bias = torch.empty(routing.num_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [T, D] -> (ids [T, k] int32, weights [T, k] fp32); rows whose slot [T] is negative go nowhere."""
        r = self.routing
        bias = self.e_score_correction_bias if r.has_bias else None
        logits = ops.moe_logits(x, self.weight)
        how = (r.scoring, r.top_k, r.num_groups, r.top_groups, r.renormalise, r.scale)
        return ops.moe_route(logits, bias, slots, *how)


class Experts(nn.Module):
    """SwiGLU experts with their weights in one piece: gate_up [E, 2I, D], the gate's rows first, and down [E, D, I].

    In FP8 (ops/layouts.py) each of an expert's three matrices has its own blocks of scales; gate's stand before up's.

    shard: parameter -> the axis to cut where experts are spread over devices (ffn_ep), and where each is cut (ffn_tp);
    of gate_up the latter cuts each half. Devices that hold parts sum their outputs.
    """

    shard: ClassVar = {"gate_up": (0, 1), "gate_up_scales": (0, 1), "down": (0, 2), "down_scales": (0, 2)}
    keep_fp32: ClassVar = frozenset({"gate_up_scales", "down_scales"})

    def __init__(self, num_experts: int, dim: int, inner: int):
        super().__init__()
        self.checkpoint = {
            "gate_up": PerExpert("gate_proj.weight", "up_proj.weight"),
            "down": PerExpert("down_proj.weight"),
        }
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * inner, dim), requires_grad=False)
        self.down = nn.Parameter(torch.empty(num_experts, dim, inner), requires_grad=False)
        self.gate_up_scales: nn.Parameter | None = None
        self.down_scales: nn.Parameter | None = None

    @property
    def takes_fp8(self) -> bool:
        """Whether the weights are in FP8."""
        return self.gate_up_scales is not None

    def quantise(self) -> None:
        """Hold the weights in FP8 from now on, their values to be filled anew."""
        num_experts, dim, inner = self.down.shape
        blocks, device = (num_fp8_blocks(dim), num_fp8_blocks(inner)), self.down.device
        self.gate_up = nn.Parameter(torch.empty_like(self.gate_up, dtype=E4M3), requires_grad=False)
        self.down = nn.Parameter(torch.empty_like(self.down, dtype=E4M3), requires_grad=False)
        scales = torch.empty(num_experts, 2 * blocks[1], blocks[0], device=device)
        self.gate_up_scales = nn.Parameter(scales, requires_grad=False)
        self.down_scales = nn.Parameter(torch.empty(num_experts, *blocks, device=device), requires_grad=False)
        self.checkpoint |= {
            "gate_up_scales": PerExpert("gate_proj.weight_scale_inv", "up_proj.weight_scale_inv"),
            "down_scales": PerExpert("down_proj.weight_scale_inv"),
        }

    def forward(self, x: Tensor | Quantised, ids: Tensor, weights: Tensor) -> Tensor:
        """x [T, D], ids [T, k] int32 of the experts here (-1: none), weights [T, k] fp32 -> [T, D]."""
        held = (self.gate_up, self.gate_up_scales, self.down, self.down_scales)
        if isinstance(x, Quantised):
            return ops.moe_gemm(x.values, x.scales, ids, weights, *held).to(x.dtype)
        return ops.moe_gemm(x, None, ids, weights, *held)
