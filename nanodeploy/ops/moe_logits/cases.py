from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype  # of x
    num_tokens: int
    num_experts: int  # E
    dim: int  # D
    weight_dtype: torch.dtype


POINTS = {
    f"{name} T{num_tokens}": Case(torch.bfloat16, num_tokens, *shape, torch.bfloat16)
    for name, shape in (("qwen3-30b", (128, 2048)), ("deepseek-v3", (256, 7168)), ("kimi-k2", (384, 7168)))
    for num_tokens in (1, 8, 64, 256, 8192)
}

REGIONS: list[tuple[dict, list[str]]] = [
    ({"num_tokens": where}, [name for name in POINTS if int(name.rpartition("T")[2]) in tokens])
    for where, tokens in ((1, (1,)), ([2, 64], (8, 64)), ([65, 512], (256,)), ([513, None], (8192,)))
]

# A chain of 7168 products on the tensor cores, which cut off where they add: the error grows with the length.
INNER = 256 * torch.finfo(torch.float32).eps

ROWS = ("x",)  # arguments split by row when a row is run alone


def of(x: Tensor, weight: Tensor) -> Case:
    num_experts, dim = weight.shape
    return Case(x.dtype, x.shape[0], num_experts, dim, weight.dtype)


def _case(dtypes: tuple[torch.dtype, torch.dtype], **fields) -> Case:
    return Case(dtype=dtypes[0], weight_dtype=dtypes[1], **fields)


def strategy(st, *, small: bool):
    half, fp32 = torch.float16 if small else torch.bfloat16, torch.float32
    return st.builds(
        _case,
        dtypes=st.sampled_from([(half, half), (half, fp32), (fp32, fp32)]),
        num_tokens=st.one_of(st.just(1), st.integers(2, 40 if small else 300)),
        num_experts=st.sampled_from([1, 8, 60] if small else [8, 60, 128, 256, 384]),
        dim=st.sampled_from([16, 64, 272] if small else [64, 1000, 2048, 7168]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(case.num_tokens, case.dim, generator=g, device=device)
    weight = torch.randn(case.num_experts, case.dim, generator=g, device=device) * case.dim**-0.5
    return x.to(case.dtype), weight.to(case.weight_dtype)


def cost(case: Case) -> Cost:
    num_bytes = case.num_tokens * (case.dim * case.dtype.itemsize + 4 * case.num_experts)
    return Cost(
        num_bytes + case.num_experts * case.dim * case.weight_dtype.itemsize,
        2 * case.num_tokens * case.num_experts * case.dim,
    )
