"""One to 256 rows against a big weight: of few rows, nothing but the stream of the weight counts.

One row is skinny.py's. For more, a tile of the weight is the left operand of tl.dot, so that its 64 or more rows fill
the tensor core's M and the few tokens its N. Where too few programs would result, the inner axis is split: the last
program of a tile to finish adds the parts, always in the same order. While a program waits for the kernel ahead, the
L2 cache already fetches the first columns of its weight.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.linear import skinny
from nanodeploy.ops.linear.reference import linear
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

MAX_TOKENS = 256
MAX_TILES = 4096  # of a weight whose inner axis is split
NUM_SMS = 132  # of the machine the defaults are made for


@dataclass(frozen=True)
class Config:
    rows: int  # of the weight, per program
    block: int  # of the inner axis, per step
    num_warps: int
    num_stages: int  # steps in flight
    splits: int = 1  # of the inner axis
    ahead: int = 256  # of the inner axis, fetched while waiting for the kernel ahead; more than that loses


# What bench/sweeps/linear.py found: (tokens, rounded up to a power of two from 16 on; N, D) -> Config.
TUNED: dict[tuple[int, int, int], Config] = {
    (16, 6144, 4096): Config(rows=64, block=64, num_warps=4, num_stages=6, splits=4),
    (16, 4096, 4096): Config(rows=64, block=128, num_warps=4, num_stages=6, splits=2),
    (16, 24576, 4096): Config(rows=64, block=128, num_warps=4, num_stages=6),
    (16, 4096, 12288): Config(rows=64, block=128, num_warps=4, num_stages=6, splits=2),
    (16, 151936, 4096): Config(rows=64, block=128, num_warps=4, num_stages=4),
    (16, 4096, 1024): Config(rows=64, block=128, num_warps=4, num_stages=6, splits=2),
    (16, 1024, 2048): Config(rows=64, block=128, num_warps=4, num_stages=6, splits=8),
    (16, 6144, 1024): Config(rows=64, block=128, num_warps=4, num_stages=6),
    (16, 1024, 3072): Config(rows=64, block=128, num_warps=4, num_stages=6, splits=8),
    (16, 151936, 1024): Config(rows=128, block=128, num_warps=8, num_stages=4),
    (32, 6144, 4096): Config(rows=64, block=128, num_warps=4, num_stages=5),
    (32, 4096, 4096): Config(rows=64, block=128, num_warps=4, num_stages=5, splits=2),
    (32, 24576, 4096): Config(rows=64, block=64, num_warps=4, num_stages=6),
    (32, 4096, 12288): Config(rows=64, block=128, num_warps=4, num_stages=5, splits=2),
    (32, 151936, 4096): Config(rows=128, block=128, num_warps=8, num_stages=4),
    (64, 6144, 4096): Config(rows=64, block=128, num_warps=4, num_stages=4),
    (64, 4096, 4096): Config(rows=64, block=128, num_warps=4, num_stages=5, splits=2),
    (64, 24576, 4096): Config(rows=64, block=128, num_warps=4, num_stages=6),
    (64, 4096, 12288): Config(rows=64, block=128, num_warps=4, num_stages=5, splits=2),
    (64, 151936, 4096): Config(rows=128, block=128, num_warps=8, num_stages=4),
    (64, 4096, 1024): Config(rows=64, block=128, num_warps=4, num_stages=4, splits=2),
    (64, 1024, 2048): Config(rows=32, block=256, num_warps=4, num_stages=4, splits=4),
    (64, 6144, 1024): Config(rows=64, block=128, num_warps=4, num_stages=5),
    (64, 1024, 3072): Config(rows=32, block=128, num_warps=4, num_stages=6, splits=4),
    (64, 151936, 1024): Config(rows=64, block=64, num_warps=4, num_stages=6),
}


def bucket(num_tokens: int) -> int:
    """The tensor core's N that holds so many tokens."""
    return max(16, triton.next_power_of_2(num_tokens))


def config(num_tokens: int, out_dim: int, in_dim: int) -> Config:
    """The measured configuration of a shape, else one that fits it."""
    tokens = bucket(num_tokens)
    tuned = TUNED.get((tokens, out_dim, in_dim))
    if tuned:
        return tuned
    # Many tokens: tiles as large as the registers hold, as each token is read once per tile of the weight.
    rows, num_warps, num_stages = (64, 4, 5) if tokens <= 64 else (128, 8, 4)
    block = max(16, min(128 if tokens <= 64 else 64, triton.next_power_of_2(in_dim)))
    splits = 1
    while triton.cdiv(out_dim, rows) * splits < 0.9 * NUM_SMS and in_dim >= 4 * splits * block and splits < 8:
        splits *= 2
    return Config(rows, block, num_warps, num_stages, splits)


@triton.jit
def prefetch(at, NUM_BYTES: tl.constexpr, PDL: tl.constexpr):
    """With PDL, let the L2 cache fetch NUM_BYTES, a multiple of 16, from each address of `at` on."""
    if PDL:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
            "=r,l,r", [at.to(tl.int64), tl.full([], NUM_BYTES, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def few_rows(
    x, weight, out, parts, arrived, num_tokens, out_dim, stride_x,
    IN_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr, STAGES: tl.constexpr,
    AHEAD: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, N] = (weight [N, D] @ x^T)^T; GATED: weight is [2N, D], out = silu(first half's) * second half's.

    With SPLITS: parts fp32 [SPLITS, tiles, ROWS, TOKENS]; arrived int32 [tiles], 0 before and after.
    """
    go(PDL)
    tile = tl.program_id(0)
    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens = tl.arange(0, TOKENS)
    lanes = tl.arange(0, BLOCK)
    part: tl.constexpr = (IN_DIM + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    even: tl.constexpr = SPLITS * part == IN_DIM
    start = tl.program_id(1) * part
    # Rows and tokens past the end read the last one; their results are not stored.
    row_at = weight + tl.minimum(rows, out_dim - 1).to(tl.int64) * IN_DIM + start
    up_at = row_at + tl.cast(out_dim, tl.int64) * IN_DIM
    if even and AHEAD > 0:
        prefetch(row_at, 2 * min(AHEAD, part), PDL)
        if GATED:
            prefetch(up_at, 2 * min(AHEAD, part), PDL)
    wait(PDL)
    at = row_at[:, None] + lanes[None, :]
    up_at = up_at[:, None] + lanes[None, :]
    x_at = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[None, :] * stride_x + start + lanes[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    total_up = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, part, BLOCK, num_stages=STAGES):
        if even:
            values = tl.load(x_at + step)
            total = tl.dot(tl.load(at + step, eviction_policy="evict_first"), values, total)
            if GATED:
                total_up = tl.dot(tl.load(up_at + step, eviction_policy="evict_first"), values, total_up)
        else:
            inside = start + step + lanes < IN_DIM
            values = tl.load(x_at + step, mask=inside[:, None], other=0.0)
            total = tl.dot(tl.load(at + step, mask=inside[None, :], other=0.0), values, total)
            if GATED:
                total_up = tl.dot(tl.load(up_at + step, mask=inside[None, :], other=0.0), values, total_up)
    if GATED:
        total = total / (1 + tl.exp(-total)) * total_up
    last = True
    if SPLITS > 1:
        tl.static_assert(not GATED)
        size: tl.constexpr = ROWS * TOKENS
        mine = parts + tile.to(tl.int64) * size + tl.arange(0, ROWS)[:, None] * TOKENS + tokens[None, :]
        stride = tl.num_programs(0).to(tl.int64) * size
        tl.store(mine + tl.program_id(1) * stride, total)
        tl.debug_barrier()  # all of the part is stored before it is announced
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = tl.zeros((ROWS, TOKENS), tl.float32)
            for split in tl.static_range(SPLITS):
                total += tl.load(mine + split * stride, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if last:
        to = out + tokens.to(tl.int64)[None, :] * out_dim + rows[:, None]
        tl.store(to, total.to(out.dtype.element_ty), mask=(tokens < num_tokens)[None, :] & (rows < out_dim)[:, None])


@functools.cache
def _arrived(device: torch.device) -> torch.Tensor:
    """Counters of the programs that are done with a tile. Each launch leaves them at 0; launches run one by one."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def run(x: torch.Tensor, weight: torch.Tensor, chosen: Config, gated: bool = False) -> torch.Tensor:
    """One configuration, of linear or (`gated`) of linear_silu_mul; bench/sweeps/linear.py calls this too."""
    num_tokens, in_dim = x.shape
    out_dim = weight.shape[0] // (2 if gated else 1)
    assert x.stride(1) == 1 and weight.is_contiguous(), "rows must be contiguous"
    out = torch.empty((num_tokens, out_dim), dtype=x.dtype, device=x.device)
    tokens, num_tiles = bucket(num_tokens), triton.cdiv(out_dim, chosen.rows)
    parts = arrived = out
    if chosen.splits > 1:
        assert num_tiles <= MAX_TILES, f"{num_tiles} tiles; a split weight may have {MAX_TILES}"
        parts = torch.empty((chosen.splits, num_tiles, chosen.rows, tokens), dtype=torch.float32, device=x.device)
        arrived = _arrived(x.device)
    few_rows[(num_tiles, chosen.splits)](
        x, weight, out, parts, arrived, num_tokens, out_dim, x.stride(0), IN_DIM=in_dim, ROWS=chosen.rows,
        BLOCK=chosen.block, SPLITS=chosen.splits, STAGES=chosen.num_stages, AHEAD=chosen.ahead, TOKENS=tokens,
        GATED=gated, num_warps=chosen.num_warps, **overlap.launch(),
    )  # fmt: skip
    return out


def aot(tokens: int, in_dim: int, chosen: Config, gated: bool = False) -> Aot:
    """One configuration, to compile offline."""
    split = chosen.splits > 1
    return Aot(
        few_rows,
        dict.fromkeys(("x", "weight", "out"), "*bf16")
        | {"parts": "*fp32" if split else "*bf16", "arrived": "*i32" if split else "*bf16"}
        | dict.fromkeys(("num_tokens", "out_dim", "stride_x"), "i32"),
        {
            "IN_DIM": in_dim, "ROWS": chosen.rows, "BLOCK": chosen.block, "SPLITS": chosen.splits,
            "STAGES": chosen.num_stages, "AHEAD": chosen.ahead, "TOKENS": tokens, "GATED": gated, "PDL": True,
        },
        num_warps=chosen.num_warps,
        divisible=("x", "weight", "out", "parts", "arrived", "out_dim", "stride_x"),
        wants=("cp.async.cg", "wgmma" if chosen.rows >= 64 else "mma", "griddepcontrol.wait"),
    )  # fmt: skip


def _aot():
    yield from (skinny.aot(d, c) for d, c in sorted({(d, c) for (_, d), c in skinny.TUNED.items()}, key=str))
    yield from (aot(t, d, c) for t, d, c in sorted({(t, d, c) for (t, _, d), c in TUNED.items()}, key=str))
    yield skinny.aot(1024, skinny.config(2048, 1024))
    yield from (aot(tokens, 1024, config(tokens, 2048, 1024)) for tokens in (16, 32, 64, 128))
    yield from (aot(256, 4096, config(256, out_dim, 4096)) for out_dim in (4096, 24576))


def fits(case) -> bool:
    """Few rows, of 16-byte pieces, in a dtype of two bytes."""
    few = 1 <= case.num_tokens <= MAX_TOKENS and case.in_dim % 16 == 0
    return few and case.dtype in (torch.bfloat16, torch.float16)


@linear.kernel(needs="sm80", when=fits, aot=_aot)
def streamed(x, weight):
    if x.shape[0] == 1:
        return skinny.run(x, weight, skinny.config(*weight.shape))
    return run(x, weight, config(x.shape[0], *weight.shape))
