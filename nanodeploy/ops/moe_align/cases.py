from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.moe_align.reference import num_tiles


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    top_k: int
    num_experts: int
    tile: int
    num_routed: int | None = None  # experts of the whole model; those past num_experts are another rank's

    @property
    def num_slots(self) -> int:
        return self.num_tokens * self.top_k


POINTS = {
    f"{name} T{num_tokens}": Case(torch.int32, num_tokens, 8, num_experts, tile, num_routed)
    for name, num_experts, num_routed in (("qwen3-30b", 128, 128), ("deepseek-v3 ep8", 32, 256))
    for num_tokens, tile in ((1, 16), (8, 16), (64, 16), (256, 32), (1024, 64), (8192, 128))
}

REGIONS: list[tuple[dict, list[str]]] = [
    ({"num_tokens": [0, 256]}, [name for name in POINTS if int(name.rpartition("T")[2]) <= 256]),
    ({}, [name for name in POINTS if int(name.rpartition("T")[2]) > 256]),
]


def of(ids: Tensor, num_experts: int, tile: int) -> Case:
    num_tokens, top_k = ids.shape
    return Case(ids.dtype, num_tokens, top_k, num_experts, tile)


def strategy(st, *, small: bool):
    few = st.builds(
        Case,
        dtype=st.just(torch.int32),
        num_tokens=st.integers(0, 40 if small else 9000),
        top_k=st.sampled_from([1, 2, 3, 8]),
        num_experts=st.sampled_from([1, 3, 8, 60, 128, 384, 512]),
        tile=st.sampled_from([16, 32, 64, 128]),
    )
    # So many slots that a kernel cuts them into parts, and so few experts that the interpreter is quick.
    many = st.builds(Case, st.just(torch.int32), st.integers(500, 1100), st.just(8), st.just(9), st.just(128))
    return st.one_of(few, few, many)


def routing(case, device: torch.device, seed: int) -> Tensor:
    """ids [T, k] int32 for a case of this room or of moe_gemm: different experts in a row, -1 for other ranks'.

    Without num_routed: an even or a very uneven load, some or no experts elsewhere, padding rows, and the last expert
    is always hit, so that the far end of the weights is read.
    """
    g = torch.Generator(device).manual_seed(seed)
    num_experts, num_routed, lean = case.num_experts, case.num_routed, 0.0
    if num_routed is None:
        num_routed = max(num_experts * (1 + 3 * (seed % 2)), case.top_k)
        lean = 3.0 * (seed // 2 % 2)
    liking = torch.rand(case.num_tokens, num_routed, generator=g, device=device)
    liking += lean * torch.rand(num_routed, generator=g, device=device)
    ids = liking.topk(case.top_k, dim=1).indices.to(torch.int32)
    ids = torch.where(ids < num_experts, ids, -1)
    if case.num_routed is None and case.num_tokens:
        padding = torch.rand(case.num_tokens, generator=g, device=device) < 0.2 * (seed // 4 % 2)
        ids = torch.where(padding[:, None], -1, ids)
        if not (ids == num_experts - 1).any():
            ids[-1, 0] = num_experts - 1
    return ids


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, int, int]:
    return routing(case, device, seed), case.num_experts, case.tile


def cost(case: Case) -> Cost:
    tiles = int(num_tiles(case.num_slots, case.num_experts, case.tile))
    return Cost(4 * (case.num_slots + tiles * case.tile + tiles))
