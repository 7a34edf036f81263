from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost

NUM_POSITIONS = 8192


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # R
    normed: bool = True
    interleaved: bool = False
    fused: bool = True  # q and k are views of one qkv tensor


POINTS = {
    "qwen3-8b T1": Case(torch.bfloat16, 1, 32, 8, 128, 128),
    "qwen3-8b T256": Case(torch.bfloat16, 256, 32, 8, 128, 128),
    "qwen3-8b T8192": Case(torch.bfloat16, 8192, 32, 8, 128, 128),
    "qwen3.5 partial T8192": Case(torch.bfloat16, 8192, 16, 2, 256, 64),
}

FAR = Case(torch.bfloat16, 2**18 + 1, 64, 4, 128, 128)  # addresses past 2**31 elements

ROWS = ("q", "k", "positions")  # arguments split by row when a row is run alone


def of(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    interleaved: bool,
) -> Case:
    num_tokens, num_heads, head_dim = q.shape
    fused = q.stride(0) != num_heads * head_dim
    return Case(
        q.dtype, num_tokens, num_heads, k.shape[1], head_dim, cos_sin.shape[1], q_norm is not None, interleaved, fused
    )


def _case(rotary_share: float, **fields) -> Case:
    return Case(rotary_dim=max(2, int(rotary_share * fields["head_dim"]) // 2 * 2), **fields)


def strategy(st, *, small: bool):
    return st.builds(
        _case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 5 if small else 300),
        num_heads=st.sampled_from([1, 3, 4] if small else [1, 8, 24, 32, 64]),
        num_kv_heads=st.sampled_from([1, 2] if small else [1, 2, 3, 8]),
        head_dim=st.sampled_from([2, 16, 20, 64] if small else [64, 80, 96, 128, 256]),
        rotary_share=st.sampled_from([1.0, 0.5, 0.4]),
        normed=st.booleans(),
        interleaved=st.booleans(),
        fused=st.booleans(),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple:
    g = torch.Generator(device).manual_seed(seed)
    num_heads = case.num_heads + 2 * case.num_kv_heads
    qkv = torch.randn(case.num_tokens, num_heads, case.head_dim, generator=g, device=device).to(case.dtype)
    q, k, _ = qkv.split((case.num_heads, case.num_kv_heads, case.num_kv_heads), dim=1)
    if not case.fused:
        q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
    positions = torch.randint(NUM_POSITIONS, (case.num_tokens,), generator=g, device=device)
    power = torch.arange(0, case.rotary_dim, 2, device=device, dtype=torch.float64) / case.rotary_dim
    angles = torch.arange(NUM_POSITIONS, device=device, dtype=torch.float64)[:, None] * 1e6**-power
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    norms = [1 + 0.2 * torch.randn(case.head_dim, generator=g, device=device) for _ in range(2)]
    q_norm, k_norm = (w.to(case.dtype) if case.normed else None for w in norms)
    return q, k, positions, cos_sin, q_norm, k_norm, 1e-6, case.interleaved


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * (case.num_heads + case.num_kv_heads) * case.head_dim
    table_bytes = case.num_tokens * (8 + 4 * case.rotary_dim)
    return Cost(2 * num_values * case.dtype.itemsize + table_bytes, (10 if case.normed else 6) * num_values)
