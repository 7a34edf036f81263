"""Products for --deterministic, order "k16": an output is one chain of tensor-core steps over 16 columns each.

On Hopper such a chain has the same bits whichever instruction makes it: mma.sync or wgmma, of any size, with weight and
tokens as left and right operand or the other way round (measured; tests/ops/test_orders.py holds us to it). So tiles
may differ by the number of tokens as long as the inner axis is never split. Few tokens: the weight's tile is the left
operand, as its rows fill the tensor core's M. Both operands come by TMA, which fills what lies outside with zeros.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanodeploy.ops import machine, overlap
from nanodeploy.ops.linear.reference import linear
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

NUM_SMS = 132  # of the machine the configurations are made for
GROUP = 8  # tiles of tokens that take a tile of the weight in turn, while the L2 cache has it


@dataclass(frozen=True)
class Config:
    tokens: int  # per tile
    rows: int  # of the weight, per tile; of each half where gated
    block: int  # of the inner axis, per step
    num_warps: int
    num_stages: int  # steps in flight
    weight_left: bool = False  # the left operand is the weight, not the tokens
    persistent: bool = False  # a program per SM takes tile after tile
    ahead: int = 0  # of the inner axis, in units of 64: fetched into L2 while waiting for the kernel ahead


def config(num_tokens: int, out_dim: int) -> Config:
    """What was fastest on an H200 at Qwen3-8B's shapes."""
    if num_tokens <= 16:
        return Config(16, 64, 128, 4, 6, weight_left=True, ahead=8)
    if num_tokens <= 64:
        if out_dim > 2**16:
            return Config(64, 128, 64, 8, 8, weight_left=True)
        return Config(64, 64, 128, 4, 6, weight_left=True, ahead=8)
    if out_dim * triton.cdiv(num_tokens, 128) <= 4096:
        return Config(128, 32, 128, 4, 5)
    if out_dim * triton.cdiv(num_tokens, 128) <= 8192:
        return Config(128, 64, 64, 4, 6)
    if num_tokens <= 128 and out_dim <= 2**15:
        return Config(128, 64, 128, 4, 4, weight_left=True)
    if triton.cdiv(num_tokens, 128) * triton.cdiv(out_dim, 256) >= 4 * NUM_SMS and num_tokens > 256:
        return Config(128, 256, 64, 8, 3, persistent=True)
    if num_tokens > 128 and out_dim > 2**16:
        return Config(256, 128, 64, 8, 4, weight_left=True)
    return Config(128, 128, 64, 8, 5)


def gated_config(num_tokens: int) -> Config:
    if num_tokens <= 16:
        return Config(16, 64, 128, 4, 4, weight_left=True, ahead=8)
    if num_tokens <= 64:
        return Config(64, 64, 64, 4, 6, weight_left=True, ahead=8)
    if num_tokens <= 512:
        return Config(128, 64, 64, 8, 5)
    return Config(128, 128, 64, 8, 3, persistent=True)


@triton.jit
def _place(tile, num_t, num_n, GROUP: tl.constexpr):
    """(tile of tokens, tile of rows) number `tile`."""
    first = tile // (GROUP * num_n) * GROUP
    size = tl.minimum(num_t - first, GROUP)
    within = tile % (GROUP * num_n)
    return first + within % size, within // size


@triton.jit
def _prefetch(weight, row, num_rows, in_dim, ROWS: tl.constexpr, AHEAD: tl.constexpr):
    """Let the L2 cache fetch the first AHEAD * 64 columns of ROWS rows; those past the end fetch the weight's start."""
    rows = row + tl.arange(0, ROWS)
    at = weight + rows.to(tl.int64)[:, None] * in_dim + (tl.arange(0, AHEAD) * 64)[None, :]
    at = tl.where((rows < num_rows)[:, None], at.to(tl.int64), weight.to(tl.int64))
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _sums(
    x_desc, w_desc, t, row, up_row, in_dim,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """One tile: [ROWS, TOKENS] with LEFT, else [TOKENS, ROWS]; GATED: silu(rows from `row`) * rows from `up_row`."""
    total = tl.zeros((ROWS, TOKENS) if LEFT else (TOKENS, ROWS), tl.float32)
    up = tl.zeros((ROWS, TOKENS) if LEFT else (TOKENS, ROWS), tl.float32)
    for k in tl.range(0, in_dim, BLOCK, num_stages=STAGES):
        w = w_desc.load([row, k])
        x = x_desc.load([t * TOKENS, k])
        if LEFT:
            total = tl.dot(w, x.T, total)
        else:
            total = tl.dot(x, w.T, total)
        if GATED:
            w_up = w_desc.load([up_row, k])
            if LEFT:
                up = tl.dot(w_up, x.T, up)
            else:
                up = tl.dot(x, w_up.T, up)
    if GATED:
        total = total / (1 + tl.exp(-total)) * up
    return total


@triton.jit
def _store(
    out, total, t, n, num_tokens, out_dim,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    tokens = t * TOKENS + tl.arange(0, TOKENS)
    rows = n * ROWS + tl.arange(0, ROWS)
    if LEFT:
        at = out + tokens.to(tl.int64)[None, :] * out_dim + rows[:, None]
        tl.store(at, total.to(out.dtype.element_ty), mask=(tokens < num_tokens)[None, :] & (rows < out_dim)[:, None])
    else:
        at = out + tokens.to(tl.int64)[:, None] * out_dim + rows[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=(tokens < num_tokens)[:, None] & (rows < out_dim)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _product(
    x_desc, w_desc, out, weight, num_tokens, out_dim, in_dim,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr,
    PERSISTENT: tl.constexpr, AHEAD: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, D] @ weight [N, D]^T; GATED: weight is [2N, D], out = silu(first half's) * second half's."""
    go(PDL)
    num_t, num_n = tl.cdiv(num_tokens, TOKENS), tl.cdiv(out_dim, ROWS)
    if PERSISTENT:
        wait(PDL)
        for tile in tl.range(tl.program_id(0), num_t * num_n, tl.num_programs(0), flatten=True):
            t, n = _place(tile, num_t, num_n, GROUP)
            total = _sums(
                x_desc, w_desc, t, n * ROWS, out_dim + n * ROWS, in_dim, TOKENS, ROWS, BLOCK, STAGES, LEFT, GATED
            )
            _store(out, total, t, n, num_tokens, out_dim, TOKENS, ROWS, LEFT)
    else:
        t, n = _place(tl.program_id(0), num_t, num_n, GROUP)
        if PDL and AHEAD > 0:
            _prefetch(weight, n * ROWS, out_dim, in_dim, ROWS, AHEAD)
        wait(PDL)
        total = _sums(x_desc, w_desc, t, n * ROWS, out_dim + n * ROWS, in_dim, TOKENS, ROWS, BLOCK, STAGES, LEFT, GATED)
        _store(out, total, t, n, num_tokens, out_dim, TOKENS, ROWS, LEFT)


def run(x: torch.Tensor, weight: torch.Tensor, chosen: Config, gated: bool = False) -> torch.Tensor:
    """One configuration, of linear or (`gated`) of linear_silu_mul."""
    num_tokens, in_dim = x.shape
    out_dim = weight.shape[0] // (2 if gated else 1)
    assert x.stride(1) == 1 and weight.is_contiguous(), "rows must be contiguous"
    out = torch.empty((num_tokens, out_dim), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    if x.stride(0) % 8 or x.data_ptr() % 16:  # what TMA cannot read
        x = x.clone(memory_format=torch.contiguous_format)
    strides = [x.stride(0) if num_tokens > 1 else in_dim, 1]
    tiles = triton.cdiv(num_tokens, chosen.tokens) * triton.cdiv(out_dim, chosen.rows)
    _product[(min(tiles, machine.num_sms()) if chosen.persistent else tiles,)](
        TensorDescriptor(x, [num_tokens, in_dim], strides, [chosen.tokens, chosen.block]),
        TensorDescriptor(weight, list(weight.shape), [in_dim, 1], [chosen.rows, chosen.block]),
        out,
        weight,
        num_tokens,
        out_dim,
        in_dim,
        **_constexprs(chosen, gated),
        **overlap.launch(),
    )
    return out


@functools.cache
def _constexprs(chosen: Config, gated: bool) -> dict[str, Any]:
    shape = {"TOKENS": chosen.tokens, "ROWS": chosen.rows, "BLOCK": chosen.block, "STAGES": chosen.num_stages}
    how = {"LEFT": chosen.weight_left, "PERSISTENT": chosen.persistent, "AHEAD": chosen.ahead, "GROUP": GROUP}
    return {**shape, **how, "GATED": gated, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def aot(chosen: Config, gated: bool = False) -> Aot:
    """One configuration, to compile offline."""
    constexprs = {k: v for k, v in _constexprs(chosen, gated).items() if k not in ("num_warps", "num_stages")}
    signature = {
        "x_desc": f"tensordesc<bf16[{chosen.tokens},{chosen.block}]>",
        "w_desc": f"tensordesc<bf16[{chosen.rows},{chosen.block}]>",
    }
    signature |= {"out": "*bf16", "weight": "*bf16", "num_tokens": "i32", "out_dim": "i32", "in_dim": "i32"}
    divisible = ("out", "weight", "out_dim", "in_dim")
    wants = ("wgmma", "tma")
    options = (chosen.num_warps, chosen.num_stages, divisible, wants)
    return Aot(_product, signature, constexprs | {"PDL": False}, *options)


def _aot():
    for num_tokens, out_dim in ((1, 6144), (64, 6144), (64, 151936), (128, 4096), (128, 6144), (256, 4096)):
        yield aot(config(num_tokens, out_dim))
    for num_tokens, out_dim in ((256, 24576), (256, 151936), (8192, 24576)):
        yield aot(config(num_tokens, out_dim))


def takes(case) -> bool:
    """Sixteen-bit values in rows of whole 16 bytes, as TMA wants them."""
    return case.dtype in (torch.bfloat16, torch.float16) and case.in_dim % 8 == 0


@linear.kernel(needs="sm90", when=takes, batch_invariant=True, order="k16", aot=_aot)
def fixed_order(x, weight):
    return run(x, weight, config(x.shape[0], weight.shape[0]))
