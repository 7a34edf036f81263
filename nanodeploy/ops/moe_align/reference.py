import torch
from torch import Tensor

from nanodeploy.ops.registry import op


def num_tiles(num_slots: int, num_experts: int, tile: int) -> int:
    """The most tiles that so many token-slots can need, which is what the outputs have room for.

    One slot each for as many experts as possible opens most tiles; beyond that every further tile takes `tile` slots.
    """
    opened = torch.sym_min(num_slots, num_experts)
    return opened + (num_slots - opened) // tile


@op(
    out=lambda ids, num_experts, tile: (
        ids.new_empty(num_tiles(ids.numel(), num_experts, tile) * tile, dtype=torch.int32),
        ids.new_empty(num_tiles(ids.numel(), num_experts, tile), dtype=torch.int32),
    )
)
def moe_align(ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor]:
    """Sort token-slots by expert into tiles of one expert each, without the host knowing how many go where.

    ids [T, k] int32, contiguous: each in 0 to num_experts - 1, or -1: no expert here, left out. With n = T * k, the
    places of ids are numbered 0 to n - 1 row by row. Returns rows [M] int32: these numbers, grouped by expert in rising
    order of expert and of number, each expert's run filled up to a multiple of `tile` with n, which is nobody, and
    everything after the last run n too; and tile_experts [M / tile] int32: the expert of each tile, -1 after the last.
    M = tile * (e + (n - e) // tile) with e = min(n, num_experts), the least that always suffices.
    """
    flat = ids.flatten().long()
    num_slots, most_tiles = flat.numel(), num_tiles(flat.numel(), num_experts, tile)
    order = flat.argsort(stable=True)
    order = order[flat[order] >= 0]
    experts = flat[order]
    counts = torch.bincount(experts, minlength=num_experts)
    tiles = (counts + tile - 1) // tile
    first = (tiles.cumsum(0) - tiles) * tile - (counts.cumsum(0) - counts)  # of a run, less what comes before it
    rows = torch.full((most_tiles * tile,), num_slots, dtype=torch.int32, device=ids.device)
    rows[first[experts] + torch.arange(len(order), device=ids.device)] = order.to(torch.int32)
    tile_experts = torch.full((most_tiles,), -1, dtype=torch.int32, device=ids.device)
    used = torch.arange(num_experts, dtype=torch.int32, device=ids.device).repeat_interleave(tiles)
    tile_experts[: len(used)] = used
    return rows, tile_experts
