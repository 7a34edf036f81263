from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    out_dim: int  # N
    in_dim: int  # D


QWEN3_8B = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "lm_head": (151936, 4096),
}

QWEN3_06B = {
    "qkv": (4096, 1024),
    "o": (1024, 2048),
    "gate_up": (6144, 1024),
    "down": (1024, 3072),
    "lm_head": (151936, 1024),
}

POINTS = {
    f"{model} {name} T{num_tokens}": Case(torch.bfloat16, num_tokens, *shape)
    for model, shapes, tokens in (
        ("qwen3-8b", QWEN3_8B, (1, 8, 16, 32, 64, 128, 256, 512, 8192)),
        ("qwen3-0.6b", QWEN3_06B, (1, 8, 64, 128, 256, 512)),
    )
    for name, shape in shapes.items()
    for num_tokens in tokens
    if name != "lm_head" or num_tokens <= 256  # logits of every token of a prompt are nobody's need
}


def _regions() -> list[tuple[dict, list[str]]]:
    """Each shape's own winner; of other shapes, what wins over all of Qwen3-8B's."""
    few: list[tuple[int | list[int | None], tuple[int, ...]]] = [
        (1, (1,)), ([2, 16], (8, 16)), ([17, 32], (32,)), ([33, 64], (64,)), ([65, 128], (128,)), ([129, 256], (256,)),
        ([257, 1024], (512,)),
    ]  # fmt: skip
    own = [
        ({"num_tokens": where, "out_dim": out_dim, "in_dim": in_dim}, points)
        for where, tokens in [*few, ([1025, None], (8192,))]
        for model, shapes in (("qwen3-8b", QWEN3_8B), ("qwen3-0.6b", QWEN3_06B))
        for name, (out_dim, in_dim) in shapes.items()
        if (points := [point for t in tokens if (point := f"{model} {name} T{t}") in POINTS])
    ]
    all_shapes: list[tuple[dict, list[str]]] = [
        (
            {"num_tokens": where},
            [point for t in tokens for name in QWEN3_8B if (point := f"qwen3-8b {name} T{t}") in POINTS],
        )
        for where, tokens in few
    ]
    return [*own, *all_shapes, ({}, [f"qwen3-8b {name} T8192" for name in QWEN3_8B if name != "lm_head"])]


REGIONS = _regions()

FAR = Case(torch.bfloat16, 1, 2**19 + 1, 4096)  # addresses past 2**31 elements

ROWS = ("x",)  # arguments split by row when a row is run alone


def of(x: Tensor, weight: Tensor) -> Case:
    return Case(x.dtype, x.shape[0], weight.shape[0], weight.shape[1])


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.one_of(st.just(1), st.integers(2, 70))
        if small
        else st.one_of(st.just(1), st.integers(2, 17), st.integers(18, 300)),
        out_dim=st.sampled_from([1, 16, 63, 64, 80] if small else [1, 63, 64, 1000, 4096, 6144, 24576]),
        in_dim=st.sampled_from([16, 64, 272] if small else [64, 72, 1000, 3072, 4096, 12288]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.num_tokens, case.in_dim, generator=g, device=device)
    # Values as trained weights have: a row's products sum to about one.
    weight = torch.empty(case.out_dim, case.in_dim, dtype=case.dtype, device=device)
    weight.normal_(0, case.in_dim**-0.5, generator=g)
    return x.to(case.dtype), weight


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * (case.in_dim + case.out_dim) + case.in_dim * case.out_dim
    return Cost(num_values * case.dtype.itemsize, 2 * case.num_tokens * case.in_dim * case.out_dim)
