from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    dim: int
    gap: int = 0  # elements between the tokens of gate


POINTS = {
    "35B T64": Case(torch.bfloat16, 64, 32, 128),
    "35B T8192": Case(torch.bfloat16, 8192, 32, 128, gap=8192),
    "397B T8192": Case(torch.bfloat16, 8192, 64, 128, gap=12288),
}

FAR = Case(torch.bfloat16, 2**16 + 1, 64, 128, gap=2**15)  # addresses past 2**31 elements
ROWS = ("x", "gate")


def of(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Case:
    num_tokens, num_heads, dim = x.shape
    return Case(x.dtype, num_tokens, num_heads, dim, gate.stride(0) - num_heads * dim)


def _case(num_tokens: int, gap: int, **fields: Any) -> Case:
    return Case(num_tokens=num_tokens, gap=gap if num_tokens > 1 else 0, **fields)  # else there is no stride


def strategy(st, *, small: bool):
    return st.builds(
        _case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 5 if small else 300),
        num_heads=st.sampled_from([1, 2, 3] if small else [1, 4, 6, 32, 64]),
        dim=st.sampled_from([16, 24, 64] if small else [64, 96, 128]),
        gap=st.sampled_from([0, 8, 64]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    g = torch.Generator(device).manual_seed(seed)
    values = case.num_heads * case.dim
    x = torch.randn(case.num_tokens, case.num_heads, case.dim, generator=g, device=device)
    x *= torch.exp2(torch.randint(-6, 3, (case.num_tokens, case.num_heads, 1), generator=g, device=device).float())
    gate = 2 * torch.randn(case.num_tokens, values + case.gap, generator=g, device=device)
    weight = 1 + 0.2 * torch.randn(case.dim, generator=g, device=device)
    return x.to(case.dtype), gate.to(case.dtype)[:, :values].unflatten(1, (case.num_heads, case.dim)), weight, 1e-6


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * case.num_heads * case.dim
    return Cost(3 * num_values * case.dtype.itemsize + 4 * case.dim, 10 * num_values)
