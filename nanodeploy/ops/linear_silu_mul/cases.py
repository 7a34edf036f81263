from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    out_dim: int  # I
    in_dim: int  # D


QWEN3_8B = (12288, 4096)
QWEN3_06B = (3072, 1024)

POINTS = {f"qwen3-8b T{t}": Case(torch.bfloat16, t, *QWEN3_8B) for t in (1, 8, 32, 64, 128, 256, 512, 8192)} | {
    f"qwen3-0.6b T{t}": Case(torch.bfloat16, t, *QWEN3_06B) for t in (1, 8, 64, 128, 256, 512, 8192)
}

# Tokens of a region -> those of the points in it.
TOKENS: list[tuple[int | list[int | None], tuple[int, ...]]] = [
    (1, (1,)),
    ([2, 16], (8,)),
    ([17, 64], (32, 64)),
    ([65, 128], (128,)),
    ([129, 256], (256,)),
    ([257, 1024], (512,)),
    ([1025, None], (8192,)),
]

REGIONS: list[tuple[dict, list[str]]] = [
    ({"num_tokens": where, "out_dim": shape[0], "in_dim": shape[1]}, points)
    for where, tokens in TOKENS
    for name, shape in (("8b", QWEN3_8B), ("0.6b", QWEN3_06B))
    if (points := [f"qwen3-{name} T{t}" for t in tokens if f"qwen3-{name} T{t}" in POINTS])
] + [({"num_tokens": where}, [f"qwen3-8b T{t}" for t in tokens]) for where, tokens in TOKENS]

FAR = Case(torch.bfloat16, 1, 2**18 + 1, 4096)  # addresses past 2**31 elements

ROWS = ("x",)  # arguments split by row when a row is run alone


def of(x: Tensor, weight: Tensor) -> Case:
    return Case(x.dtype, x.shape[0], weight.shape[0] // 2, weight.shape[1])


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.one_of(st.just(1), st.integers(2, 17), st.integers(18, 70 if small else 300)),
        out_dim=st.sampled_from([1, 16, 63, 80] if small else [1, 63, 64, 1000, 3072, 12288]),
        in_dim=st.sampled_from([16, 64, 272] if small else [64, 72, 1000, 1024, 3072, 4096]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.num_tokens, case.in_dim, generator=g, device=device)
    # Values as trained weights have, so that gates lie on both sides of zero: a row's products sum to about two.
    weight = torch.empty(2 * case.out_dim, case.in_dim, dtype=case.dtype, device=device)
    weight.normal_(0, 2 * case.in_dim**-0.5, generator=g)
    return x.to(case.dtype), weight


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * (case.in_dim + case.out_dim) + 2 * case.in_dim * case.out_dim
    return Cost(num_values * case.dtype.itemsize, 4 * case.num_tokens * case.in_dim * case.out_dim)
