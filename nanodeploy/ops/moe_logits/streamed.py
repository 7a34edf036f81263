"""A few tokens: linear/streamed's kernels, with sums that are not rounded."""

import functools

import torch
import triton

from nanodeploy.ops import overlap
from nanodeploy.ops.linear import skinny
from nanodeploy.ops.linear import streamed as plain
from nanodeploy.ops.moe_logits.reference import moe_logits
from nanodeploy.ops.registry import Aot

MAX_TILES = 64
ROWS = 16  # of the weight, per program


def config_one(dim: int) -> skinny.Config:
    """One token. Experts are few: a row per program, whole where it fits."""
    return skinny.Config(rows=1, block=min(4096, triton.next_power_of_2(dim)), num_warps=4)


def config(dim: int) -> plain.Config:
    """More: the inner axis is split, so that there are as many programs as processors."""
    block = max(16, min(128, triton.next_power_of_2(dim)))
    splits = 1
    while splits < 8 and dim >= 4 * splits * block:
        splits *= 2
    return plain.Config(rows=ROWS, block=block, num_warps=2, num_stages=4, splits=splits, ahead=0)


@functools.cache
def _arrived(device: torch.device) -> torch.Tensor:
    """Counters of the programs that are done with a tile. Each launch leaves them at 0; launches run one by one."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def _aot():
    pointers = dict.fromkeys(("x", "weight"), "*bf16") | {"out": "*fp32"}
    for dim in (2048, 7168):
        one = config_one(dim)
        yield Aot(
            skinny.one_row,
            pointers | {"out_dim": "i32"},
            {"IN_DIM": dim, "ROWS": one.rows, "BLOCK": one.block, "GATED": False, "PDL": True},
            one.num_warps,
            divisible=("x", "weight", "out", "out_dim"),
            wants=("ld.v4",),
        )
        for tokens in (16, 64):
            some = config(dim)
            yield Aot(
                plain.few_rows,
                pointers
                | {"parts": "*fp32", "arrived": "*i32"}
                | dict.fromkeys(("num_tokens", "out_dim", "stride_x"), "i32"),
                _constexprs(dim, tokens) | {"PDL": True},
                some.num_warps,
                divisible=("x", "weight", "out", "parts", "arrived", "out_dim", "stride_x"),
                wants=("cp.async", "mma"),
            )


def _constexprs(dim: int, tokens: int) -> dict[str, int]:
    some = config(dim)
    shape = {"IN_DIM": dim, "ROWS": some.rows, "BLOCK": some.block, "SPLITS": some.splits, "TOKENS": tokens}
    return {**shape, "STAGES": some.num_stages, "AHEAD": some.ahead, "GATED": False}


def _takes(case) -> bool:
    few = 1 <= case.num_tokens <= plain.MAX_TOKENS and case.num_experts <= ROWS * MAX_TILES and case.dim % 16 == 0
    return few and case.dtype == case.weight_dtype and case.dtype in (torch.bfloat16, torch.float16)


@moe_logits.kernel(needs="sm80", when=_takes, aot=_aot)
def streamed(x, weight):
    (num_tokens, dim), num_experts = x.shape, weight.shape[0]
    assert x.stride(1) == 1 and weight.is_contiguous(), "rows must be contiguous"
    out = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=x.device)
    if num_tokens == 1:
        one = config_one(dim)
        skinny.one_row[(triton.cdiv(num_experts, one.rows),)](
            x, weight, out, num_experts, IN_DIM=dim, ROWS=one.rows, BLOCK=one.block, GATED=False,
            num_warps=one.num_warps, **overlap.launch(),
        )  # fmt: skip
        return out
    some, tokens, num_tiles = config(dim), plain.bucket(num_tokens), triton.cdiv(num_experts, ROWS)
    parts = torch.empty((some.splits, num_tiles, ROWS, tokens), dtype=torch.float32, device=x.device)
    plain.few_rows[(num_tiles, some.splits)](
        x, weight, out, parts, _arrived(x.device), num_tokens, num_experts, x.stride(0),
        num_warps=some.num_warps, **_constexprs(dim, tokens), **overlap.launch(),
    )  # fmt: skip
    return out
