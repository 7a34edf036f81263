from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    dim: int


POINTS = {
    "qwen3-8b T1": Case(torch.bfloat16, 1, 4096),
    "qwen3-8b T256": Case(torch.bfloat16, 256, 4096),
    "qwen3-8b T8192": Case(torch.bfloat16, 8192, 4096),
    "qwen3-0.6b T8192": Case(torch.bfloat16, 8192, 1024),
}

FAR = Case(torch.bfloat16, 2**19 + 1, 4096)  # addresses past 2**31 elements
ROWS = ("x",)


def of(x: Tensor, weight: Tensor, eps: float) -> Case:
    return Case(x.dtype, x.shape[0], x.shape[1])


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 5 if small else 300),
        dim=st.sampled_from([1, 63, 64, 96, 192] if small else [1, 63, 64, 192, 1024, 4096, 5120, 8192]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, float]:
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.num_tokens, case.dim, generator=g, device=device)
    # A few outlier channels, as real residual streams have: they dominate the sum of squares.
    x[:, :: max(1, case.dim // 3)] *= 30
    weight = 1 + 0.2 * torch.randn(case.dim, generator=g, device=device)
    return x.to(case.dtype), weight.to(case.dtype), 1e-6


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * case.dim
    return Cost((2 * num_values + case.dim) * case.dtype.itemsize, 4 * num_values)
