from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.sample.reference import LARGEST, MIN_TEMPERATURE, gumbel, survivors


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_seqs: int
    vocab_size: int
    gap: int = 0  # elements between the rows of logits
    mode: str | None = None  # what the rows ask for: greedy, temperature, top_k_top_p, or mixed (None)


MODES = ("greedy", "temperature", "top_k_top_p", "mixed")

POINTS = {
    f"qwen3 S{num_seqs} {mode}": Case(torch.bfloat16, num_seqs, 151936, mode=mode)
    for num_seqs in (1, 64, 256)
    for mode in MODES[:3]
}

FAR = Case(torch.bfloat16, 2**14 + 1, 2**17 + 3, mode="greedy")  # addresses past 2**31 elements

# Arguments split by row when a row is run alone.
ROWS = ("logits", "temperature", "top_k", "top_p", "min_p", "seeds", "positions")


def of(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Case:
    return Case(logits.dtype, logits.shape[0], logits.shape[1], logits.stride(0) - logits.shape[1])


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float32]),
        num_seqs=st.integers(0, 3 if small else 40),
        vocab_size=st.sampled_from([1, 7, 320, 4999] if small else [1, 1000, 32000, 32001, 128256, 151936]),
        gap=st.sampled_from([0, 1, 64]),
        mode=st.sampled_from(MODES),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator(device).manual_seed(seed)
    num_seqs = case.num_seqs

    def pick(values: list[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, device=device)[
            torch.randint(len(values), (num_seqs,), generator=g, device=device)
        ].to(dtype)

    # Rows from nearly flat (random weights) to peaked (trained ones); coarse dtypes bring ties.
    spread = pick([0.3, 1.0, 3.0, 8.0], torch.float32)
    logits = torch.empty(num_seqs, case.vocab_size + case.gap, dtype=case.dtype, device=device)
    logits.normal_(generator=g)
    logits *= spread[:, None].to(case.dtype)
    seeds, positions = (torch.randint(-(2**62), 2**62, (num_seqs,), generator=g, device=device) for _ in range(2))
    positions = positions.abs() % 40960
    if case.mode == "greedy":
        options: list[list[float]] = [[0.0], [0.0], [1.0], [0.0]]
    elif case.mode == "temperature":
        options = [[0.6, 1.0], [0.0], [1.0], [0.0]]
    elif case.mode == "top_k_top_p":
        options = [[0.6, 1.0], [50.0], [0.9], [0.0]]
    else:
        options = [
            [0.0, 0.0, 0.3, 0.7, 1.0, 2.0],
            [-1, 0, 0, 1, 2, 50, 1000, case.vocab_size],
            [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0, 1.0, 1.0],
            [0.0, 0.0, 0.0, 0.02, 0.5, 1.0],
        ]
        hidden = torch.rand(logits.shape, generator=g, device=device) < 0.2
        hidden &= pick([0.0, 0.0, 1.0], torch.bool)[:, None]
        hidden[:, case.vocab_size // 2] = False  # something to choose remains
        logits.masked_fill_(hidden, -torch.inf)
    temperature, top_k, top_p, min_p = (
        pick(values, dtype) for values, dtype in zip(options, (torch.float32, torch.int32) + 2 * (torch.float32,))
    )
    return logits[:, : case.vocab_size], temperature, top_k, top_p, min_p, seeds, positions


def cost(case: Case) -> Cost:
    return Cost(case.num_seqs * (case.vocab_size * case.dtype.itemsize + 44))


def agrees(args: tuple[Tensor, ...], out: Tensor, reference_out: Tensor, case: Case) -> str | None:
    """Judge each row against its own definition in fp64.

    Another token than the reference's is right only where fp32 cannot tell: its score lies within a few ulp of the
    best, or a token's place inside or outside the filters hangs on rounding.
    """
    for row, (got, wanted) in enumerate(zip(out.tolist(), reference_out.tolist())):
        if got == wanted:
            continue
        one = slice(row, row + 1)
        logits, temperature, top_k, top_p, min_p, seeds, positions = (a[one] for a in args)
        if not 0 <= got < case.vocab_size:
            return f"row {row}: token {got} is outside the vocabulary of {case.vocab_size}"
        if temperature.item() < MIN_TEMPERATURE:
            return f"row {row}: token {got}, but the largest logit is at {wanted}"
        x = torch.nan_to_num(logits.double(), nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)
        t = temperature.double()[:, None]
        score = x / t + gumbel(seeds, positions, case.vocab_size)
        slack = 1e-5
        surely = survivors(x, t, top_k, top_p * (1 - slack), min_p * (1 + slack) if min_p.item() < 1 else min_p)
        perhaps = survivors(x, t, top_k, top_p * (1 + slack), min_p * (1 - slack))
        best = score.masked_fill(~surely, -torch.inf).max().item()
        ulp = 2**-23 * max(1.0, (x[x.isfinite()].abs().max() / t).item())
        if not perhaps[0, got]:
            return f"row {row}: token {got} does not pass the filters"
        if score[0, got].item() < best - 8 * ulp:
            return f"row {row}: token {got} scores {score[0, got].item()}, the best {best}"
    return None
