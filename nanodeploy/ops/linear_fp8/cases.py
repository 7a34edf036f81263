from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import E4M3, num_fp8_blocks
from nanodeploy.ops.linear.cases import QWEN3_8B
from nanodeploy.ops.quantize_fp8.reference import quantised


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype  # of the result
    num_tokens: int
    out_dim: int  # N
    in_dim: int  # K


DEEPSEEK_V3 = {
    "qkv_a": (2112, 7168),
    "q_b": (24576, 1536),
    "o": (7168, 16384),
    "shared gate_up": (4096, 7168),
    "shared down": (7168, 2048),
}

SHAPES = {f"qwen3-8b {name}": shape for name, shape in QWEN3_8B.items() if name != "lm_head"} | {
    f"deepseek-v3 {name}": shape for name, shape in DEEPSEEK_V3.items()
}

# Tokens of a region -> those of the points in it.
TOKENS: list[tuple[int | list[int | None], tuple[int, ...]]] = [
    ([1, 16], (1, 8)),
    ([17, 32], (32,)),
    ([33, 64], (64,)),
    ([65, 128], (128,)),
    ([129, 512], (256,)),
    ([513, 3000], (2048,)),
    ([3001, None], (8192,)),
]

POINTS = {
    f"{name} T{num_tokens}": Case(torch.bfloat16, num_tokens, *shape)
    for name, shape in SHAPES.items()
    for _, points in TOKENS
    for num_tokens in points
}

# Each shape's own winner; elsewhere, what wins over all of them.
REGIONS: list[tuple[dict, list[str]]] = [
    ({"num_tokens": where, "out_dim": out_dim, "in_dim": in_dim}, [f"{name} T{t}" for t in points])
    for where, points in TOKENS
    for name, (out_dim, in_dim) in SHAPES.items()
] + [({"num_tokens": where}, [f"{name} T{t}" for t in points for name in SHAPES]) for where, points in TOKENS]

FAR = Case(torch.bfloat16, 1, 2**19 + 1, 4096)  # addresses past 2**31 elements

ROWS = ("x", "x_scales")  # arguments split by row when a row is run alone


def of(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Case:
    return Case(dtype, x.shape[0], weight.shape[0], weight.shape[1])


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.one_of(st.just(1), st.integers(2, 70))
        if small
        else st.one_of(st.just(1), st.integers(2, 17), st.integers(18, 64), st.integers(65, 300), st.just(2500)),
        # Whole blocks of scales, and partial last ones.
        out_dim=st.sampled_from([1, 64, 128, 200] if small else [1, 64, 128, 200, 2112, 4096, 6144, 24576]),
        in_dim=st.sampled_from([16, 128, 272, 1040] if small else [16, 128, 272, 1536, 2048, 4096, 7168]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, torch.dtype]:
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.num_tokens, case.in_dim, generator=g, device=device)
    weight = torch.empty(case.out_dim, case.in_dim, dtype=E4M3, device=device)
    rows_at_once = max(1, 2**28 // case.in_dim)
    for first in range(0, case.out_dim, rows_at_once):
        part = weight[first : first + rows_at_once]
        part.copy_(torch.randn(part.shape, generator=g, device=device).mul_(64))
    # Values as trained weights have: a row's products sum to about one. Blocks differ, so that a wrong scale shows.
    shape = (num_fp8_blocks(case.out_dim), num_fp8_blocks(case.in_dim))
    weight_scales = (torch.rand(shape, generator=g, device=device) + 0.2) * (case.in_dim**-0.5 / 64)
    return *quantised(x), weight, weight_scales, case.dtype


def cost(case: Case) -> Cost:
    num_bytes = (case.num_tokens + case.out_dim) * case.in_dim + case.dtype.itemsize * case.num_tokens * case.out_dim
    num_scales = num_fp8_blocks(case.in_dim) * (case.num_tokens + num_fp8_blocks(case.out_dim))
    return Cost(num_bytes + 4 * num_scales, 2 * case.num_tokens * case.in_dim * case.out_dim)
