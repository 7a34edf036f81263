from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    in_dim: int  # D
    out_dim: int  # N
    by_columns: bool  # the weight is a transposed view: [H, D, N] in memory


def _points(num_tokens: int, num_heads: int) -> dict[str, Case]:
    """DeepSeek-V3's: into the latent space, and out of it."""
    name, shape = f"h{num_heads} T{num_tokens}", (torch.bfloat16, num_tokens, num_heads)
    return {f"w_uk {name}": Case(*shape, 128, 512, True), f"w_uv {name}": Case(*shape, 512, 128, False)}


POINTS = {
    name: case
    for num_tokens, num_heads in ((1, 128), (8, 128), (64, 128), (128, 128), (64, 16), (128, 16), (2048, 16))
    for name, case in _points(num_tokens, num_heads).items()
}

RANGES: list[tuple[list[int | None], tuple[int, ...]]] = [([1, 4], (1,)), ([5, 16], (8,)), ([17, 96], (64,))]
REGIONS = [
    ({"num_tokens": where, "by_columns": columns}, points)
    for where, tokens in [*RANGES, ([97, None], (128, 2048))]
    for columns in (False, True)
    if (points := [n for n, case in POINTS.items() if case.num_tokens in tokens and case.by_columns == columns])
]

ROWS = ("x",)


def of(x: Tensor, weight: Tensor) -> Case:
    return Case(x.dtype, x.shape[0], x.shape[1], x.shape[2], weight.shape[1], weight.stride(2) != 1)


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(1, 20) if small else st.one_of(st.integers(1, 9), st.integers(10, 300)),
        num_heads=st.sampled_from([1, 3, 4] if small else [1, 3, 16, 128]),
        in_dim=st.sampled_from([8, 16, 32, 128] if small else [16, 32, 128, 192, 512]),
        out_dim=st.sampled_from([8, 16, 24, 64] if small else [8, 16, 128, 192, 256, 512]),
        by_columns=st.booleans(),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """x is a view of heads that are longer, as a query is beside its rotated part."""
    g = torch.Generator(device).manual_seed(seed)
    heads = torch.randn(case.num_tokens, case.num_heads, case.in_dim + 8, generator=g, device=device).to(case.dtype)
    weight = torch.randn(case.num_heads, case.out_dim, case.in_dim, generator=g, device=device) * case.in_dim**-0.5
    weight = weight.to(case.dtype)
    if case.by_columns:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    return heads[..., : case.in_dim], weight


def cost(case: Case) -> Cost:
    per_token, weights = case.in_dim + case.out_dim, case.in_dim * case.out_dim
    num_values = case.num_heads * (case.num_tokens * per_token + weights)
    return Cost(num_values * case.dtype.itemsize, 2 * case.num_tokens * case.num_heads * weights)
