"""Products for tens to thousands of tokens by warp groups with roles, written in Gluon for sm_90 alone.

A program of two to four warp groups: one warp copies tiles by TMA into a ring of shared memory, each other warp group
(a consumer) multiplies 64 rows of the weight, the left operand, with all tokens of the tile. Three consumers make tiles
of 192 rows: a weight of 24576 rows is then 128 tiles, one for each of 128 of the H200's 132 SMs, where tiles of 128 or
256 rows leave a quarter of the machine idle in their second wave. Where a weight has too few rows for that, the inner
axis is split: the programs of a tile exchange their sums, and each adds up a share of the tile's tokens, always in the
same order. NOTES.md has the arithmetic.

While the kernel ahead is still running, the ring fills with the weight's first tiles.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanodeploy.ops import machine, overlap
from nanodeploy.ops.linear.reference import linear
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

STEP = gl.constexpr(64)  # of the inner axis: 128 bytes, as the swizzle is
ROWS = gl.constexpr(64)  # of the weight, per consumer
PIECE = gl.constexpr(64)  # most tokens of one store by TMA
GROUP = gl.constexpr(8)  # tiles of tokens that take a tile of the weight in turn, while the L2 cache has it
SWIZZLED = gl.NVMMASharedLayout(128, 16, 2)
SHARED_BYTES = 226 * 1024  # for the ring and what is on its way out
MAX_STAGES = 8
NUM_SMS = 132  # of the machine the estimate is made for
MAX_COUNTERS = 4096
FEED_REGS = {1: 40, 2: 40, 3: 32}  # registers per thread of the warp that copies, by the number of consumers


@gluon.jit
def _place(item, num_t, num_n, num_steps, SPLITS: gl.constexpr):
    """(tile of tokens, tile of rows, split, its first step, the step past its last) of work item `item`."""
    split = item % SPLITS
    tile = item // SPLITS
    first = tile // (GROUP * num_n) * GROUP
    size = gl.minimum(num_t - first, GROUP)
    within = tile % (GROUP * num_n)
    return first + within % size, within // size, split, split * num_steps // SPLITS, (split + 1) * num_steps // SPLITS


@gluon.jit
def _copy_weight(w, w_ring, full, stage, n, step, CONSUMERS: gl.constexpr, GATED: gl.constexpr):
    """Each consumer's 64 rows; GATED: eight of the gate's and the same eight of up in turn."""
    for who in gl.static_range(CONSUMERS):
        box = w_ring.index(stage * CONSUMERS + who)
        row = (n * CONSUMERS + who) * ROWS
        if GATED:
            eights = box._reinterpret(box.dtype, [ROWS // 16, 2, 8, STEP], w.layout)
            tma.async_copy_global_to_shared(w, [row // 16, 0, 0, step * STEP], full.index(stage), eights)
        else:
            tma.async_copy_global_to_shared(w, [row, step * STEP], full.index(stage), box)


@gluon.jit
def _copy_tokens(x, x_ring, full, stage, t, split, step, TOKENS: gl.constexpr, SPLITS: gl.constexpr):
    """The tile's tokens in SPLITS shares, this split's own first."""
    SHARE: gl.constexpr = TOKENS // SPLITS
    for i in gl.static_range(SPLITS):
        token = t * TOKENS + (split + i) % SPLITS * SHARE
        tma.async_copy_global_to_shared(x, [token, step * STEP], full.index(stage), x_ring.index(stage * SPLITS + i))


@gluon.jit
def _produce(
    feed,
    TOKENS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    GATED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warp. The first round of the ring needs no waiting for room, and its weights none for the kernel ahead."""
    x, w, num_t, num_n, num_steps, num_items, w_ring, x_ring, full, empty = feed
    BYTES: gl.constexpr = (ROWS * CONSUMERS + TOKENS) * STEP * 2
    t, n, split, begin, end = _place(gl.program_id(0), num_t, num_n, num_steps, SPLITS)
    done = gl.minimum(end - begin, STAGES)
    for stage in range(done):
        mbarrier.expect(full.index(stage), BYTES)
        _copy_weight(w, w_ring, full, stage, n, begin + stage, CONSUMERS, GATED)
    wait(PDL)
    for stage in range(done):
        _copy_tokens(x, x_ring, full, stage, t, split, begin + stage, TOKENS, SPLITS)
    begin += done
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        if item != gl.program_id(0):
            t, n, split, begin, end = _place(item, num_t, num_n, num_steps, SPLITS)
        for step in range(begin, end):
            stage = done % STAGES
            mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), BYTES)
            _copy_weight(w, w_ring, full, stage, n, step, CONSUMERS, GATED)
            _copy_tokens(x, x_ring, full, stage, t, split, step, TOKENS, SPLITS)
            done += 1


@gluon.jit
def _halves(a, WIDTH: gl.constexpr):
    """Columns in two: [R, C] -> two of [R, C / 2]. Moves nothing."""
    C: gl.constexpr = a.shape[1] // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(C, WIDTH), 16])
    left, right = gl.split(gl.permute(gl.reshape(a, [a.shape[0], 2, C]), (0, 2, 1)))
    return gl.convert_layout(left, LAYOUT, assert_trivial=True), gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def _cut(a, PARTS: gl.constexpr, WIDTH: gl.constexpr):
    """Columns in PARTS, a power of two."""
    if PARTS == 1:
        pieces = (a,)
    else:
        left, right = _halves(a, WIDTH)
        pieces = _cut(left, PARTS // 2, WIDTH) + _cut(right, PARTS // 2, WIDTH)
    return pieces


@gluon.jit
def _gate(a):
    """[64, C], eight rows of the gate and eight of up in turn -> silu(gate) * up, [32, C]. Moves nothing."""
    C: gl.constexpr = a.shape[1]
    gate, up = gl.split(gl.permute(gl.reshape(a, [ROWS // 16, 2, 8, C]), (0, 2, 3, 1)))
    return gl.reshape(gate / (1 + gl.exp(-gate)) * up, [ROWS // 2, C])


@gluon.constexpr_function
def _in_line(size):
    """Of a line of `size` values: four in a row to a thread, its next four 512 further on."""
    registers = [[1], [2], *([1 << bit] for bit in range(9, size.bit_length() - 1))]
    return gl.DistributedLinearLayout(registers, [[4], [8], [16], [32], [64]], [[128], [256]], [], [size])


@gluon.jit
def _line(a):
    """What each thread holds of an accumulator [64, C], in a line, so that it is copied 16 bytes at a time."""
    C: gl.constexpr = a.shape[1]
    apart = gl.permute(gl.reshape(a, [4, 2, 8, C // 16, 2, 4, 2]), (1, 3, 0, 2, 5, 4, 6))
    return gl.convert_layout(gl.reshape(apart, [ROWS * C]), _in_line(ROWS * C))


@gluon.jit
def _tile(line, LAYOUT: gl.constexpr):
    """The accumulator that makes this line."""
    C: gl.constexpr = line.shape[0] // ROWS
    apart = gl.permute(gl.reshape(line, [2, C // 16, 4, 8, 4, 2, 2]), (2, 0, 3, 1, 5, 4, 6))
    return gl.convert_layout(gl.reshape(apart, [ROWS, C]), LAYOUT)


@gluon.jit
def _sum_splits(acc, parts, arrived, split, num_wanted, SPLITS: gl.constexpr, WIDTH: gl.constexpr):
    """The first of SPLITS shares of the columns of `acc`, summed over the programs of a tile.

    Share i of split s is what split (s + i) % SPLITS sums; it adds its own, then those of the splits after it in turn.
    parts [SPLITS to, SPLITS of, 64 * C] fp32 and the counter `arrived`, 0 before and after, are this tile's and
    consumer's. Columns of the tile from num_wanted on are nobody's need. The tile's programs must all be running.
    """
    pieces = _cut(acc, SPLITS, WIDTH)
    LAYOUT: gl.constexpr = pieces[0].type.layout
    C: gl.constexpr = pieces[0].shape[1]
    SIZE: gl.constexpr = ROWS * C
    at = parts + gl.arange(0, SIZE, layout=_in_line(SIZE))
    for i in gl.static_range(1, SPLITS):
        to = (split + i) % SPLITS
        gl.store(at + (to * SPLITS + split) * SIZE, _line(pieces[i]), mask=to * C < num_wanted)
    gl.thread_barrier()  # all of the parts are stored before they are announced
    gl.atomic_add(arrived, 1, sem="release")
    while gl.load(arrived, volatile=True) < SPLITS:
        pass
    if gl.atomic_add(arrived, 1, sem="acq_rel") == 2 * SPLITS - 1:  # none is waiting any more
        gl.store(arrived, 0)
    gl.thread_barrier()
    total = _line(pieces[0])
    for i in gl.static_range(1, SPLITS):
        of = (split + i) % SPLITS
        wanted = split * C < num_wanted
        total += gl.load(at + (split * SPLITS + of) * SIZE, mask=wanted, other=0.0, cache_modifier=".cg")
    return _tile(total, LAYOUT)


@gluon.jit
def _consume(
    sums,
    TOKENS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    GATED: gl.constexpr, BUFFERS: gl.constexpr, PDL: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Warp group WHO: rows 64 * WHO to 64 * WHO + 63 of every tile."""
    out, parts, arrived, num_tokens, num_t, num_n, num_steps, num_items, w_ring, x_ring, staging, full, empty = sums
    # One instruction of 256 columns needs more registers than four warp groups start with.
    WIDTH: gl.constexpr = 128 if CONSUMERS > 2 else 256
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, min(TOKENS, WIDTH), 16])
    SHARE: gl.constexpr = TOKENS // SPLITS
    COLS: gl.constexpr = staging.shape[1]
    OUT_ROWS: gl.constexpr = staging.shape[2]
    x_tiles = x_ring._reinterpret(x_ring.dtype, [STAGES, TOKENS, STEP], x_ring.layout)
    wait(PDL)
    done = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        t, n, split, begin, end = _place(item, num_t, num_n, num_steps, SPLITS)
        who = n * CONSUMERS + WHO
        acc = gl.zeros([ROWS, TOKENS], gl.float32, LAYOUT)
        before = done % STAGES
        for step in range(begin, end):
            stage = done % STAGES
            mbarrier.wait(full.index(stage), done // STAGES & 1)
            tokens = x_tiles.index(stage).permute((1, 0))
            acc = warpgroup_mma(w_ring.index(stage * CONSUMERS + WHO), tokens, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            mbarrier.arrive(empty.index(before), count=1, pred=step > begin)
            before = stage
            done += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before), count=1)
        token = t * TOKENS
        if SPLITS > 1:
            tile = t * (num_n * CONSUMERS) + who
            room = parts + tile.to(gl.int64) * (SPLITS * ROWS * TOKENS)
            acc = _sum_splits(acc, room, arrived + tile, split, num_tokens - token, SPLITS, WIDTH)
            token += split * SHARE
        pieces = _cut(acc, SHARE // COLS, WIDTH)
        for i in gl.static_range(SHARE // COLS):
            piece = pieces[i]
            if GATED:
                piece = _gate(piece)
            box = staging.index(WHO * BUFFERS + i % BUFFERS)
            tma.store_wait(BUFFERS - 1)
            gl.thread_barrier()
            box.permute((1, 0)).store(piece.to(box.dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out, [token + i * COLS, who * OUT_ROWS], box)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_tokens", "num_t", "num_n", "num_steps", "num_items"])
def _product(
    x, w, out, parts, arrived, num_tokens, num_t, num_n, num_steps, num_items,
    TOKENS: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
    GATED: gl.constexpr, BUFFERS: gl.constexpr, REGS: gl.constexpr, FEED: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out [T, N] = x [T, D] @ weight [N, D]^T; GATED: weight is [2N, D], out = silu(first half's) * second half's."""
    go(PDL)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    COLS: gl.constexpr = min(PIECE, TOKENS // SPLITS)
    OUT_ROWS: gl.constexpr = ROWS // 2 if GATED else ROWS
    w_ring = gl.allocate_shared_memory(x.dtype, [STAGES * CONSUMERS, ROWS, STEP], SHARED)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * SPLITS, TOKENS // SPLITS, STEP], SHARED)
    staging = gl.allocate_shared_memory(x.dtype, [CONSUMERS * BUFFERS, COLS, OUT_ROWS], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    sums = (out, parts, arrived, num_tokens, num_t, num_n, num_steps, num_items, w_ring, x_ring, staging, full, empty)
    feed = (x, w, num_t, num_n, num_steps, num_items, w_ring, x_ring, full, empty)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (sums, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, BUFFERS, PDL, 0)),
                (_produce, (feed, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, PDL)),
            ],
            [1],
            [FEED],
        )
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (sums, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, BUFFERS, PDL, 0)),
                (_consume, (sums, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, BUFFERS, PDL, 1)),
                (_produce, (feed, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, PDL)),
            ],
            [4, 1],
            [REGS, FEED],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (sums, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, BUFFERS, PDL, 0)),
                (_consume, (sums, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, BUFFERS, PDL, 1)),
                (_consume, (sums, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, BUFFERS, PDL, 2)),
                (_produce, (feed, TOKENS, CONSUMERS, STAGES, SPLITS, GATED, PDL)),
            ],
            [4, 4, 1],
            [REGS, REGS, FEED],
        )


@dataclass(frozen=True)
class Config:
    """A tile, and in how many parts its inner axis is split. More than one: all programs must fit at once."""

    consumers: int  # 1 to 3: rows of the weight in units of 64
    tokens: int  # a power of two from 16 to 256
    splits: int = 1  # 1, 2, 4 or 8, of 16 tokens or more each

    @property
    def rows(self) -> int:
        return ROWS.value * self.consumers

    @property
    def stage_bytes(self) -> int:
        return (self.rows + self.tokens) * STEP.value * 2

    @property
    def buffers(self) -> int:
        """Pieces on their way out, per consumer: a second where a tile has more than one and the ring leaves room."""
        several = self.tokens // self.splits > PIECE.value
        return 2 if several and self._stages(2) == self._stages(1) else 1

    @property
    def stages(self) -> int:
        return self._stages(self.buffers)

    def _stages(self, buffers: int) -> int:
        leaving = buffers * self.rows * min(PIECE.value, self.tokens // self.splits) * 2
        return min(MAX_STAGES, (SHARED_BYTES - leaving) // self.stage_bytes)

    @property
    def regs(self) -> int:
        """Registers per thread of a consumer: its sums and some more. Three consumers cannot have over 160 each."""
        return min(160 if self.consumers == 3 else 200, self.tokens // 2 + 64)

    @property
    def maxnreg(self) -> int:
        """Registers per thread at the start, before the warp groups share them out. ptxas wants some for each wgmma.

        What a small tile leaves, the kernels ahead and behind have: PDL runs them on the same SM.
        """
        shared = self.regs * self.consumers + FEED_REGS[self.consumers]
        least = min(self.tokens, 128 if self.consumers == 3 else 256) // 2 + 40
        return triton.cdiv(max(triton.cdiv(shared, self.consumers + 1), least), 8) * 8

    def constexprs(self, gated: bool) -> dict[str, Any]:
        shape = {"TOKENS": self.tokens, "CONSUMERS": self.consumers, "STAGES": self.stages, "SPLITS": self.splits}
        return shape | {
            "GATED": gated, "BUFFERS": self.buffers, "REGS": self.regs, "FEED": FEED_REGS[self.consumers]
        }  # fmt: skip


# What bench/sweeps/linear.py found: (tokens, rounded up to a power of two; rows of the weight, D) -> Config.
TUNED: dict[tuple[int, int, int], Config] = {
    (64, 4096, 4096): Config(1, 64, 2),
    (64, 24576, 4096): Config(3, 64, 1),
    (64, 4096, 12288): Config(1, 64, 2),
    (64, 151936, 4096): Config(2, 64, 1),
    (64, 4096, 1024): Config(1, 32, 1),
    (64, 1024, 2048): Config(1, 64, 4),
    (128, 4096, 4096): Config(1, 128, 2),
    (128, 24576, 4096): Config(3, 128, 1),
    (128, 4096, 12288): Config(1, 128, 2),
    (128, 4096, 1024): Config(1, 64, 1),
    (128, 1024, 3072): Config(1, 64, 4),
    (128, 151936, 1024): Config(2, 128, 1),
    (256, 4096, 4096): Config(1, 256, 2),
    (256, 4096, 12288): Config(1, 256, 2),
    (256, 4096, 1024): Config(2, 64, 1),
    (8192, 6144, 4096): Config(3, 256, 1),
    (8192, 4096, 4096): Config(2, 256, 1),
}


def num_programs(chosen: Config, num_tokens: int, num_rows: int) -> int:
    """Work items, each for one program where there are so many."""
    return triton.cdiv(num_tokens, chosen.tokens) * triton.cdiv(num_rows, chosen.rows) * chosen.splits


def estimate(chosen: Config, num_tokens: int, num_rows: int, in_dim: int, num_sms: int) -> float:
    """Clocks of a product, roughly: what the slowest of tensor cores, shared memory, L2 and HBM takes, wave by wave.

    Of an H200: a step's products take 2 clocks for each token and 64 rows; shared memory moves 128 bytes per clock, for
    wgmma (both operands of each instruction) and for TMA; an SM gets about 40 bytes per clock from the L2 cache, and
    all of them 2,600 of weights from HBM.
    """
    rows, tokens = chosen.rows, chosen.tokens
    num_items = num_programs(chosen, num_tokens, num_rows)
    num_steps = triton.cdiv(triton.cdiv(in_dim, STEP.value), chosen.splits)
    instructions = chosen.consumers * triton.cdiv(tokens, 256 if chosen.consumers < 3 else 128)
    from_shared = 64 * instructions + tokens * chosen.consumers + rows + tokens
    from_hbm = rows * STEP.value * 2 * min(num_items, num_sms) / triton.cdiv(num_tokens, tokens) / 2600
    step = max(2 * tokens * chosen.consumers, from_shared, chosen.stage_bytes / 40, from_hbm)
    exchanged = 2 * rows * tokens * 4 * (chosen.splits - 1) / chosen.splits
    exchange = exchanged / 40 + 2500 if chosen.splits > 1 else 0
    return triton.cdiv(num_items, num_sms) * (num_steps * step + rows * tokens / 64) + exchange + 2500


@functools.lru_cache(maxsize=4096)
def ranked(num_tokens: int, num_rows: int, in_dim: int, num_sms: int) -> list[Config]:
    """Configurations that can run, the likeliest first."""
    found = []
    for consumers in (1, 2, 3):
        for tokens in (16, 32, 64, 128, 256):
            for splits in (1, 2, 4, 8):
                chosen = Config(consumers, tokens, splits)
                together = splits == 1 or num_programs(chosen, num_tokens, num_rows) <= num_sms
                enough = tokens // splits >= 16 and splits <= triton.cdiv(in_dim, STEP.value)
                if together and (splits == 1 or enough) and tokens < 2 * num_tokens + 16:
                    found.append(chosen)
    return sorted(found, key=lambda c: estimate(c, num_tokens, num_rows, in_dim, num_sms))


def fits(chosen: Config, num_tokens: int, num_rows: int) -> bool:
    """Whether this machine runs it: programs that wait for each other must all have an SM."""
    return chosen.splits == 1 or num_programs(chosen, num_tokens, num_rows) <= machine.num_sms()


def bucket(num_tokens: int) -> int:
    return max(16, triton.next_power_of_2(num_tokens))


def config(num_tokens: int, shape: torch.Size, tuned: Config | None, unsplit: bool = False) -> Config:
    """The measured configuration, if this machine has SMs enough for it, else the likeliest; `unsplit`: of those."""
    num_rows, in_dim = shape
    if tuned and fits(tuned, num_tokens, num_rows) and (tuned.splits == 1 or not unsplit):
        return tuned
    likely = ranked(bucket(num_tokens), num_rows, in_dim, machine.num_sms())
    return next(chosen for chosen in likely if chosen.splits == 1 or not unsplit)


@functools.cache
def _arrived(device: torch.device) -> Tensor:
    """Counters of the programs that wait for each other. Each launch leaves them at 0; launches run one by one."""
    return torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)


def _store_layout(gated: bool) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(64 if gated else 128, 16, 2)


def run(x: Tensor, weight: Tensor, chosen: Config, gated: bool = False) -> Tensor:
    """One configuration, of linear or (`gated`) of linear_silu_mul; bench/sweeps/linear.py calls this too."""
    num_tokens, in_dim = x.shape
    num_rows = weight.shape[0]
    out_dim = num_rows // (2 if gated else 1)
    assert x.stride(1) == 1 and weight.is_contiguous(), "rows must be contiguous"
    out = torch.empty((num_tokens, out_dim), dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    if x.stride(0) % 8 or x.data_ptr() % 16:  # what TMA cannot read
        x = x.clone(memory_format=torch.contiguous_format)
    share = chosen.tokens // chosen.splits
    if gated:
        eights = [out_dim // 8, 2, 8, in_dim], [8 * in_dim, out_dim * in_dim, in_dim, 1], [ROWS.value // 16, 2, 8, 64]
        w_desc = TensorDescriptor(weight, *eights, gl.NVMMASharedLayout(128, 16, 4))
    else:
        w_desc = TensorDescriptor(weight, [num_rows, in_dim], [in_dim, 1], [ROWS.value, STEP.value], SWIZZLED)
    x_strides = [x.stride(0) if num_tokens > 1 else in_dim, 1]
    x_desc = TensorDescriptor(x, [num_tokens, in_dim], x_strides, [share, STEP.value], SWIZZLED)
    piece = [min(PIECE.value, share), ROWS.value // (2 if gated else 1)]
    out_desc = TensorDescriptor(out, [num_tokens, out_dim], [out_dim, 1], piece, _store_layout(gated))
    num_t, num_n = triton.cdiv(num_tokens, chosen.tokens), triton.cdiv(num_rows, chosen.rows)
    num_items, num_steps = num_t * num_n * chosen.splits, triton.cdiv(in_dim, STEP.value)
    parts = arrived = out
    if chosen.splits > 1:
        num_sums = num_t * num_n * chosen.consumers
        # Programs of a tile wait for each other, and one that the machine has no room for would never come.
        assert fits(chosen, num_tokens, num_rows), f"{num_items} programs wait for each other on fewer SMs"
        assert num_sums <= MAX_COUNTERS and chosen.splits <= num_steps, f"{chosen} does not fit {tuple(weight.shape)}"
        num_values = num_sums * chosen.splits * ROWS.value * chosen.tokens
        parts, arrived = torch.empty(num_values, dtype=torch.float32, device=x.device), _arrived(x.device)
    _product[(min(num_items, machine.num_sms()),)](
        x_desc, w_desc, out_desc, parts, arrived, num_tokens, num_t, num_n, num_steps, num_items,
        **chosen.constexprs(gated), num_warps=4, maxnreg=chosen.maxnreg, **overlap.launch(),
    )  # fmt: skip
    return out


def aot(chosen: Config, gated: bool = False, dtype: str = "bf16") -> Aot:
    """One configuration, to compile offline."""
    share, split = chosen.tokens // chosen.splits, chosen.splits > 1
    eights = f"tensordesc<{dtype}[{ROWS.value // 16}, 2, 8, 64],{gl.NVMMASharedLayout(128, 16, 4)!r}>"
    piece = f"{min(PIECE.value, share)}, {ROWS.value // (2 if gated else 1)}"
    signature = {
        "x": f"tensordesc<{dtype}[{share}, {STEP.value}],{SWIZZLED!r}>",
        "w": eights if gated else f"tensordesc<{dtype}[{ROWS.value}, {STEP.value}],{SWIZZLED!r}>",
        "out": f"tensordesc<{dtype}[{piece}],{_store_layout(gated)!r}>",
        "parts": "*fp32" if split else f"*{dtype}",
        "arrived": "*i32" if split else f"*{dtype}",
    } | dict.fromkeys(("num_tokens", "num_t", "num_n", "num_steps", "num_items"), "i32")
    return Aot(
        _product,
        signature,
        chosen.constexprs(gated) | {"PDL": True},
        divisible=("parts", "arrived"),
        wants=("wgmma", "tma", "setmaxnreg", "griddepcontrol.wait"),
        maxnreg=chosen.maxnreg,
    )


def _aot():
    shapes = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288), (4096, 1024), (1024, 2048)]
    likeliest = {ranked(t, *shape, NUM_SMS)[0] for shape in shapes for t in (64, 128, 256, 8192)}
    yield from (aot(chosen) for chosen in sorted(likeliest, key=str))
    yield aot(Config(3, 256), dtype="fp16")


def takes(case) -> bool:
    """Sixteen-bit values in rows of whole 16 bytes, as TMA wants them, on both sides."""
    return case.dtype in (torch.bfloat16, torch.float16) and case.in_dim % 8 == case.out_dim % 8 == 0


@linear.kernel(needs="sm90a", when=takes, interpretable=False, aot=_aot)
def warp_groups(x, weight):
    tuned = TUNED.get((bucket(x.shape[0]), *weight.shape))
    return run(x, weight, config(x.shape[0], weight.shape, tuned))


@linear.kernel(needs="sm90a", when=takes, batch_invariant=True, order="k16", interpretable=False)
def unsplit_warp_groups(x, weight):
    """The same with whole inner axes: a chain of steps over 16 columns for each output, as in fixed_order.py."""
    tuned = TUNED.get((bucket(x.shape[0]), *weight.shape))
    return run(x, weight, config(x.shape[0], weight.shape, tuned, unsplit=True))
