from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    dim: int  # I, the width of the result
    gap: int = 0  # elements between the rows of x


POINTS = {
    "qwen3-8b T1": Case(torch.bfloat16, 1, 12288),
    "qwen3-8b T256": Case(torch.bfloat16, 256, 12288),
    "qwen3-8b T8192": Case(torch.bfloat16, 8192, 12288),
    "qwen3-0.6b T8192": Case(torch.bfloat16, 8192, 3072),
}

FAR = Case(torch.bfloat16, 2**17 + 1, 8192)  # addresses past 2**31 elements

ROWS = ("x",)  # arguments split by row when a row is run alone


def of(x: Tensor) -> Case:
    return Case(x.dtype, x.shape[0], x.shape[1] // 2, x.stride(0) - x.shape[1])


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 5 if small else 300),
        dim=st.sampled_from([1, 63, 64, 192] if small else [1, 63, 64, 192, 3072, 12288, 25600]),
        gap=st.sampled_from([0, 1, 64]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    x = 4 * torch.randn(case.num_tokens, 2 * case.dim + case.gap, generator=g, device=device)
    return (x.to(case.dtype)[:, : 2 * case.dim],)


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * case.dim
    return Cost(3 * num_values * case.dtype.itemsize, 5 * num_values)
