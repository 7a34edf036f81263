import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.causal_conv.cases import (
    Run,
    bounds_of,
    draw_slots,
    drawn_lengths,
    first_parts,
    lengths,
    only_read,
    same,
    written,
)
from nanodeploy.ops.gdn_scan.reference import CHUNK
from nanodeploy.ops.states import StateLayout


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int  # rows of q, k and v, padding included
    num_seqs: int
    num_key_heads: int
    num_heads: int
    key_dim: int
    value_dim: int
    num_slots: int
    state_dtype: torch.dtype = torch.float32
    gap: int = 0  # elements between the rows of qkv
    q_lens: tuple[int, ...] | None = None
    num_before: int | None = None  # rows before the first sequence's

    @property
    def channels(self) -> int:
        return 2 * self.num_key_heads * self.key_dim + self.num_heads * self.value_dim

    @property
    def layout(self) -> StateLayout:
        heads = self.num_heads, self.value_dim, self.key_dim
        return StateLayout(self.channels, 4, *heads, self.dtype, self.state_dtype)


def _point(q_lens: tuple[int, ...], num_heads: int, num_key_heads: int = 16, **fields: Any) -> Case:
    shape = sum(q_lens), len(q_lens), num_key_heads, num_heads, 128, 128, 2 * len(q_lens)
    return Case(torch.bfloat16, *shape, q_lens=q_lens, num_before=0, **fields)


POINTS = {
    "16/64 1x8192": _point((8192,), 64),
    "16/64 8192x4": _point((8192,) * 4, 64),
    "16/32 1x8192": _point((8192,), 32),
    "16/32 1x32768": _point((32768,), 32),
    "16/32 4096x8": _point((4096,) * 8, 32),
    "16/32 1024x8": _point((1024,) * 8, 32),
    "2/8 1x2048": _point((2048,), 8, 2),
    "16/32 1x8192 bf16 state": _point((8192,), 32, state_dtype=torch.bfloat16),
}

FAR = Case(torch.bfloat16, 2**18 + 100, 2, 16, 32, 128, 128, 4, q_lens=(70, 3), num_before=2**18 + 10)


def of(qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots) -> Case:
    num_slots, num_heads, value_dim, key_dim = states.shape
    key_heads = (qkv.shape[1] - num_heads * value_dim) // (2 * key_dim)
    shape = (qkv.shape[0], read_slots.shape[0], key_heads, num_heads, key_dim, value_dim, num_slots)
    return Case(qkv.dtype, *shape, states.dtype, qkv.stride(0) - qkv.shape[1])


def heads(st, *, small: bool):
    """(key heads, value heads, key dim, value dim)."""
    dims = [(16, 16), (16, 32), (32, 16), (64, 64)] if small else [(128, 128), (64, 64), (64, 128), (32, 32)]
    counts = [(1, 1), (1, 2), (2, 2)] if small else [(1, 1), (2, 8), (4, 8), (2, 6), (16, 32)]
    return st.tuples(st.sampled_from(counts), st.sampled_from(dims)).map(lambda pair: (*pair[0], *pair[1]))


def strategy(st, *, small: bool):
    @st.composite
    def cases(draw):
        num_seqs = draw(st.integers(1, 3 if small else 6))
        q_lens = draw(lengths(st, num_seqs, 70 if small else 400))
        num_before = draw(st.sampled_from([0, 0, 1, 37]))
        num_tokens = num_before + sum(q_lens) + draw(st.integers(0, 3))
        key_heads, num_heads, key_dim, value_dim = draw(heads(st, small=small))
        return Case(
            draw(
                st.sampled_from(
                    [torch.float16, torch.float32] if small else [torch.bfloat16] * 3 + [torch.float16, torch.float32]
                )
            ),
            num_tokens,
            num_seqs,
            key_heads,
            num_heads,
            key_dim,
            value_dim,
            num_slots=2 * num_seqs + draw(st.integers(0, 4)),
            state_dtype=draw(st.sampled_from([torch.float32] * 3 + ([] if small else [torch.bfloat16]))),
            gap=draw(st.sampled_from([0, 0, 8])),
            q_lens=q_lens,
            num_before=num_before,
        )

    return cases()


def make_gates(case: Any, g: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, b, a_log and dt_bias. Of each head's decays some are near 1, some near 0, as in trained models."""
    shape = case.num_tokens, case.num_heads
    a = (3 * torch.randn(shape, generator=g, device=device) - 2).to(case.dtype)
    b = (2 * torch.randn(shape, generator=g, device=device)).to(case.dtype)
    a_log = (16 * torch.rand(case.num_heads, generator=g, device=device) + 1e-3).log()
    return a, b, a_log, torch.randn(case.num_heads, generator=g, device=device)


def make(case: Case, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Rows that are nobody's, and slots that nobody reads, hold NaN. Keys may be much alike: hard to invert."""
    g = torch.Generator(device).manual_seed(seed)
    slots = draw_slots(case, device, seed)
    q_lens, num_before = drawn_lengths(case, seed)
    keys = case.num_key_heads * case.key_dim
    qkv = torch.randn(case.num_tokens, case.channels + case.gap, generator=g, device=device)
    qkv[:, keys : 2 * keys] += (seed % 3) * torch.randn(keys, generator=g, device=device)
    qkv = torch.nn.functional.silu(qkv)
    qkv[:num_before] = qkv[num_before + sum(q_lens) :] = float("nan")
    shape = case.layout.states_shape(case.num_slots)
    states = only_read(0.2 * torch.randn(shape, generator=g, device=device), slots[1]).to(case.state_dtype)
    return qkv.to(case.dtype)[:, : case.channels], *make_gates(case, g, device), states, *slots


def owned(case: Case, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Only the slots that some token names may change."""
    states, cu_q_lens, _, write_slots = args[5:]
    return {"states": written(states.shape, cu_q_lens, write_slots)}


def cost(case: Case) -> Cost:
    """Flops of the recurrence: what is seen, what is written, what is read. A state read and one written of each."""
    values = case.num_heads * case.value_dim
    per_token = case.channels + values + 2 * case.num_heads  # what comes in, what goes out, the gates
    num_bytes = case.num_tokens * (per_token * case.dtype.itemsize + 4)
    state = case.num_heads * case.value_dim * case.key_dim
    num_bytes += 2 * case.num_seqs * state * case.state_dtype.itemsize
    return Cost(num_bytes, 6 * case.num_tokens * state)


def near(got: Tensor, wanted: Tensor, dtype: torch.dtype, axes: tuple[int, ...] = (-2, -1)) -> str | None:
    """A complaint if results are further apart than products of operands in `dtype` explain, else None.

    A result is a sum of some hundred products of factors rounded a few times, which may cancel. Measured against
    float64, kernels are off by 0.3 to 0.6 spacings of the dtype on the whole, more where there are few rows, all of
    whose elements share what their key and query cancel; an element by a few times that, of itself and of the rms
    along `axes` (of one head). In fp32 it is what sums in another order come to.
    """
    if not torch.equal(got.isnan(), wanted.isnan()):
        return "NaN in one, not in the other"
    known = ~wanted.isnan()
    got, wanted = (torch.where(known, t.double(), 0) for t in (got, wanted))
    eps = torch.finfo(dtype).eps * (512 if dtype == torch.float32 else 1)
    error, size = torch.linalg.vector_norm(got - wanted), torch.linalg.vector_norm(wanted)
    allowed = eps * (1 + 4 * (wanted[..., 0].numel() + 1) ** -0.5)
    if error > allowed * size:
        return f"||error|| is {error / size:.2e} of the whole, allowed {allowed:.2e}"
    rms = wanted.square().mean(axes, keepdim=True).sqrt()
    worst = ((got - wanted).abs() / (wanted.abs() + rms).clamp(min=1e-30)).max().item() if got.numel() else 0.0
    return f"an element is off by {worst:.2e}, allowed {16 * eps:.2e}" if worst > 16 * eps else None


def agrees_written(
    args: tuple[Any, ...], got: dict[str, Tensor], reference: dict[str, Tensor], case: Case
) -> dict[str, str | None]:
    """Also the states are made of products of operands in the inputs' dtype, although they are fp32."""
    found = {
        "out": near(got["out"], reference["out"], case.dtype, (0, 2)),
        "states": near(got["states"], reference["states"], coarser(case)),
    }
    return {name: complaint and f"{name}: {complaint}" for name, complaint in found.items()}


def coarser(case: Case) -> torch.dtype:
    """Of the dtypes that a state goes through the one with fewer digits."""
    return max(case.dtype, case.state_dtype, key=lambda dtype: torch.finfo(dtype).eps)


TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def law_two_parts_equal_the_whole(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """Every sequence cut in two, the parts run one after the other, gives the same: to the bit where cut at CHUNKs.

    (Not where the state between them is rounded to bf16.)
    """
    *data, states, cu_q_lens, read_slots, write_slots = make(case, device, seed)
    after = states.clone()
    whole = run(*data, after, cu_q_lens, read_slots, write_slots)
    chance = random.Random(seed)
    lens = cu_q_lens.diff().tolist()
    exact = bool(seed % 2) and case.state_dtype == torch.float32
    firsts = [chance.randint(0, n) // (CHUNK if exact else 1) * (CHUNK if exact else 1) for n in lens]
    heads, rests = first_parts(cu_q_lens.tolist(), firsts)

    def part(rows: list[int]) -> list[Tensor]:
        return [t[rows] for t in data[:3]] + data[3:]

    between = torch.arange(case.num_slots, case.num_slots + case.num_seqs, device=device, dtype=torch.int32)
    states = torch.cat((states, states.new_full((case.num_seqs, *states.shape[1:]), float("nan"))))
    kept, ends = write_slots[heads].clone(), bounds_of(firsts, whole)
    last = [(int(end) - 1, seq) for seq, end in enumerate(ends[1:]) if firsts[seq]]
    also = [(int(kept[row]), int(between[seq])) for row, seq in last]
    for row, seq in last:
        kept[row] = between[seq]
    parts = torch.zeros_like(whole)
    parts[heads] = run(*part(heads), states, ends, read_slots, kept)
    for slot, source in also:
        if slot >= 0:
            states[slot] = states[source]
    moved = torch.where(torch.tensor(firsts, device=device) > 0, between, read_slots)
    rest_lens = [n - first for n, first in zip(lens, firsts)]
    parts[rests] = run(*part(rests), states, bounds_of(rest_lens, whole), moved, write_slots[rests])
    if exact:
        same(parts, whole, "the parts' rows")
        same(states[: case.num_slots], after, "the slots after the parts")
    else:
        tolerance = TOLERANCE[case.dtype]
        scale = whole.abs().max().item() if whole.numel() else 0.0
        torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance * scale)
        complaint = near(states[: case.num_slots], after, coarser(case))
        assert complaint is None, f"the slots after the parts: {complaint}"


def law_a_new_sequence_sees_no_slot(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """read_slots -1 is a slot of zeros."""
    *data, states, cu_q_lens, read_slots, write_slots = make(case, device, seed)
    new = run(*data, states.clone(), cu_q_lens, torch.full_like(read_slots, -1), write_slots)
    zeros = torch.cat((states, torch.zeros_like(states[:1])))
    there = run(*data, zeros, cu_q_lens, torch.full_like(read_slots, case.num_slots), write_slots)
    same(new, there, "a new sequence")


def law_checkpoints_are_ends_of_prefixes(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """The state kept after any token is that kept at the end of a sequence that ends there; to the bit at CHUNKs."""
    *data, states, cu_q_lens, read_slots, write_slots = make(case, device, seed)
    after = states.clone()
    run(*data, after, cu_q_lens, read_slots, write_slots)
    for seq, (begin, end) in enumerate(pairwise(cu_q_lens.tolist())):
        for row in range(begin, end - 1):
            slot = int(write_slots[row])
            if slot < 0:
                continue
            alone = torch.full_like(write_slots[begin : row + 1], -1)
            alone[-1] = slot
            prefix = [t[begin : row + 1] for t in data[:3]] + data[3:]
            ended = states.clone()
            run(*prefix, ended, bounds_of([row + 1 - begin], states), read_slots[seq : seq + 1], alone)
            if (row + 1 - begin) % CHUNK == 0:
                same(after[slot], ended[slot], f"the state after row {row - begin}")
            complaint = near(after[slot], ended[slot], coarser(case))
            assert complaint is None, f"the state after row {row - begin} of sequence {seq}: {complaint}"


def law_a_sequence_alone(run: Run, case: Case, device: torch.device, seed: int) -> None:
    """A sequence has the same bits, in its rows and its slots, alone and in the batch."""
    *data, states, cu_q_lens, read_slots, write_slots = make(case, device, seed)
    after = states.clone()
    whole = run(*data, after, cu_q_lens, read_slots, write_slots)
    for seq, (begin, end) in enumerate(pairwise(cu_q_lens.tolist())):
        alone, kept = states.clone(), write_slots[begin:end]
        mine = [t[begin:end] for t in data[:3]] + data[3:]
        rows = run(*mine, alone, bounds_of([end - begin], whole), read_slots[seq : seq + 1], kept)
        same(rows, whole[begin:end], f"rows of sequence {seq}")
        slots = kept[kept >= 0].long()
        same(alone[slots], after[slots], f"slots of sequence {seq}")


LAWS = [
    law_two_parts_equal_the_whole,
    law_a_new_sequence_sees_no_slot,
    law_checkpoints_are_ends_of_prefixes,
    law_a_sequence_alone,
]
