"""Two products over tiles of tokens of one expert, and a sum.

ops.moe_align sorts the token-slots into tiles. `_first` gathers a tile's tokens by their ids, multiplies them with a
stretch of the gate's rows and the same of up's, and writes h in the order of the tiles; `_second` multiplies h with
down's rows, weights it, and writes every slot's part to where the slot stands; `_combine` adds the parts of a token.
Weights and h come by TMA, which fills what lies outside with zeros, so that no tile reads another expert's rows.

An output is one chain of tensor-core steps along the inner axis, whatever the tile: 16 columns each, or in FP8 32, of
which four make a sum that is scaled and added. So its bits depend on no other row (order "k16").
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from nanodeploy.config import triton_interpret
from nanodeploy.ops import machine, overlap
from nanodeploy.ops.e4m3 import block_scales, to_e4m3
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK, num_fp8_blocks
from nanodeploy.ops.moe_align import counted
from nanodeploy.ops.moe_gemm.reference import moe_gemm, out_dtype
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.quantize_fp8.tiles import tiles as quantise
from nanodeploy.ops.registry import Aot

COMBINED = 1024  # columns of a program that sums
_SCALED = tl.constexpr(FP8_BLOCK)


@dataclass(frozen=True)
class Config:
    """How one of the two products is cut."""

    rows: int  # of the weight, per tile; in the first product of each half
    block: int  # of the inner axis, per step
    num_warps: int
    num_stages: int  # steps in flight
    weight_left: bool = False  # the left operand is the weight, not the tokens
    persistent: bool = False  # a program takes tile after tile
    programs: int = 1  # per SM, of a persistent one
    group: int = 1  # tiles of tokens that take a tile of the weight in turn, while the L2 cache has it


@dataclass(frozen=True)
class Schedule:
    tokens: int  # per tile
    first: Config
    second: Config


@triton.jit
def _used(tile_experts, most_tiles):
    """Tiles that have an expert. They stand first."""
    used = 0
    first = 0
    while first < most_tiles:
        tiles = first + tl.arange(0, 1024)
        used += tl.sum((tl.load(tile_experts + tiles, mask=tiles < most_tiles, other=-1) >= 0).to(tl.int32), axis=0)
        first += 1024
    return used


@triton.jit
def _place(index, num_tiles, num_n, GROUP: tl.constexpr):
    """(tile of tokens, tile of the weight's rows) number `index`."""
    if GROUP == 1:
        return index // num_n, index % num_n
    first = index // (GROUP * num_n) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = index % (GROUP * num_n)
    return first + within % size, within // size


@triton.jit
def _tokens(x, x_row, k, DIM: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """Columns k to k + BLOCK of a tile's tokens. GATHER: x_row are addresses of rows [TOKENS]; else x is a descriptor,
    and x_row its first row."""
    if not GATHER:
        values = x.load([x_row, k])
    elif DIM % BLOCK == 0:
        values = tl.load(x_row[:, None] + (k + tl.arange(0, BLOCK))[None, :])
    else:
        cols = k + tl.arange(0, BLOCK)
        values = tl.load(x_row[:, None] + cols[None, :], mask=(cols < DIM)[None, :], other=0.0)
    return values


@triton.jit
def _sums(
    x, x_row, w_desc, expert, n,
    DIM: tl.constexpr, GATHER: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """A tile's products with each of the weight's PARTS, [ROWS, TOKENS] with LEFT, else [TOKENS, ROWS]; where there is
    one part, twice the same."""
    if LEFT and ROWS >= 64:  # enough for the tensor cores: the left operand stays in shared memory
        total = tl.zeros((ROWS, TOKENS), tl.float32)
        total_up = total
        for k in tl.range(0, DIM, BLOCK, num_stages=STAGES):
            w = w_desc.load([expert * PARTS, n * ROWS, k]).reshape(ROWS, BLOCK)
            values = _tokens(x, x_row, k, DIM, GATHER, BLOCK)
            total = tl.dot(w, values.T, total)
            if PARTS == 2:
                w_up = w_desc.load([expert * PARTS + 1, n * ROWS, k]).reshape(ROWS, BLOCK)
                total_up = tl.dot(w_up, values.T, total_up)
    else:
        both = tl.zeros((PARTS * ROWS, TOKENS) if LEFT else (TOKENS, PARTS * ROWS), tl.float32)
        for k in tl.range(0, DIM, BLOCK, num_stages=STAGES):
            w = w_desc.load([expert * PARTS, n * ROWS, k]).reshape(PARTS * ROWS, BLOCK)
            values = _tokens(x, x_row, k, DIM, GATHER, BLOCK)
            if LEFT:
                both = tl.dot(w, values.T, both)
            else:
                both = tl.dot(values, w.T, both)
        if PARTS == 1:
            total, total_up = both, both
        elif LEFT:
            total, total_up = tl.split(both.reshape(2, ROWS, TOKENS).permute(1, 2, 0))
        else:
            total, total_up = tl.split(both.reshape(TOKENS, 2, ROWS).permute(0, 2, 1))
    return total, total_up


@triton.jit
def _scaled_sums(
    x, x_row, x_scale_at, stride_x_scale, w_desc, w_scale_at, stride_w_part, expert, n,
    DIM: tl.constexpr, GATHER: tl.constexpr, PARTS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, LEFT: tl.constexpr,
):  # fmt: skip
    """The same in FP8, where a step is the 128 columns of a scale.

    x_scale_at: addresses of the tokens' first scales [TOKENS]; w_scale_at: of the first part's first scale.
    """
    total = tl.zeros((ROWS, TOKENS) if LEFT else (TOKENS, ROWS), tl.float32)
    total_up = total
    # One step ahead, so that nobody waits for them.
    x_scale = tl.load(x_scale_at)
    w_scale = tl.load(w_scale_at)
    up_scale = tl.load(w_scale_at + stride_w_part)
    for k in tl.range(0, DIM, BLOCK, num_stages=STAGES):
        w = w_desc.load([expert * PARTS, n * ROWS, k]).reshape(ROWS, BLOCK)
        values = _tokens(x, x_row, k, DIM, GATHER, BLOCK)
        if LEFT:
            total += tl.dot(w, values.T) * (x_scale * w_scale)[None, :]
        else:
            total += tl.dot(values, w.T) * (x_scale * w_scale)[:, None]
        if PARTS == 2:
            w_up = w_desc.load([expert * PARTS + 1, n * ROWS, k]).reshape(ROWS, BLOCK)
            if LEFT:
                total_up += tl.dot(w_up, values.T) * (x_scale * up_scale)[None, :]
            else:
                total_up += tl.dot(values, w_up.T) * (x_scale * up_scale)[:, None]
        next_block = tl.minimum(k // BLOCK + 1, (DIM - 1) // BLOCK)
        x_scale = tl.load(x_scale_at + next_block * stride_x_scale)
        w_scale = tl.load(w_scale_at + next_block)
        if PARTS == 2:
            up_scale = tl.load(w_scale_at + stride_w_part + next_block)
    return total, total_up


@triton.jit
def _first_tile(
    x, x_scales, w_desc, w_scales, rows, tile_experts, h, h_scales, tile, n,
    num_slots, top_k, inner, stride_x, stride_x_token, stride_x_scale, num_rows,
    DIM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    LEFT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_experts + tile)
    places = tile * TOKENS + tl.arange(0, TOKENS)
    cols = n * ROWS + tl.arange(0, ROWS)
    tokens = tl.minimum(tl.load(rows + places), num_slots - 1) // top_k  # nobody reads the last one
    x_row = x + tokens.to(tl.int64) * stride_x
    if x_scales is None:
        gate, up = _sums(x, x_row, w_desc, expert, n, DIM, True, 2, TOKENS, ROWS, BLOCK, STAGES, LEFT)
    else:
        blocks_down: tl.constexpr = (DIM + _SCALED - 1) // _SCALED
        stride_part = tl.cdiv(inner, _SCALED) * blocks_down
        w_scale_at = w_scales + expert.to(tl.int64) * 2 * stride_part + n * ROWS // _SCALED * blocks_down
        gate, up = _scaled_sums(
            x, x_row, x_scales + tokens * stride_x_token, stride_x_scale, w_desc, w_scale_at, stride_part, expert, n,
            DIM, True, 2, TOKENS, ROWS, BLOCK, STAGES, LEFT,
        )  # fmt: skip
    result = gate / (1 + tl.exp(-gate)) * up
    if LEFT:
        at = h + places.to(tl.int64)[None, :] * inner + cols[:, None]
        inside = (cols < inner)[:, None]
    else:
        at = h + places.to(tl.int64)[:, None] * inner + cols[None, :]
        inside = (cols < inner)[None, :]
    if x_scales is None:
        tl.store(at, result.to(h.dtype.element_ty), mask=inside)
    else:
        scale, factor = block_scales(tl.max(tl.abs(result), axis=0 if LEFT else 1))
        tl.store(h_scales + n * num_rows + places, scale)
        scaled = result * (factor[None, :] if LEFT else factor[:, None])
        tl.store(at, to_e4m3(scaled, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["num_slots", "most_tiles", "num_rows"])
def _first(
    x, x_scales, w_desc, w_scales, rows, tile_experts, h, h_scales,
    num_slots, top_k, inner, stride_x, stride_x_token, stride_x_scale, num_rows, most_tiles,
    DIM: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    LEFT: tl.constexpr, PERSISTENT: tl.constexpr, GROUP: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h [M, I] = silu(G x) * (U x), for every place of the tiles; FP8 with h_scales [ceil(I/128), M]."""
    go(PDL)
    num_n = tl.cdiv(inner, ROWS)
    wait(PDL)
    if PERSISTENT:
        used = _used(tile_experts, most_tiles)
        for index in tl.range(tl.program_id(0), used * num_n, tl.num_programs(0), flatten=True):
            tile, n = _place(index, used, num_n, GROUP)
            _first_tile(
                x, x_scales, w_desc, w_scales, rows, tile_experts, h, h_scales, tile, n,
                num_slots, top_k, inner, stride_x, stride_x_token, stride_x_scale, num_rows,
                DIM, TOKENS, ROWS, BLOCK, STAGES, LEFT, INTERPRETED,
            )  # fmt: skip
    else:
        tile, n = _place(tl.program_id(0), most_tiles, num_n, GROUP)
        if tl.load(tile_experts + tile) >= 0:
            _first_tile(
                x, x_scales, w_desc, w_scales, rows, tile_experts, h, h_scales, tile, n,
                num_slots, top_k, inner, stride_x, stride_x_token, stride_x_scale, num_rows,
                DIM, TOKENS, ROWS, BLOCK, STAGES, LEFT, INTERPRETED,
            )  # fmt: skip


@triton.jit
def _second_tile(
    h_desc, h_scales, w_desc, w_scales, rows, tile_experts, weights, parts, tile, n, num_slots, dim, num_rows,
    INNER: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    expert = tl.load(tile_experts + tile)
    places = tile * TOKENS + tl.arange(0, TOKENS)
    cols = n * ROWS + tl.arange(0, ROWS)
    slots = tl.load(rows + places)
    there = slots < num_slots
    weight = tl.load(weights + slots, mask=there, other=0.0)
    if h_scales is None:
        total, _ = _sums(h_desc, tile * TOKENS, w_desc, expert, n, INNER, False, 1, TOKENS, ROWS, BLOCK, STAGES, LEFT)
    else:
        num_blocks: tl.constexpr = (INNER + _SCALED - 1) // _SCALED
        w_scale_at = w_scales + (expert.to(tl.int64) * tl.cdiv(dim, _SCALED) + n * ROWS // _SCALED) * num_blocks
        total, _ = _scaled_sums(
            h_desc, tile * TOKENS, h_scales + places, num_rows, w_desc, w_scale_at, 0, expert, n,
            INNER, False, 1, TOKENS, ROWS, BLOCK, STAGES, LEFT,
        )  # fmt: skip
    if LEFT:
        at = parts + slots.to(tl.int64)[None, :] * dim + cols[:, None]
        value = (total * weight[None, :]).to(parts.dtype.element_ty)
        tl.store(at, value, mask=there[None, :] & (cols < dim)[:, None])
    else:
        at = parts + slots.to(tl.int64)[:, None] * dim + cols[None, :]
        value = (total * weight[:, None]).to(parts.dtype.element_ty)
        tl.store(at, value, mask=there[:, None] & (cols < dim)[None, :])


@triton.jit(do_not_specialize=["num_slots", "most_tiles", "num_rows"])
def _second(
    h_desc, h_scales, w_desc, w_scales, rows, tile_experts, weights, parts, num_slots, dim, num_rows, most_tiles,
    INNER: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    LEFT: tl.constexpr, PERSISTENT: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [T * k, D]: weight * (down @ h), at the number of the slot."""
    go(PDL)
    num_n = tl.cdiv(dim, ROWS)
    wait(PDL)
    if PERSISTENT:
        used = _used(tile_experts, most_tiles)
        for index in tl.range(tl.program_id(0), used * num_n, tl.num_programs(0), flatten=True):
            tile, n = _place(index, used, num_n, GROUP)
            _second_tile(
                h_desc, h_scales, w_desc, w_scales, rows, tile_experts, weights, parts, tile, n, num_slots, dim,
                num_rows, INNER, TOKENS, ROWS, BLOCK, STAGES, LEFT,
            )  # fmt: skip
    else:
        tile, n = _place(tl.program_id(0), most_tiles, num_n, GROUP)
        if tl.load(tile_experts + tile) >= 0:
            _second_tile(
                h_desc, h_scales, w_desc, w_scales, rows, tile_experts, weights, parts, tile, n, num_slots, dim,
                num_rows, INNER, TOKENS, ROWS, BLOCK, STAGES, LEFT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_counts"])
def _combine(parts, ids, out, counts, num_counts, dim, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """out [T, D]: the sum of each token's parts, from its first slot to its last. A slot without expert has none.
    counts: to be set to 0, if not None."""
    go(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    if counts is not None:
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            first = 0
            while first < num_counts:
                tl.store(counts + first + tl.arange(0, BLOCK), 0, mask=first + tl.arange(0, BLOCK) < num_counts)
                first += BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        there = (tl.load(ids + token * TOP_K + slot) >= 0) & (cols < dim)
        total += tl.load(parts + (token * TOP_K + slot) * dim + cols, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * dim + cols, total.to(out.dtype.element_ty), mask=cols < dim)


def combine(parts, ids, out, counts: torch.Tensor | None = None, num_counts: int = 0) -> None:
    """out [T, D] from parts [T * k, D]; the first num_counts of `counts` become 0."""
    (num_tokens, dim), block = out.shape, min(COMBINED, triton.next_power_of_2(out.shape[1]))
    _combine[(num_tokens, triton.cdiv(dim, block))](
        parts, ids, out, counts, num_counts, dim, TOP_K=ids.shape[1], BLOCK=block, **overlap.launch()
    )


def for_copies(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose rows can be copied 16 bytes at a time."""
    assert x.stride(1) == 1, "rows must be contiguous"
    if x.stride(0) * x.element_size() % 16 or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def run(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales, schedule: Schedule) -> torch.Tensor:
    """moe_gemm by one schedule; bench/sweeps/moe_gemm.py calls this too."""
    (num_tokens, dim), (num_experts, _, inner) = x.shape, down.shape
    assert gate_up.is_contiguous() and down.is_contiguous(), "weights must be contiguous"
    out = torch.empty((num_tokens, dim), dtype=out_dtype(x), device=x.device)
    if num_tokens == 0:
        return out
    if gate_up_scales is not None and x_scales is None:
        x, x_scales = quantise(x)
    x = for_copies(x)
    if x_scales is not None:
        assert gate_up_scales.is_contiguous() and down_scales.is_contiguous(), "scales must be contiguous"
    num_slots, top_k, tokens = ids.numel(), ids.shape[1], schedule.tokens
    rows, tile_experts = counted.run(ids, num_experts, tokens)
    num_rows, most_tiles = rows.numel(), tile_experts.numel()
    h = torch.empty((num_rows, inner), dtype=x.dtype, device=x.device)
    h_scales = None
    if x_scales is not None:
        h_scales = torch.empty((num_fp8_blocks(inner), num_rows), dtype=torch.float32, device=x.device)
    parts = torch.empty((num_slots, dim), dtype=out.dtype, device=x.device)
    first, second = schedule.first, schedule.second
    parts_at_once = _parts_at_once(first, x_scales is not None)
    _first[_grid(first, most_tiles, inner)](
        x, x_scales,
        TensorDescriptor(
            gate_up, [2 * num_experts, inner, dim], [inner * dim, dim, 1], [parts_at_once, first.rows, first.block]
        ),
        gate_up_scales, rows, tile_experts, h, h_scales, num_slots, top_k, inner, x.stride(0),
        *(x_scales.stride() if x_scales is not None else (0, 0)), num_rows, most_tiles,
        DIM=dim, INTERPRETED=triton_interpret(), **_constexprs(first, tokens), **overlap.launch(),
    )  # fmt: skip
    _second[_grid(second, most_tiles, dim)](
        TensorDescriptor(h, [num_rows, inner], [inner, 1], [tokens, second.block]), h_scales,
        TensorDescriptor(down, [num_experts, dim, inner], [dim * inner, inner, 1], [1, second.rows, second.block]),
        down_scales, rows, tile_experts, weights, parts, num_slots, dim, num_rows, most_tiles,
        INNER=inner, **_constexprs(second, tokens), **overlap.launch(),
    )  # fmt: skip
    combine(parts, ids, out)
    return out


def _parts_at_once(first: Config, fp8: bool) -> int:
    """Whether the gate's rows and up's come in one copy, for one product."""
    return 1 if fp8 or (first.weight_left and first.rows >= 64) else 2


def _grid(config: Config, most_tiles: int, out_dim: int) -> tuple[int]:
    tiles = most_tiles * triton.cdiv(out_dim, config.rows)
    return (min(tiles, config.programs * machine.num_sms()) if config.persistent else tiles,)


@functools.cache
def _constexprs(config: Config, tokens: int) -> dict[str, Any]:
    shape = {"TOKENS": tokens, "ROWS": config.rows, "BLOCK": config.block, "STAGES": config.num_stages}
    how = {"LEFT": config.weight_left, "PERSISTENT": config.persistent, "GROUP": config.group}
    return {**shape, **how, "num_warps": config.num_warps, "num_stages": config.num_stages}


def aot(dim: int, inner: int, chosen: Schedule, fp8: bool = False) -> list[Aot]:
    """The two products of one schedule, to compile offline."""
    kind = "fp8e4nv" if fp8 else "bf16"
    sizes = dict.fromkeys(("num_slots", "num_rows", "most_tiles"), "i32")
    aligned = {"rows": "*i32", "tile_experts": "*i32"}
    parts_at_once, first, second = _parts_at_once(chosen.first, fp8), chosen.first, chosen.second
    of_first = aligned | {"x": f"*{kind}", "h": f"*{kind}", "inner": "i32", "stride_x": "i32"}
    of_second = aligned | {"weights": "*fp32", "parts": "*bf16", "dim": "i32"}
    strides = dict.fromkeys(("top_k", "stride_x_token", "stride_x_scale"), "i32")
    boxes = {"w_desc": f"tensordesc<{kind}[{parts_at_once},{first.rows},{first.block}]>"}
    boxes_2 = {
        "h_desc": f"tensordesc<{kind}[{chosen.tokens},{second.block}]>",
        "w_desc": f"tensordesc<{kind}[1,{second.rows},{second.block}]>",
    }
    found = []
    for fn, config, scales, divisible, more, own in (
        (_first, first, ("x_scales", "w_scales", "h_scales"), of_first, boxes | strides, {"DIM": dim}),
        (_second, second, ("h_scales", "w_scales"), of_second, boxes_2, {"INNER": inner}),
    ):
        constexprs = {k: v for k, v in _constexprs(config, chosen.tokens).items() if not k.startswith("num_")}
        constexprs |= {"PDL": True, **own} | ({"INTERPRETED": False} if fn is _first else {})
        constexprs |= {} if fp8 else dict.fromkeys(scales)
        signature = divisible | more | sizes | (dict.fromkeys(scales, "*fp32") if fp8 else {})
        wants = ("wgmma", "tma", "griddepcontrol.wait") + (("cp.async",) if fn is _first else ())
        found.append(Aot(fn, signature, constexprs, config.num_warps, config.num_stages, tuple(divisible), wants))
    return found


# What bench/sweeps/moe_gemm.py found: (tokens of a tile, D, I, fp8) -> Schedule.
TUNED: dict[tuple[int, int, int, bool], Schedule] = {}


def schedule(num_slots: int, num_experts: int, dim: int, inner: int, fp8: bool) -> Schedule:
    """The measured schedule of a shape, else one that fits it."""
    per_expert = num_slots / num_experts
    tokens = 16 if per_expert <= 8 else 32 if per_expert <= 20 else 64 if per_expert <= 48 else 128
    return TUNED.get((tokens, dim, inner, fp8)) or default(tokens, fp8)


def default(tokens: int, fp8: bool) -> Schedule:
    if fp8:
        if tokens <= 32:
            return Schedule(tokens, Config(128, 128, 4, 3, True), Config(64, 128, 4, 4, True))
        return Schedule(64, Config(128, 128, 8, 4), Config(128, 128, 8, 4))
    if tokens <= 32:
        return Schedule(tokens, Config(32, 128, 4, 4, True), Config(64, 128, 4, 4, True))
    if tokens == 64:
        return Schedule(tokens, Config(64, 64, 4, 4, True), Config(128, 64, 4, 4, True))
    return Schedule(tokens, Config(128, 64, 8, 4, group=8), Config(256, 64, 8, 3, persistent=True, group=8))


def _aot():
    for dim, inner, fp8 in ((2048, 768, False), (7168, 2048, True)):
        shipped = [TUNED.get((tokens, dim, inner, fp8)) or default(tokens, fp8) for tokens in (16, 32, 64, 128)]
        for chosen in dict.fromkeys(shipped):
            yield from aot(dim, inner, chosen, fp8)


def takes(case) -> bool:
    """Rows of whole 16 bytes, as TMA wants them, in a dtype of one or two bytes."""
    step = 16 if case.scaled else 8
    plain = case.dtype in (torch.bfloat16, torch.float16) or (case.scaled and case.dtype == E4M3)
    return plain and case.dim % step == 0 and case.inner % step == 0


@moe_gemm.kernel(needs="sm90", when=takes, batch_invariant=True, order="k16", aot=_aot)
def tiles(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales):
    num_experts, dim, inner = down.shape
    chosen = schedule(ids.numel(), num_experts, dim, inner, gate_up_scales is not None)
    return run(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales, chosen)
