import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


class Sequences(Protocol):
    """The fields that say which rows are whose; cases of gdn_scan have them too."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def num_seqs(self) -> int: ...
    @property
    def num_slots(self) -> int: ...
    @property
    def q_lens(self) -> tuple[int, ...] | None: ...
    @property
    def num_before(self) -> int | None: ...


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int  # rows of x, padding included
    num_seqs: int
    channels: int
    width: int
    num_slots: int
    gap: int = 0  # elements between the rows of x
    q_lens: tuple[int, ...] | None = None
    num_before: int | None = None  # rows before the first sequence's


def _point(q_lens: tuple[int, ...], channels: int) -> Case:
    shape = sum(q_lens), len(q_lens), channels, 4, 2 * len(q_lens)
    return Case(torch.bfloat16, *shape, q_lens=q_lens, num_before=0)


POINTS = {
    "35B 1x8192": _point((8192,), 8192),
    "35B 8x1024": _point((1024,) * 8, 8192),
    "397B 1x8192": _point((8192,), 12288),
    "35B decode 64": _point((1,) * 64, 8192),
}

FAR = Case(torch.bfloat16, 2**17 + 70, 2, 2**14 + 8, 4, 5, q_lens=(2**17 + 60, 3), num_before=2)


def of(x, weight, tails, cu_q_lens, read_slots, write_slots) -> Case:
    num_tokens, channels = x.shape
    shape = (num_tokens, read_slots.shape[0], channels, weight.shape[1], tails.shape[0])
    return Case(x.dtype, *shape, gap=x.stride(0) - channels)


def lengths(st, num_seqs: int, longest: int):
    """Strategy of the sequences' rows: none, one, few, around multiples of 64, any. One sequence may be `longest`."""
    near = st.integers(1, max(1, longest // 64)).flatmap(lambda n: st.integers(64 * n - 1, 64 * n + 1))
    few = st.integers(0, max(4, longest // 8))
    first = st.one_of(near.map(lambda n: min(n, longest)), few, st.integers(0, longest))
    others = st.one_of(st.sampled_from([0, 1, 2, 3]), few)
    return st.tuples(first, *[others] * (num_seqs - 1)).flatmap(st.permutations).map(tuple)


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        num_seqs = draw(st.integers(1, 3 if small else 9))
        q_lens = draw(lengths(st, num_seqs, 70 if small else 700))
        num_before = draw(st.sampled_from([0, 0, 1, 37]))
        num_tokens = num_before + sum(q_lens) + draw(st.integers(0, 3))
        return Case(
            draw(st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16])),
            num_tokens,
            num_seqs,
            channels=draw(st.sampled_from([1, 24, 130] if small else [24, 130, 1024, 8192])),
            width=4,
            num_slots=2 * num_seqs + draw(st.integers(0, 4)),
            gap=draw(st.sampled_from([0, 1, 64])),
            q_lens=q_lens,
            num_before=num_before,
        )

    return cases()


def drawn_lengths(case: Sequences, seed: int) -> tuple[tuple[int, ...], int]:
    """q_lens and num_before of the case; random ones that fit its shapes where it leaves them open."""
    if case.q_lens is not None and case.num_before is not None:
        return case.q_lens, case.num_before
    chance = random.Random(seed)
    num_before = chance.choice([0, chance.randint(0, case.num_tokens)])
    left, q_lens = case.num_tokens - num_before, []
    for _ in range(case.num_seqs):
        q_lens.append(chance.randint(0, left))
        left -= q_lens[-1]
    return tuple(q_lens), num_before


def draw_slots(case: Sequences, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(cu_q_lens, read_slots, write_slots) that keep to the rules of ops/states.py.

    Of three sequences one is new, one continues in its slot, one continues from another's. Most keep their last state
    in their slot; spare slots keep states in between. Rows that are nobody's name slots, which must stay untouched.
    """
    chance = random.Random(seed)
    q_lens, num_before = drawn_lengths(case, seed)
    slots = chance.sample(range(case.num_slots), case.num_slots)
    own, sources, spare = slots[: case.num_seqs], slots[case.num_seqs : 2 * case.num_seqs], slots[2 * case.num_seqs :]
    bounds = [num_before]
    for q_len in q_lens:
        bounds.append(bounds[-1] + q_len)
    read = [chance.choice([-1, mine, source]) for mine, source in zip(own, sources)]
    nobodys = own[0] if own else -1
    write = [nobodys if not num_before <= row < bounds[-1] else -1 for row in range(case.num_tokens)]
    for mine, (begin, end) in zip(own, pairwise(bounds)):
        if end > begin and chance.random() < 0.9:
            write[end - 1] = mine
    for slot in spare:
        seq = chance.randrange(case.num_seqs)
        if q_lens[seq]:
            row = chance.choice([chance.randrange(q_lens[seq]), min(q_lens[seq], 64) - 1, 0])
            if write[bounds[seq] + row] < 0:
                write[bounds[seq] + row] = slot

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return integers(bounds), integers(read), integers(write)


def only_read(whole: Tensor, read_slots: Tensor) -> Tensor:
    """The slots [N, ...] with NaN in all that no sequence reads."""
    held = torch.full_like(whole, float("nan"))
    rows = read_slots[read_slots >= 0].long()
    held[rows] = whole[rows]
    return held


def written(shape: torch.Size, cu_q_lens: Tensor, write_slots: Tensor) -> Tensor:
    """Mask over slots of that shape: those that some sequence's token names."""
    rows = torch.arange(len(write_slots), device=write_slots.device)
    named = write_slots[(write_slots >= 0) & (rows >= cu_q_lens[0]) & (rows < cu_q_lens[-1])]
    mask = torch.zeros(shape[0], dtype=torch.bool, device=write_slots.device)
    mask[named.long()] = True
    return mask.view(-1, *[1] * (len(shape) - 1)).expand(shape)


def make(case: Case, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Rows of x that are nobody's, and slots that nobody reads, hold NaN."""
    g = torch.Generator(device).manual_seed(seed)
    cu_q_lens, read_slots, write_slots = draw_slots(case, device, seed)
    x = torch.randn(case.num_tokens, case.channels + case.gap, generator=g, device=device).to(case.dtype)
    x = x[:, : case.channels]
    q_lens, num_before = drawn_lengths(case, seed)
    x[:num_before] = x[num_before + sum(q_lens) :] = float("nan")
    weight = (0.5 * torch.randn(case.channels, case.width, generator=g, device=device)).to(case.dtype)
    tails = torch.randn(case.num_slots, case.width - 1, case.channels, generator=g, device=device).to(case.dtype)
    return x, weight, only_read(tails, read_slots), cu_q_lens, read_slots, write_slots


def owned(case: Case, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Only the slots that some token names may change."""
    _, _, tails, cu_q_lens, _, write_slots = args
    return {"tails": written(tails.shape, cu_q_lens, write_slots)}


def cost(case: Case) -> Cost:
    """A tail read and a tail written of each sequence."""
    tails = 2 * case.num_seqs * (case.width - 1)
    num_values = case.channels * (2 * case.num_tokens + tails + case.width)
    index_bytes = 4 * (case.num_tokens + 2 * case.num_seqs + 1)
    num_bytes = num_values * case.dtype.itemsize + index_bytes
    return Cost(num_bytes, case.num_tokens * case.channels * (2 * case.width + 4))


Run = Callable[..., Tensor]


def same(got: Tensor, wanted: Tensor, what: str) -> None:
    """To the bit, where NaN equals itself."""
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=lambda said: f"{what}: {said}")


def first_parts(bounds: list[int], firsts: list[int]) -> list[list[int]]:
    """Rows of the first parts of all sequences, and of the rests, when sequence s is cut after firsts[s] rows."""
    spans = [(begin, begin + first, end) for (begin, end), first in zip(pairwise(bounds), firsts)]
    heads = [row for begin, cut, _ in spans for row in range(begin, cut)]
    return [heads, [row for _, cut, end in spans for row in range(cut, end)]]


def bounds_of(lens: list[int], like: Tensor) -> Tensor:
    return torch.tensor([0, *lens], device=like.device).cumsum(0).int()


def law_two_parts_equal_the_whole(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """Every sequence cut in two anywhere, the parts run one after the other, gives the same bits and slots."""
    x, weight, tails, cu_q_lens, read_slots, write_slots = make(case, device, seed)
    after = tails.clone()
    whole = run(x, weight, after, cu_q_lens, read_slots, write_slots)
    chance = random.Random(seed)
    lens = cu_q_lens.diff().tolist()
    firsts = [chance.randint(0, n) for n in lens]
    heads, rests = first_parts(cu_q_lens.tolist(), firsts)
    # Between the parts the state lies in a slot of its own.
    between = torch.arange(case.num_slots, case.num_slots + case.num_seqs, device=device, dtype=torch.int32)
    tails = torch.cat((tails, tails.new_full((case.num_seqs, *tails.shape[1:]), float("nan"))))
    kept = write_slots[heads].clone()
    ends = bounds_of(firsts, x)
    marked = {int(end) - 1: between[seq] for seq, end in enumerate(ends[1:]) if firsts[seq]}
    also = [(row, int(kept[row])) for row in marked]
    for row, slot in marked.items():
        kept[row] = slot
    parts = torch.zeros_like(whole)
    parts[heads] = run(x[heads], weight, tails, ends, read_slots, kept)
    for row, kept_too in also:  # what the whole run keeps after the same token
        if kept_too >= 0:
            tails[kept_too] = tails[int(kept[row])]
    moved = torch.where(torch.tensor(firsts, device=device) > 0, between, read_slots)
    rest_lens = [n - first for n, first in zip(lens, firsts)]
    parts[rests] = run(x[rests], weight, tails, bounds_of(rest_lens, x), moved, write_slots[rests])
    same(parts, whole, "the parts' rows")
    same(tails[: case.num_slots], after, "the slots after the parts")


def law_a_new_sequence_sees_no_slot(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """read_slots -1 is a slot of zeros."""
    x, weight, tails, cu_q_lens, read_slots, write_slots = make(case, device, seed)
    new = run(x, weight, tails.clone(), cu_q_lens, torch.full_like(read_slots, -1), write_slots)
    zeros = torch.cat((tails, torch.zeros_like(tails[:1])))
    there = run(x, weight, zeros, cu_q_lens, torch.full_like(read_slots, case.num_slots), write_slots)
    same(new, there, "a new sequence")


def law_a_sequence_alone(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """A sequence has the same bits, in its rows and its slots, alone and in the batch."""
    x, weight, tails, cu_q_lens, read_slots, write_slots = make(case, device, seed)
    after = tails.clone()
    whole = run(x, weight, after, cu_q_lens, read_slots, write_slots)
    for seq, (begin, end) in enumerate(pairwise(cu_q_lens.tolist())):
        alone, kept = tails.clone(), write_slots[begin:end]
        rows = run(x[begin:end], weight, alone, bounds_of([end - begin], x), read_slots[seq : seq + 1], kept)
        same(rows, whole[begin:end], f"rows of sequence {seq}")
        slots = kept[kept >= 0].long()
        same(alone[slots], after[slots], f"slots of sequence {seq}")


LAWS = [law_two_parts_equal_the_whole, law_a_new_sequence_sees_no_slot, law_a_sequence_alone]
