"""A tile of one head's product per program: of few tokens a stream of the weights, of many a plain matrix product.

A program takes the whole inner axis, in one ascending run, so that a row has the same bits in any batch and under any
configuration (order "k16": see linear/fixed_order.py). Of few tokens the weight's tile is the left operand: its rows
fill the tensor core's M. While a program waits for the kernel ahead, the L2 cache already fetches its weight.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanodeploy.ops import overlap
from nanodeploy.ops.head_linear.reference import head_linear
from nanodeploy.ops.linear.streamed import prefetch
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

FEW = 64  # tokens up to which the weight is the left operand
NUM_SMS = 132  # of the machine the configurations are made for


@dataclass(frozen=True)
class Config:
    tokens: int  # per tile
    rows: int  # of the weight, per tile
    block: int  # of the inner axis, per step
    num_warps: int
    num_stages: int  # steps in flight
    weight_left: bool = False


# Prefill, and the tokens of a context that mla_prefill/expanded makes keys and values of.
MANY = Config(128, 128, 64, 8, 3)


def config(num_tokens: int, num_heads: int, out_dim: int) -> Config:
    if num_tokens > 4 * FEW:
        return MANY
    if num_tokens > FEW:
        return Config(64, 128, 64, 4, 4)
    # Few heads: smaller tiles, so that every SM has one.
    rows = 64 if num_heads * triton.cdiv(out_dim, 128) < NUM_SMS else 128
    return Config(max(16, triton.next_power_of_2(num_tokens)), rows, 128, 4, 4, weight_left=True)


def configs(num_tokens: int) -> list[Config]:
    """What a sweep tries."""
    tokens = max(16, triton.next_power_of_2(num_tokens))
    if num_tokens <= FEW:
        return [Config(tokens, rows, block, 4, 4, True) for rows in (64, 128) for block in (64, 128)]
    left = [Config(min(tokens, 128), rows, 64, warps, 4, True) for rows, warps in ((64, 4), (128, 4), (128, 8))]
    right = [
        (64, 128, 64, 4, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
    ]
    return [*(left if num_tokens <= 512 else ()), *(Config(*shape) for shape in right)]


@triton.jit(do_not_specialize=["num_tokens"])
def _product(
    x,
    weight,
    out,
    num_tokens,
    out_dim,
    stride_x,
    stride_x_head,
    stride_w_head,
    stride_w,
    stride_out,
    stride_out_head,
    IN_DIM: tl.constexpr,
    BY_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    LEFT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile of tokens and rows, head). stride_w is that of the weight's axis that is not contiguous: of its
    rows, or of its columns with BY_COLUMNS."""
    go(PDL)
    num_n = tl.cdiv(out_dim, ROWS)
    tokens = tl.program_id(0) // num_n * TOKENS + tl.arange(0, TOKENS)
    rows = tl.program_id(0) % num_n * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    weight += head * stride_w_head
    if LEFT and IN_DIM % BLOCK == 0:
        # What lies past the end is fetched from the start instead.
        if BY_COLUMNS:
            first = tl.minimum(tl.program_id(0) % num_n * ROWS, out_dim - ROWS)
            if out_dim % ROWS == 0:
                for step in range(0, IN_DIM, BLOCK):
                    prefetch(weight + (step + lanes) * stride_w + first, 2 * ROWS, PDL)
        else:
            prefetch(weight + tl.where(rows < out_dim, rows, 0) * stride_w, 2 * IN_DIM, PDL)
    wait(PDL)
    # Tokens past the end read the last one; their results are not stored.
    x_at = x + head * stride_x_head + tl.minimum(tokens, num_tokens - 1).to(tl.int64) * stride_x
    x_at = x_at[:, None] + lanes[None, :]
    total = tl.zeros((ROWS, TOKENS) if LEFT else (TOKENS, ROWS), tl.float32)
    for step in tl.range(0, IN_DIM, BLOCK, num_stages=STAGES):
        inside = step + lanes < IN_DIM
        if IN_DIM % BLOCK == 0:
            values = tl.load(x_at + step)
        else:
            values = tl.load(x_at + step, mask=inside[None, :], other=0.0)
        if BY_COLUMNS:  # [BLOCK, ROWS]
            at = weight + (step + lanes)[:, None] * stride_w + rows[None, :]
            part = tl.load(at, mask=inside[:, None] & (rows < out_dim)[None, :], other=0.0).T
        else:  # [ROWS, BLOCK]
            at = weight + rows[:, None] * stride_w + (step + lanes)[None, :]
            part = tl.load(at, mask=(rows < out_dim)[:, None] & inside[None, :], other=0.0)
        if LEFT:
            total = tl.dot(part, values.T, total)
        else:
            total = tl.dot(values, part.T, total)
    to = out + head * stride_out_head
    there = tokens.to(tl.int64) * stride_out
    if LEFT:
        mask = (rows < out_dim)[:, None] & (tokens < num_tokens)[None, :]
        tl.store(to + there[None, :] + rows[:, None], total.to(out.dtype.element_ty), mask=mask)
    else:
        mask = (tokens < num_tokens)[:, None] & (rows < out_dim)[None, :]
        tl.store(to + there[:, None] + rows[None, :], total.to(out.dtype.element_ty), mask=mask)


def product(x: Tensor, weight: Tensor, out: Tensor, chosen: Config) -> Tensor:
    """out [T, H, N] = what head_linear gives. x [T, H, D] and out may be any views whose last axis is contiguous."""
    num_tokens, num_heads, in_dim = x.shape
    out_dim = weight.shape[1]
    by_columns = weight.stride(2) != 1
    assert x.stride(2) == out.stride(2) == weight.stride(1 if by_columns else 2) == 1
    if num_tokens == 0:
        return out
    tiles = triton.cdiv(num_tokens, chosen.tokens) * triton.cdiv(out_dim, chosen.rows)
    _product[(tiles, num_heads)](
        x,
        weight,
        out,
        num_tokens,
        out_dim,
        *x.stride()[:2],
        weight.stride(0),
        weight.stride(2 if by_columns else 1),
        *out.stride()[:2],
        **_constexprs(chosen, in_dim, by_columns),
        num_warps=chosen.num_warps,
        **overlap.launch(),
    )
    return out


@functools.cache
def _constexprs(chosen: Config, in_dim: int, by_columns: bool) -> dict[str, Any]:
    block = max(16, min(chosen.block, triton.next_power_of_2(in_dim)))
    shape = {"IN_DIM": in_dim, "BY_COLUMNS": by_columns, "TOKENS": chosen.tokens, "ROWS": chosen.rows, "BLOCK": block}
    return {**shape, "STAGES": chosen.num_stages, "LEFT": chosen.weight_left}


def aot(chosen: Config, in_dim: int, by_columns: bool) -> Aot:
    """One configuration, to compile offline."""
    strides = ("stride_x", "stride_x_head", "stride_w_head", "stride_w", "stride_out", "stride_out_head")
    pointers = dict.fromkeys(("x", "weight", "out"), "*bf16")
    return Aot(
        _product,
        pointers | dict.fromkeys(("num_tokens", "out_dim", *strides), "i32"),
        _constexprs(chosen, in_dim, by_columns) | {"PDL": True},
        chosen.num_warps,
        divisible=(*pointers, "out_dim", *strides),
        wants=("wgmma", "cp.async"),
    )


def _aot():
    for num_tokens, num_heads in ((1, 128), (1, 16), (64, 128), (64, 16), (256, 128), (8192, 128)):
        for in_dim, out_dim, by_columns in ((128, 512, True), (512, 128, False)):
            yield aot(config(num_tokens, num_heads, out_dim), in_dim, by_columns)


def takes(case) -> bool:
    return case.dtype in (torch.bfloat16, torch.float16)


@head_linear.kernel(needs="sm80", when=takes, batch_invariant=True, order="k16", aot=_aot)
def tiles(x, weight):
    num_tokens, num_heads, _ = x.shape
    out = x.new_empty((num_tokens, num_heads, weight.shape[1]))
    return product(x, weight, out, config(num_tokens, num_heads, weight.shape[1]))
