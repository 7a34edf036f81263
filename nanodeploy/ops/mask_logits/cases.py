from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_seqs: int
    vocab_size: int
    num_masked: int  # rows that have a mask
    gap: int = 0  # elements between the rows of logits

    @property
    def num_words(self) -> int:
        return -(-self.vocab_size // 32)


POINTS = {f"qwen3 S64 masks {n}": Case(torch.bfloat16, 64, 151936, n) for n in (1, 32, 64)}

FAR = Case(torch.bfloat16, 2**14 + 1, 2**17 + 3, 3)  # addresses past 2**31 elements


def of(logits: Tensor, masks: Tensor, rows: Tensor) -> Case:
    gap = logits.stride(0) - logits.shape[1]
    return Case(logits.dtype, logits.shape[0], logits.shape[1], masks.shape[0], gap)


def _case(share: float, **fields) -> Case:
    return Case(num_masked=int(share * fields["num_seqs"]), **fields)


def strategy(st, *, small: bool):
    return st.builds(
        _case,
        share=st.sampled_from([0.0, 0.4, 1.0]),
        dtype=st.sampled_from(
            [torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16, torch.float32]
        ),
        num_seqs=st.integers(0, 6 if small else 80),
        vocab_size=st.sampled_from([1, 31, 32, 33, 320, 9000] if small else [1, 1000, 32000, 32001, 128256, 151936]),
        gap=st.sampled_from([0, 1, 64]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.empty(case.num_seqs, case.vocab_size + case.gap, dtype=case.dtype, device=device)
    logits.normal_(generator=g)
    num_masked = min(case.num_masked, case.num_seqs)
    masks = torch.randint(-(2**31), 2**31, (num_masked, case.num_words), generator=g, device=device)
    # A grammar allows next to nothing, or next to everything: whole words of either.
    kind = torch.randint(3, masks.shape, generator=g, device=device)
    masks = torch.where(kind == 0, 0, torch.where(kind == 1, -1, masks)).to(torch.int32)
    rows = torch.randperm(case.num_seqs, generator=g, device=device)[:num_masked]
    if num_masked and not (rows == case.num_seqs - 1).any():
        rows[-1] = case.num_seqs - 1  # always reach the far end
    return logits[:, : case.vocab_size], masks, rows


def owned(case: Case, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Only rows that have a mask may change."""
    logits, _, rows = args
    mine = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    mine[rows] = True
    return {"logits": mine}


def cost(case: Case) -> Cost:
    return Cost(case.num_masked * (case.vocab_size * case.dtype.itemsize + 4 * case.num_words + 8))


def one_by_one(run, case: Case, device: torch.device, seed: int) -> None:
    """Masking the rows one at a time leaves the same logits as masking them at once."""
    logits, masks, rows = make(case, device, seed)
    together = logits.clone()
    run(together, masks, rows)
    for i in range(len(rows)):
        run(logits, masks[i : i + 1], rows[i : i + 1])
    assert torch.equal(together, logits), "a row depends on the others"


LAWS = [one_by_one]
