import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.causal_conv.cases import Run, same, written
from nanodeploy.ops.gdn_scan import cases as scan
from nanodeploy.ops.states import StateLayout


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_seqs: int
    per_seq: int  # tokens of each
    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    num_slots: int
    state_dtype: torch.dtype = torch.float32
    gap: int = 0  # elements between the rows of qkv
    keeps: str | None = None  # "last" states of sequences, those after "all" tokens, or "mixed"

    @property
    def num_rows(self) -> int:
        return self.num_seqs * self.per_seq

    @property
    def channels(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim

    @property
    def layout(self) -> StateLayout:
        heads = self.num_heads, self.value_dim, self.key_dim
        return StateLayout(self.channels, 4, *heads, self.dtype, self.state_dtype)


def _point(num_seqs: int, num_heads: int, per_seq: int = 1, **fields: Any) -> Case:
    slots = num_seqs * (per_seq + 1)
    keeps = "last" if per_seq == 1 else "all"
    return Case(torch.bfloat16, num_seqs, per_seq, 16, num_heads, 128, 128, slots, keeps=keeps, **fields)


POINTS = {f"16/{heads} S{seqs}": _point(seqs, heads) for heads in (32, 64) for seqs in (1, 8, 64, 256)} | {
    "16/32 S64 bf16 state": _point(64, 32, state_dtype=torch.bfloat16),
    "16/32 S16 x4 tokens": _point(16, 32, 4),
}  # fmt: skip

# The states lie past 2**31 elements, as do the tails.
FAR = Case(torch.bfloat16, 3, 2, 16, 32, 128, 128, 2**31 // (32 * 128 * 128) + 8, keeps="all")


def of(
    qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, eps
) -> Case:  # fmt: skip
    num_seqs, (num_slots, num_heads, value_dim, key_dim) = read_slots.shape[0], states.shape
    per_seq = qkv.shape[0] // max(1, num_seqs)
    key_heads = (qkv.shape[1] - num_heads * value_dim) // (2 * key_dim)
    shape = (num_seqs, per_seq, key_heads, num_heads, key_dim, value_dim, num_slots)
    return Case(qkv.dtype, *shape, states.dtype, qkv.stride(0) - qkv.shape[1])


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        num_seqs = draw(st.integers(1, 3) if small else st.one_of(st.integers(1, 9), st.integers(10, 100)))
        per_seq = draw(st.sampled_from([1, 1, 2, 3] if small else [1, 1, 2, 4, 8]))
        key_heads, num_heads, key_dim, value_dim = draw(scan.heads(st, small=small))
        return Case(
            draw(st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16] * 3 + [torch.float16])),
            num_seqs,
            per_seq,
            key_heads,
            num_heads,
            key_dim,
            value_dim,
            num_slots=num_seqs * (per_seq + 1) + draw(st.integers(0, 2)),
            state_dtype=draw(st.sampled_from([torch.float32] * 3 + ([] if small else [torch.bfloat16]))),
            gap=draw(st.sampled_from([0, 8])),
            keeps=draw(st.sampled_from(["last", "all", "mixed"])),
        )

    return cases()


def make(case: Case, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Slots that nobody reads hold NaN."""
    g, chance = torch.Generator(device).manual_seed(seed), random.Random(seed)
    keeps = case.keeps or chance.choice(["last", "all", "mixed"])
    slots = chance.sample(range(case.num_slots), case.num_slots)
    own = slots[: case.num_seqs]
    read = [chance.choice([slot, slot, -1]) for slot in own]
    write = torch.full((case.num_seqs, case.per_seq), -1, dtype=torch.int32)
    spare = iter(slots[case.num_seqs :])
    for seq in range(case.num_seqs):
        if keeps == "mixed" and chance.random() < 0.3:
            continue  # a row of padding, or a sequence that only reads
        for row in range(case.per_seq if keeps != "last" else 0):
            write[seq, row] = next(spare) if keeps == "all" or chance.random() < 0.5 else -1
        write[seq, -1 if keeps != "mixed" else chance.randrange(case.per_seq)] = own[seq]
    read_slots = torch.tensor(read, dtype=torch.int32, device=device)
    rows = case.num_rows
    qkv = torch.randn(rows, case.channels + case.gap, generator=g, device=device).to(case.dtype)[:, : case.channels]
    z = torch.randn(rows, case.num_heads, case.value_dim, generator=g, device=device).to(case.dtype)
    a, b, a_log, dt_bias = scan.make_gates(_Tokens(rows, case.num_heads, case.dtype), g, device)
    conv_weight = (0.5 * torch.randn(case.channels, 4, generator=g, device=device)).to(case.dtype)
    norm_weight = 1 + 0.2 * torch.randn(case.value_dim, generator=g, device=device)
    used = sorted({slot for slot in read if slot >= 0})
    tails, states = case.layout.empty(case.num_slots, device)
    tails.fill_(float("nan"))
    states.fill_(float("nan"))
    tails[used] = torch.randn(case.layout.tails_shape(len(used)), generator=g, device=device).to(case.dtype)
    values = 0.2 * torch.randn(case.layout.states_shape(len(used)), generator=g, device=device)
    states[used] = values.to(case.state_dtype)
    write_slots = write.flatten().to(device)
    return (
        qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, 1e-6
    )  # fmt: skip


@dataclass(frozen=True)
class _Tokens:
    num_tokens: int
    num_heads: int
    dtype: torch.dtype


def owned(case: Case, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Only the slots that some token names may change."""
    tails, states, write_slots = args[8], args[9], args[11]
    bounds = torch.tensor([0, len(write_slots)], device=write_slots.device)
    return {name: written(t.shape, bounds, write_slots) for name, t in (("tails", tails), ("states", states))}


def cost(case: Case) -> Cost:
    """A slot read of each sequence; a slot written of each token that keeps one."""
    kept = case.num_rows if case.keeps == "all" else case.num_seqs
    num_values = case.num_rows * (case.channels + 2 * case.num_heads * (case.value_dim + 1)) + 4 * case.channels
    num_bytes = num_values * case.dtype.itemsize + (case.num_seqs + kept) * case.layout.slot_bytes
    flops = 6 * case.num_rows * case.num_heads * case.value_dim * case.key_dim
    return Cost(num_bytes + 4 * (case.num_rows + case.num_seqs), flops)


def agrees_written(
    args: tuple[Any, ...], got: dict[str, Tensor], reference: dict[str, Tensor], case: Case
) -> dict[str, str | None]:
    """States as gdn_scan judges them; what goes out, and the tails, have the usual error budget."""
    dtype = max(case.dtype, case.state_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    complaint = scan.near(got["states"], reference["states"], dtype)
    return {"states": complaint and f"states: {complaint}"}


def law_tokens_together_equal_one_by_one(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """Steps of one token, each continuing from the last, give the bits of one step of all; so it can be replayed."""
    qkv, z, a, b, *fixed, tails, states, read_slots, write_slots, eps = make(case, device, seed)
    if case.state_dtype != torch.float32:
        return  # between the steps the state would be rounded
    # Each sequence has a slot more, in which its state goes from step to step.
    num_slots, num_seqs = case.num_slots, case.num_seqs
    going = torch.arange(num_slots, num_slots + num_seqs, device=device, dtype=torch.int32)
    tails1, states1 = (torch.cat((t, t.new_full((num_seqs, *t.shape[1:]), float("nan")))) for t in (tails, states))
    together = run(qkv, z, a, b, *fixed, tails, states, read_slots, write_slots, eps)
    came = read_slots
    for token in range(case.per_seq):
        rows = torch.arange(token, case.num_rows, case.per_seq, device=device)
        one = (t[rows] for t in (qkv, z, a, b))
        got = run(*one, *fixed, tails1, states1, came, going, eps)
        same(got, together[rows], f"token {token}")
        for seq, slot in enumerate(write_slots[rows].tolist()):
            if slot >= 0:
                same(states1[num_slots + seq], states[slot], f"the state of sequence {seq} after token {token}")
                same(tails1[num_slots + seq], tails[slot], f"the tail of sequence {seq} after token {token}")
        came = going


def law_a_new_sequence_sees_no_slot(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """read_slots -1 is a slot of zeros."""
    *data, tails, states, read_slots, write_slots, eps = make(case, device, seed)
    zeros = [torch.cat((t, torch.zeros_like(t[:1]))) for t in (tails, states)]
    new = run(*data, tails, states, torch.full_like(read_slots, -1), write_slots, eps)
    there = run(*data, *zeros, torch.full_like(read_slots, case.num_slots), write_slots, eps)
    same(new, there, "a new sequence")


def law_a_sequence_alone(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """A sequence has the same bits, in its rows and its slots, alone and in the batch."""
    qkv, z, a, b, *fixed, tails, states, read_slots, write_slots, eps = make(case, device, seed)
    after = tails.clone(), states.clone()
    whole = run(qkv, z, a, b, *fixed, *after, read_slots, write_slots, eps)
    for seq in sorted({0, case.num_seqs // 2, case.num_seqs - 1}):
        rows = slice(seq * case.per_seq, (seq + 1) * case.per_seq)
        one, alone = (t[rows] for t in (qkv, z, a, b)), (tails.clone(), states.clone())
        kept = write_slots[rows]
        got = run(*one, *fixed, *alone, read_slots[seq : seq + 1], kept, eps)
        same(got, whole[rows], f"rows of sequence {seq}")
        slots = kept[kept >= 0].long()
        for mine, batch in zip(alone, after):
            same(mine[slots], batch[slots], f"slots of sequence {seq}")


LAWS = [law_tokens_together_equal_one_by_one, law_a_new_sequence_sees_no_slot, law_a_sequence_alone]
