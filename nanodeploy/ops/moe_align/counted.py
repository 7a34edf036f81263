"""A program per expert finds its own slots: it counts all experts' to know where its run begins, and scans for its own.

Few slots are read whole by every program, in one launch. Many are cut into parts, which a first launch counts; then a
program stands for one expert in one part. Nothing depends on which program comes first.
"""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.moe_align.reference import moe_align, num_tiles
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

MAX_EXPERTS = 1024
PART = 2048  # slots of a part
PARTS = 16  # counts of so many parts are read at a time


@triton.jit
def _ids(ids, part, num_slots, PART: tl.constexpr):
    slots = part * PART + tl.arange(0, PART)
    return tl.load(ids + slots, mask=slots < num_slots, other=-1), slots


@triton.jit(do_not_specialize=["num_slots"])
def _count(ids, counts, num_slots, PART: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr):
    """counts [parts, EXPERTS] int32: the slots of each expert in each part."""
    go(PDL)
    wait(PDL)
    part = tl.program_id(0)
    mine, _ = _ids(ids, part, num_slots, PART)
    found = tl.histogram(tl.maximum(mine, 0), EXPERTS, mask=mine >= 0)
    tl.store(counts + part * EXPERTS + tl.arange(0, EXPERTS), found)


@triton.jit(do_not_specialize=["num_slots", "num_parts", "most_tiles"])
def _place(
    ids, counts, rows, tile_experts, num_slots, num_experts, num_parts, most_tiles,
    TILE: tl.constexpr, PART: tl.constexpr, EXPERTS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the run of one expert, as far as it lies in one part. counts None: there is one part, not yet counted."""
    go(PDL)
    expert = tl.program_id(0)
    part = tl.program_id(1)
    experts = tl.arange(0, EXPERTS)
    wait(PDL)
    mine, slots = _ids(ids, part, num_slots, PART)
    before = 0  # slots of this expert in earlier parts
    if counts is None:
        total = tl.histogram(tl.maximum(mine, 0), EXPERTS, mask=mine >= 0)
    else:
        total = tl.zeros((EXPERTS,), tl.int32)
        first = 0
        while first < num_parts:
            parts = first + tl.arange(0, PARTS)[:, None]
            some = tl.load(counts + parts * EXPERTS + experts[None, :], mask=parts < num_parts, other=0)
            total += tl.sum(some, axis=0)
            before += tl.sum(tl.sum(tl.where((parts < part) & (experts == expert)[None, :], some, 0), axis=1), axis=0)
            first += PARTS
    tiles = (total + TILE - 1) // TILE
    first_tile = tl.sum(tl.where(experts < expert, tiles, 0), axis=0)
    own_tiles = tl.sum(tl.where(experts == expert, tiles, 0), axis=0)
    own_slots = tl.sum(tl.where(experts == expert, total, 0), axis=0)
    run = rows + first_tile.to(tl.int64) * TILE
    own = mine == expert
    tl.store(run + before + tl.cumsum(own.to(tl.int32), axis=0) - 1, slots, mask=own)
    if part == 0:
        lanes = tl.arange(0, TILE)
        tl.store(
            run + own_slots + lanes, tl.zeros((TILE,), tl.int32) + num_slots, mask=own_slots + lanes < own_tiles * TILE
        )
        tile = 0
        while tile < own_tiles:
            tl.store(
                tile_experts + first_tile + tile + lanes,
                tl.zeros((TILE,), tl.int32) + expert,
                mask=tile + lanes < own_tiles,
            )
            tile += TILE
        unused = tl.sum(tiles, axis=0) + expert  # the programs take turns at what lies behind the last run
        while unused < most_tiles:
            tl.store(tile_experts + unused, -1)
            tl.store(rows + unused.to(tl.int64) * TILE + lanes, tl.zeros((TILE,), tl.int32) + num_slots)
            unused += num_experts


def run(ids: torch.Tensor, num_experts: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_slots = ids.numel()
    most_tiles = int(num_tiles(num_slots, num_experts, tile))
    rows = torch.empty(most_tiles * tile, dtype=torch.int32, device=ids.device)
    tile_experts = torch.empty(most_tiles, dtype=torch.int32, device=ids.device)
    if not num_slots:
        return rows, tile_experts
    assert ids.is_contiguous(), "ids must be contiguous"
    experts = max(16, triton.next_power_of_2(num_experts))
    num_parts, part, counts = 1, PART, None
    if num_slots > PART:
        num_parts = triton.cdiv(num_slots, PART)
        counts = torch.empty((num_parts, experts), dtype=torch.int32, device=ids.device)
        _count[(num_parts,)](ids, counts, num_slots, PART=PART, EXPERTS=experts, num_warps=8, **overlap.launch())
    else:
        part = max(64, triton.next_power_of_2(num_slots))
    _place[(num_experts, num_parts)](
        ids, counts, rows, tile_experts, num_slots, num_experts, num_parts, most_tiles,
        TILE=tile, PART=part, EXPERTS=experts, PARTS=PARTS, num_warps=_warps(part), **overlap.launch(),
    )  # fmt: skip
    return rows, tile_experts


def _warps(part: int) -> int:
    return max(1, min(8, part // 256))


def _aot():
    sizes = dict.fromkeys(("num_slots", "num_experts", "num_parts", "most_tiles"), "i32")
    pointers = dict.fromkeys(("ids", "rows", "tile_experts"), "*i32")
    for part, num_experts, tile in ((64, 128, 16), (512, 32, 16), (PART, 128, 128)):
        whole = part < PART
        constexprs = {"TILE": tile, "PART": part, "EXPERTS": num_experts, "PARTS": PARTS, "PDL": True}
        yield Aot(
            _place,
            pointers | sizes | ({} if whole else {"counts": "*i32"}),
            constexprs | ({"counts": None} if whole else {}),
            num_warps=_warps(part),
            divisible=tuple(pointers),
        )
    yield Aot(
        _count,
        {"ids": "*i32", "counts": "*i32", "num_slots": "i32"},
        {"PART": PART, "EXPERTS": 128, "PDL": True},
        num_warps=8,
        divisible=("ids", "counts"),
    )


def _takes(case) -> bool:
    return case.tile & (case.tile - 1) == 0 and case.num_experts <= MAX_EXPERTS


@moe_align.kernel(needs="sm80", when=_takes, aot=_aot)
def counted(ids, num_experts, tile):
    return run(ids, num_experts, tile)
