import random
from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.plan_decode.reference import FIELDS, PLACES, UNIT, extent, plan_decode

MAX_TOKENS = 8192


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_seqs: int
    num_queries: int
    num_heads: int
    num_kv_heads: int
    window: int
    has_prefixes: bool
    unit: int = UNIT
    kv_lens: tuple[int, ...] | None = None
    groups: tuple[tuple[int, int], ...] | None = None  # (rows, tokens they share) of each group in turn

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.num_queries, self.num_heads, self.num_kv_heads


def _point(kv_lens: tuple[int, ...], heads: int, kv_heads: int) -> Case:
    return Case(torch.int32, len(kv_lens), 1, heads, kv_heads, 0, False, kv_lens=kv_lens)


POINTS = {
    "32/8 B1 ctx32768": _point((32768,), 32, 8),
    "32/8 B64 ctx4096": _point((4096,) * 64, 32, 8),
    "32/8 B256 ctx100-2048": _point(tuple(100 + i * 7919 % 1949 for i in range(256)), 32, 8),
    "32/8 B64 on 16384": Case(torch.int32, 64, 1, 32, 8, 0, True, kv_lens=(16384 + 64,) * 64, groups=((64, 16384),)),
}


def of(kv_lens, prefixes, num_queries, num_heads, num_kv_heads, window, unit=UNIT) -> Case:
    shape = (num_queries, num_heads, num_kv_heads)
    return Case(kv_lens.dtype, kv_lens.shape[0], *shape, window, prefixes is not None, unit)


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        num_seqs = draw(st.integers(1, 40 if small else 600))
        num_kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
        num_heads = num_kv_heads * draw(st.sampled_from([1, 4, 7, 16]))
        shape = (draw(st.sampled_from([1, 2, 8])), num_heads, num_kv_heads)
        window = draw(st.sampled_from([0, 0, 0, 100, 1024]))
        unit = draw(st.sampled_from([UNIT, UNIT, 512]))
        return Case(torch.int32, num_seqs, *shape, window, draw(st.booleans()), unit)

    return cases()


def prefix_rows(groups: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """`prefixes` [S, 2] of groups (rows, tokens they share) in turn."""
    rows: list[list[int]] = []
    for num_rows, num_tokens in groups:
        rows += [[len(rows), num_tokens]] * num_rows
    return torch.tensor(rows, dtype=torch.int32, device=device)


def make(case: Case, device: torch.device, seed: int) -> tuple:
    """Where the case leaves lengths and groups open they are random, some empty, some very long."""
    chance = random.Random(seed)
    groups, kv_lens = case.groups, case.kv_lens
    if case.has_prefixes and not groups:
        drawn, left = [], case.num_seqs
        while left:
            num_rows = chance.randint(1, min(left, chance.choice([1, 4, 40, 300])))
            drawn.append((num_rows, 16 * chance.choice([0, chance.randint(0, MAX_TOKENS // 16)])))
            left -= num_rows
        groups = tuple(drawn)
    if not kv_lens:
        shared = [num_tokens for num_rows, num_tokens in groups or ((case.num_seqs, 0),) for _ in range(num_rows)]
        mine = [chance.choice([0, 1, chance.randint(0, 300), chance.randint(0, MAX_TOKENS)]) for _ in shared]
        kv_lens = tuple(a + b for a, b in zip(shared, mine))
    lens = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    prefixes = prefix_rows(groups, device) if case.has_prefixes and groups else None
    return lens, prefixes, *case.shape, case.window, case.unit


def cost(case: Case) -> Cost:
    return Cost(4 * (case.num_seqs * (3 if case.has_prefixes else 1) + _extent(case).length))


def _extent(case: Case):
    return extent(case.num_seqs, *case.shape, case.has_prefixes and not case.window)


def law_every_token_once(run, case: Case, device: torch.device, seed: int) -> None:
    """Each token that a sequence sees stands in one item of it, and its partial results in slots of their own."""
    args = make(case, device, seed)
    lens, room = args[0].tolist(), _extent(case)
    plan = run(*args).tolist()
    items = [plan[i * FIELDS : (i + 1) * FIELDS] for i in range(room.num_items)]
    seen = [[0] * (kv_len + 1) for kv_len in lens]  # +1 at a stretch's first token, -1 after its last
    slots: list[int] = []
    for first, num_seqs, begin, end, slot, *_ in items:
        for seq in range(first, first + num_seqs):
            assert 0 <= begin <= end <= lens[seq] or (begin == end and num_seqs == 1)
            seen[seq][begin] += 1
            seen[seq][end] -= 1
        slots += [] if slot < 0 else range(slot, slot + num_seqs)
    assert len(set(slots)) == len(slots) and all(slot < room.num_slots for slot in slots)
    for seq, changes in enumerate(seen):
        hidden = max(0, lens[seq] - case.num_queries + 1 - case.window) if case.window else 0
        times = 0
        for token, change in enumerate(changes[:-1]):
            times += change
            assert times == (token >= hidden), f"token {token} of sequence {seq} stands in {times} items"
    if room.shares:
        for seq in range(len(lens)):
            own, num_own, shared, num_shared = plan[room.places_at + seq * PLACES :][:PLACES]
            mine = [own + i for i in range(num_own)] + [shared + i * room.tile for i in range(num_shared)]
            direct = any(item[0] == seq and item[1] == 1 and item[4] < 0 for item in items)
            assert direct or set(mine) <= set(slots)
    assert not any(plan[room.counters_at :])


def law_the_reference_cuts_so(run, case: Case, device: torch.device, seed: int) -> None:
    """A plan is not near another: decode_attention's bits hang on it."""
    args = make(case, device, seed)
    assert torch.equal(run(*args), plan_decode.reference(*args))


LAWS = [law_every_token_once, law_the_reference_cuts_so]
