"""One row against a big weight: a dot product for each row of the weight, elementwise in registers. For streamed.py.

A program's first tile is on its way before it waits for the kernel ahead: a weight is written by none.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot


@dataclass(frozen=True)
class Config:
    rows: int  # of the weight, per program
    block: int  # of the inner axis, per step; the steps are unrolled
    num_warps: int


# What bench/sweeps/linear.py found: (N, D) -> Config.
TUNED: dict[tuple[int, int], Config] = {
    (6144, 4096): Config(rows=2, block=2048, num_warps=4),
    (4096, 4096): Config(rows=1, block=4096, num_warps=8),
    (24576, 4096): Config(rows=2, block=1024, num_warps=2),
    (4096, 12288): Config(rows=2, block=2048, num_warps=4),
    (151936, 4096): Config(rows=2, block=1024, num_warps=2),
    (4096, 1024): Config(rows=4, block=1024, num_warps=4),
    (1024, 2048): Config(rows=2, block=2048, num_warps=4),
    (6144, 1024): Config(rows=4, block=1024, num_warps=4),
    (1024, 3072): Config(rows=1, block=4096, num_warps=4),
    (151936, 1024): Config(rows=4, block=1024, num_warps=4),
}


def config(out_dim: int, in_dim: int) -> Config:
    """The measured configuration of a shape, else one that fits it."""
    return TUNED.get((out_dim, in_dim)) or Config(rows=4, block=min(1024, triton.next_power_of_2(in_dim)), num_warps=4)


@triton.jit
def _tile(at, step: tl.constexpr, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at + step, eviction_policy="evict_first")
    return tl.load(at + step, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def one_row(
    x, weight, out, out_dim,
    IN_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [N] = weight [N, D] @ x [D]; GATED: weight is [2N, D], out = silu(first half @ x) * (second half @ x)."""
    go(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, BLOCK)
    # Rows past the end read the last one; their results are not stored.
    at = weight + tl.minimum(rows, out_dim - 1).to(tl.int64)[:, None] * IN_DIM + lanes[None, :]
    up_at = at + tl.cast(out_dim, tl.int64) * IN_DIM
    even: tl.constexpr = IN_DIM % BLOCK == 0
    first = _tile(at, 0, lanes[None, :] < IN_DIM, even)
    if GATED:
        first_up = _tile(up_at, 0, lanes[None, :] < IN_DIM, even)
    wait(PDL)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    total_up = tl.zeros((ROWS, BLOCK), tl.float32)
    for step in tl.static_range(0, IN_DIM, BLOCK):
        inside = step + lanes < IN_DIM
        values = tl.load(x + step + lanes, mask=inside, other=0.0).to(tl.float32)[None, :]
        total += (first if step == 0 else _tile(at, step, inside[None, :], even)).to(tl.float32) * values
        if GATED:
            total_up += (first_up if step == 0 else _tile(up_at, step, inside[None, :], even)).to(tl.float32) * values
    result = tl.sum(total, axis=1)
    if GATED:
        result = result / (1 + tl.exp(-result)) * tl.sum(total_up, axis=1)
    tl.store(out + rows, result.to(out.dtype.element_ty), mask=rows < out_dim)


def run(x: torch.Tensor, weight: torch.Tensor, chosen: Config, gated: bool = False) -> torch.Tensor:
    """One configuration, of linear or (`gated`) of linear_silu_mul; bench/sweeps/linear.py calls this too."""
    assert x.shape[0] == 1 and weight.is_contiguous(), "one row; the weight's rows must be contiguous"
    out_dim, in_dim = weight.shape[0] // (2 if gated else 1), weight.shape[1]
    out = torch.empty((1, out_dim), dtype=x.dtype, device=x.device)
    one_row[(triton.cdiv(out_dim, chosen.rows),)](
        x, weight, out, out_dim, IN_DIM=in_dim, ROWS=chosen.rows, BLOCK=chosen.block, GATED=gated,
        num_warps=chosen.num_warps, **overlap.launch(),
    )  # fmt: skip
    return out


def aot(in_dim: int, chosen: Config, gated: bool = False) -> Aot:
    """One configuration, to compile offline."""
    return Aot(
        one_row,
        dict.fromkeys(("x", "weight", "out"), "*bf16") | {"out_dim": "i32"},
        {"IN_DIM": in_dim, "ROWS": chosen.rows, "BLOCK": chosen.block, "GATED": gated, "PDL": True},
        num_warps=chosen.num_warps,
        divisible=("x", "weight", "out", "out_dim"),
        wants=("ld.v4", "griddepcontrol.wait"),
    )
