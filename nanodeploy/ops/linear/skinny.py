"""One to sixteen rows against a big weight: nothing but the stream of the weight counts.

One row: a dot product per row of the weight, elementwise in registers. More rows: the weight's tile is the left
operand of tl.dot, so that its 64 or more rows fill the tensor core's M and the few tokens its N. Where too few
programs would result, the inner axis is split; the parts are fp32 and a second kernel adds them in order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops.linear.reference import linear
from nanodeploy.ops.registry import Aot

MAX_TOKENS = 16
NUM_SMS = 132  # of the machine the defaults are made for


@dataclass(frozen=True)
class Config:
    rows: int  # of the weight, per program
    block: int  # of the inner axis, per step
    num_warps: int
    num_stages: int  # steps in flight through shared memory; 1: plain loads, the loop unrolled instead
    splits: int = 1  # of the inner axis


# What bench/sweeps/linear.py found: (one row or more, N, D) -> Config.
TUNED: dict[tuple[bool, int, int], Config] = {
    (True, 6144, 4096): Config(rows=1, block=4096, num_warps=4, num_stages=1),
    (True, 4096, 4096): Config(rows=2, block=2048, num_warps=4, num_stages=1),
    (True, 24576, 4096): Config(rows=2, block=2048, num_warps=4, num_stages=1),
    (True, 4096, 12288): Config(rows=16, block=256, num_warps=4, num_stages=5),
    (True, 151936, 4096): Config(rows=2, block=2048, num_warps=4, num_stages=1),
    (False, 6144, 4096): Config(rows=32, block=128, num_warps=4, num_stages=6),
    (False, 4096, 4096): Config(rows=32, block=128, num_warps=4, num_stages=6),
    (False, 24576, 4096): Config(rows=64, block=128, num_warps=4, num_stages=4),
    (False, 4096, 12288): Config(rows=64, block=128, num_warps=4, num_stages=6, splits=2),
    (False, 151936, 4096): Config(rows=128, block=128, num_warps=8, num_stages=4),
}


def config(num_tokens: int, out_dim: int, in_dim: int) -> Config:
    """The measured configuration of a shape, else one that fits it."""
    tuned = TUNED.get((num_tokens == 1, out_dim, in_dim))
    if tuned:
        return tuned
    block = triton.next_power_of_2(in_dim)
    if num_tokens == 1:
        return Config(rows=4, block=min(1024, block), num_warps=4, num_stages=1)
    block = max(16, min(128, block))
    splits = 1
    while triton.cdiv(out_dim, 64) * splits < 2 * NUM_SMS and in_dim >= 4 * splits * block:
        splits *= 2
    return Config(rows=64, block=block, num_warps=4, num_stages=4, splits=splits)


@triton.jit
def _one_token(
    x, weight, out, out_dim,
    IN_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [SPLITS, N]: each program sums a stretch of the inner axis for ROWS rows of the weight."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < out_dim
    part: tl.constexpr = (IN_DIM + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    start = tl.program_id(1) * part
    lanes = tl.arange(0, BLOCK)
    at = weight + rows.to(tl.int64)[:, None] * IN_DIM + start + lanes[None, :]
    even: tl.constexpr = SPLITS * part == IN_DIM
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    if STAGES == 1:
        for step in tl.static_range(0, part, BLOCK):
            inside = there[:, None] if even else there[:, None] & (start + step + lanes < IN_DIM)[None, :]
            tile = tl.load(at + step, mask=inside, other=0.0, eviction_policy="evict_first")
            if even:
                values = tl.load(x + start + step + lanes)
            else:
                values = tl.load(x + start + step + lanes, mask=start + step + lanes < IN_DIM, other=0.0)
            total += tile.to(tl.float32) * values.to(tl.float32)[None, :]
    else:
        for step in tl.range(0, part, BLOCK, num_stages=STAGES):
            inside = there[:, None] & (start + step + lanes < IN_DIM)[None, :]
            tile = tl.load(at + step, mask=inside, other=0.0, eviction_policy="evict_first")
            values = tl.load(x + start + step + lanes, mask=start + step + lanes < IN_DIM, other=0.0)
            total += tile.to(tl.float32) * values.to(tl.float32)[None, :]
    to = out + tl.program_id(1) * out_dim + rows
    tl.store(to, tl.sum(total, axis=1).to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["num_tokens"])
def _few_tokens(
    x, weight, out, num_tokens, out_dim, stride_x,
    IN_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """out [SPLITS, T, N]: weight tile @ x^T for a stretch of the inner axis."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    part: tl.constexpr = (IN_DIM + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    start = tl.program_id(1) * part
    lanes = tl.arange(0, BLOCK)
    at = weight + rows.to(tl.int64)[:, None] * IN_DIM + start + lanes[None, :]
    x_at = x + tokens[None, :] * stride_x + start + lanes[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, part, BLOCK, num_stages=STAGES):
        inside = start + step + lanes < IN_DIM
        tile = tl.load(
            at + step, mask=(rows < out_dim)[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first"
        )
        values = tl.load(x_at + step, mask=(tokens < num_tokens)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(tile, values, total)
    to = out + (tl.program_id(1) * num_tokens + tokens[None, :]).to(tl.int64) * out_dim + rows[:, None]
    mask = (tokens < num_tokens)[None, :] & (rows < out_dim)[:, None]
    tl.store(to, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_parts(parts, out, num_values, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [num_values] = the sum of parts [SPLITS, num_values], always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_values
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * num_values + at, mask=mask, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


def run(x: torch.Tensor, weight: torch.Tensor, chosen: Config) -> torch.Tensor:
    """One configuration; bench/sweeps/linear.py calls this too."""
    num_tokens, in_dim = x.shape
    out_dim = weight.shape[0]
    assert x.stride(1) == 1 and weight.is_contiguous(), "rows must be contiguous"
    out = torch.empty((num_tokens, out_dim), dtype=x.dtype, device=x.device)
    parts = out
    if chosen.splits > 1:
        parts = torch.empty((chosen.splits, num_tokens, out_dim), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(out_dim, chosen.rows), chosen.splits)
    shape = {
        "IN_DIM": in_dim, "ROWS": chosen.rows, "BLOCK": chosen.block, "SPLITS": chosen.splits,
        "STAGES": chosen.num_stages, "num_warps": chosen.num_warps,
    }  # fmt: skip
    if num_tokens == 1:
        _one_token[grid](x, weight, parts, out_dim, **shape)
    else:
        _few_tokens[grid](x, weight, parts, num_tokens, out_dim, x.stride(0), TOKENS=MAX_TOKENS, **shape)
    if chosen.splits > 1:
        _add_parts[(triton.cdiv(out.numel(), 1024),)](parts, out, out.numel(), SPLITS=chosen.splits, BLOCK=1024)
    return out


def aot(num_tokens: int, out_dim: int, in_dim: int, chosen: Config) -> Aot:
    """The main kernel of one configuration, to compile offline."""
    few = num_tokens > 1
    constexprs = {
        "IN_DIM": in_dim, "ROWS": chosen.rows, "BLOCK": chosen.block, "SPLITS": chosen.splits,
        "STAGES": chosen.num_stages,
    }  # fmt: skip
    signature = {"x": "*bf16", "weight": "*bf16", "out": "*bf16" if chosen.splits == 1 else "*fp32", "out_dim": "i32"}
    return Aot(
        _few_tokens if few else _one_token,
        signature | ({"num_tokens": "i32", "stride_x": "i32"} if few else {}),
        constexprs | ({"TOKENS": MAX_TOKENS} if few else {}),
        num_warps=chosen.num_warps,
        divisible=("x", "weight", "out", "out_dim") + (("stride_x",) if few else ()),
        wants=("cp.async",) if in_dim > chosen.splits * chosen.block and chosen.num_stages > 1 else ("ld.v4",),
    )


def _aot():
    for num_tokens in (1, MAX_TOKENS):
        for out_dim, in_dim in ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (151936, 4096), (2048, 1024)):
            yield aot(num_tokens, out_dim, in_dim, config(num_tokens, out_dim, in_dim))


def _fits(case) -> bool:
    return (
        case.dtype in (torch.bfloat16, torch.float16) and 1 <= case.num_tokens <= MAX_TOKENS and case.in_dim % 16 == 0
    )


@linear.kernel(needs="sm80", when=_fits, aot=_aot)
def skinny(x, weight):
    return run(x, weight, config(x.shape[0], weight.shape[0], x.shape[1]))
