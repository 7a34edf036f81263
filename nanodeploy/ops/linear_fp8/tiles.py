"""Tiles of the result, order "k128": an element is one chain over blocks of 128 columns, whatever the tile.

The tensor core sums a block's products (on Hopper with fewer bits than fp32 has, hence not further), then the block is
scaled and added in fp32. Few tokens: the weight's tile is the left operand, as its rows fill the tensor core's M, and
enough tiles are in flight to keep the memory busy though the inner axis is never split. Both operands come by TMA,
which fills what lies outside with zeros; a program takes whole tiles of one block of scales.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanodeploy.ops import machine, overlap
from nanodeploy.ops.layouts import FP8_BLOCK
from nanodeploy.ops.linear.streamed import prefetch
from nanodeploy.ops.linear_fp8.reference import linear_fp8
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

MAX_TILES = 4096  # of a weight whose inner axis is split
NUM_SMS = 132  # of the machine the configurations are made for
SHARED_BYTES = 220 * 1024  # of one of its SMs, for tiles in flight
GROUP = 8  # tiles of tokens that take a tile of the weight in turn, while the L2 cache has it
_BLOCK = tl.constexpr(FP8_BLOCK)


@dataclass(frozen=True)
class Config:
    tokens: int  # per tile
    rows: int  # of the weight, per tile; divides 128, so that a tile has one scale per block of columns
    num_warps: int
    num_stages: int  # blocks in flight
    weight_left: bool = False  # the left operand is the weight, not the tokens
    persistent: bool = False  # a program per SM takes tile after tile
    ahead: int = 0  # columns of the weight, fetched into L2 while waiting for the kernel ahead
    splits: int = 1  # of the inner axis; more than one leaves the order


def bucket(num_tokens: int) -> int:
    """The tensor core's N that holds so many tokens."""
    return max(16, triton.next_power_of_2(num_tokens))


def config(num_tokens: int, out_dim: int, in_dim: int) -> Config:
    """Few tokens: as many blocks in flight as shared memory holds. Many: square tiles."""
    if num_tokens > 64:
        if triton.cdiv(num_tokens, 128) * triton.cdiv(out_dim, 128) >= 2 * NUM_SMS:
            return Config(128, 128, 8, 4, persistent=True)
        return Config(128, 64, 4, 6)
    tokens = bucket(num_tokens)
    rows, num_warps = 64, 4
    programs_per_sm = min(4, triton.cdiv(triton.cdiv(out_dim, rows), NUM_SMS))
    num_stages = SHARED_BYTES // programs_per_sm // ((tokens + rows) * FP8_BLOCK)
    num_stages = max(3, min(num_stages, 12, triton.cdiv(in_dim, FP8_BLOCK)))
    return Config(tokens, rows, num_warps, num_stages, weight_left=True, ahead=512)


@triton.jit
def _place(tile, num_t, num_n, GROUP: tl.constexpr):
    """(tile of tokens, tile of rows) number `tile`."""
    first = tile // (GROUP * num_n) * GROUP
    size = tl.minimum(num_t - first, GROUP)
    within = tile % (GROUP * num_n)
    return first + within % size, within // size


@triton.jit
def _sums(
    x_desc, w_desc, x_scales, weight_scales, t, n, first, last, num_tokens, in_dim, stride_token, stride_block,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """One tile, of the blocks from `first` up to `last`: [ROWS, TOKENS] with LEFT, else [TOKENS, ROWS]."""
    tokens = tl.minimum(t * TOKENS + tl.arange(0, TOKENS), num_tokens - 1)
    x_scale_at = x_scales + tokens.to(tl.int64) * stride_token
    weight_scale_at = weight_scales + n * ROWS // _BLOCK * tl.cdiv(in_dim, _BLOCK)
    total = tl.zeros((ROWS, TOKENS) if LEFT else (TOKENS, ROWS), tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        scale = tl.load(x_scale_at + block * stride_block) * tl.load(weight_scale_at + block)
        w = w_desc.load([n * ROWS, block * _BLOCK])
        x = x_desc.load([t * TOKENS, block * _BLOCK])
        if LEFT:
            total = tl.fma(tl.dot(w, x.T), tl.broadcast_to(scale[None, :], (ROWS, TOKENS)), total)
        else:
            total = tl.fma(tl.dot(x, w.T), tl.broadcast_to(scale[:, None], (TOKENS, ROWS)), total)
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


@triton.jit(do_not_specialize=["num_tokens", "stride_block"])
def _product(
    x_desc, w_desc, x_scales, weight_scales, out, weight, parts, arrived, num_tokens, out_dim, in_dim,
    stride_token, stride_block,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr, PERSISTENT: tl.constexpr,
    SPLITS: tl.constexpr, AHEAD: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, K] @ weight [N, K]^T, both in e4m3 with their scales.

    With SPLITS: parts fp32 [SPLITS, tiles, ROWS, TOKENS]; arrived int32 [tiles], 0 before and after.
    """
    go(PDL)
    num_t, num_n = tl.cdiv(num_tokens, TOKENS), tl.cdiv(out_dim, ROWS)
    num_blocks = tl.cdiv(in_dim, _BLOCK)
    if PERSISTENT:
        wait(PDL)
        for tile in tl.range(tl.program_id(0), num_t * num_n, tl.num_programs(0)):
            t, n = _place(tile, num_t, num_n, GROUP)
            total = _sums(
                x_desc, w_desc, x_scales, weight_scales, t, n, 0, num_blocks, num_tokens, in_dim,
                stride_token, stride_block, TOKENS, ROWS, STAGES, LEFT,
            )  # fmt: skip
            _store(out, total, t, n, num_tokens, out_dim, TOKENS, ROWS, LEFT)
    else:
        tile = tl.program_id(0)
        t, n = _place(tile, num_t, num_n, GROUP)
        per_split = tl.cdiv(num_blocks, SPLITS)
        first = tl.program_id(1) * per_split
        last = tl.minimum(first + per_split, num_blocks)
        if AHEAD > 0:  # a last split that is shorter or empty fetches what lies before its end
            rows = tl.minimum(n * ROWS + tl.arange(0, ROWS), out_dim - 1)
            begin = tl.minimum(first * _BLOCK, in_dim - AHEAD)
            prefetch(weight + rows.to(tl.int64) * in_dim + begin, AHEAD, PDL)
        wait(PDL)
        total = _sums(
            x_desc, w_desc, x_scales, weight_scales, t, n, first, last, num_tokens, in_dim,
            stride_token, stride_block, TOKENS, ROWS, STAGES, LEFT,
        )  # fmt: skip
        all_here = True
        if SPLITS > 1:
            tl.static_assert(LEFT)
            size: tl.constexpr = ROWS * TOKENS
            mine = (
                parts + tile.to(tl.int64) * size + tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
            )
            stride = tl.num_programs(0).to(tl.int64) * size
            tl.store(mine + tl.program_id(1) * stride, total)
            tl.debug_barrier()  # all of the part is stored before it is announced
            all_here = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
            if all_here:
                total = tl.zeros((ROWS, TOKENS), tl.float32)
                for split in tl.static_range(SPLITS):
                    total += tl.load(mine + split * stride, cache_modifier=".cg")
                tl.store(arrived + tile, 0)
        if all_here:
            _store(out, total, t, n, num_tokens, out_dim, TOKENS, ROWS, LEFT)


def for_tma(x: torch.Tensor) -> torch.Tensor:
    """Rows that TMA can read: each begins at a multiple of 16 bytes."""
    if x.stride(1) == 1 and x.data_ptr() % 16 == 0 and (x.shape[0] == 1 or x.stride(0) % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def row_stride(x: torch.Tensor) -> int:
    """Of a single row it means nothing, and may be what TMA cannot take."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


@functools.cache
def _arrived(device: torch.device) -> torch.Tensor:
    """Counters of the programs that are done with a tile. Each launch leaves them at 0; launches run one by one."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def run(
    x: torch.Tensor, x_scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, dtype: torch.dtype,
    chosen: Config,
) -> torch.Tensor:  # fmt: skip
    """One configuration; bench/sweeps/linear_fp8.py calls this too."""
    (num_tokens, in_dim), out_dim = x.shape, weight.shape[0]
    assert weight.is_contiguous() and weight_scales.is_contiguous(), "the weight and its scales must be contiguous"
    out = torch.empty((num_tokens, out_dim), dtype=dtype, device=x.device)
    if num_tokens == 0:
        return out
    x = for_tma(x)
    tiles = triton.cdiv(num_tokens, chosen.tokens) * triton.cdiv(out_dim, chosen.rows)
    parts = arrived = out
    if chosen.splits > 1:
        assert tiles <= MAX_TILES, f"{tiles} tiles; a split weight may have {MAX_TILES}"
        parts = torch.empty((chosen.splits, tiles, chosen.rows, chosen.tokens), dtype=torch.float32, device=x.device)
        arrived = _arrived(x.device)
    _product[(min(tiles, machine.num_sms()) if chosen.persistent else tiles, chosen.splits)](
        TensorDescriptor(x, [num_tokens, in_dim], [row_stride(x), 1], [chosen.tokens, FP8_BLOCK]),
        TensorDescriptor(weight, [out_dim, in_dim], [in_dim, 1], [chosen.rows, FP8_BLOCK]),
        x_scales,
        weight_scales,
        out,
        weight,
        parts,
        arrived,
        num_tokens,
        out_dim,
        in_dim,
        *x_scales.stride(),
        **_constexprs(chosen, in_dim),
        **overlap.launch(),
    )
    return out


@functools.cache
def _constexprs(chosen: Config, in_dim: int) -> dict[str, Any]:
    shape = {"TOKENS": chosen.tokens, "ROWS": chosen.rows, "STAGES": chosen.num_stages}
    ahead = min(chosen.ahead, in_dim) // 16 * 16
    how = {"LEFT": chosen.weight_left, "PERSISTENT": chosen.persistent, "SPLITS": chosen.splits, "AHEAD": ahead}
    return {**shape, **how, "GROUP": GROUP, "num_warps": chosen.num_warps, "num_stages": chosen.num_stages}


def aot(chosen: Config) -> Aot:
    """One configuration, to compile offline."""
    constexprs = {k: v for k, v in _constexprs(chosen, 4096).items() if k not in ("num_warps", "num_stages")}
    signature = {
        "x_desc": f"tensordesc<fp8e4nv[{chosen.tokens},{FP8_BLOCK}]>",
        "w_desc": f"tensordesc<fp8e4nv[{chosen.rows},{FP8_BLOCK}]>",
        **dict.fromkeys(("x_scales", "weight_scales"), "*fp32"),
        "out": "*bf16",
        "weight": "*fp8e4nv",
        "parts": "*fp32" if chosen.splits > 1 else "*bf16",
        "arrived": "*i32" if chosen.splits > 1 else "*bf16",
        **dict.fromkeys(("num_tokens", "out_dim", "in_dim", "stride_block"), "i32"),
    }
    divisible = ("x_scales", "weight_scales", "out", "weight", "parts", "arrived", "out_dim", "in_dim")
    return Aot(
        _product,
        signature,
        constexprs | {"stride_token": 1, "PDL": not chosen.persistent},
        chosen.num_warps,
        chosen.num_stages,
        divisible,
        wants=("wgmma", "tma", "cp.async"),
    )


def _aot():
    shapes = [(1, 24576, 4096), (1, 6144, 4096), (1, 4096, 4096), (32, 24576, 4096), (32, 6144, 4096)]
    shapes += [(64, 24576, 4096), (64, 6144, 4096), (128, 4096, 4096), (8192, 24576, 4096)]
    for chosen in dict.fromkeys(config(*shape) for shape in shapes):
        yield aot(chosen)


def takes(case) -> bool:
    """Results of 16 bits (for those the tensor core's sums are good enough); rows of whole 16 bytes, as TMA wants."""
    return case.dtype in (torch.bfloat16, torch.float16) and case.in_dim % 16 == 0


@linear_fp8.kernel(needs="sm90", when=takes, batch_invariant=True, order="k128", aot=_aot)
def tiles(x, x_scales, weight, weight_scales, dtype):
    return run(x, x_scales, weight, weight_scales, dtype, config(x.shape[0], *weight.shape))
