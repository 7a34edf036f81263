"""What a room says about its inputs: which exist, how to make them, and the least work they need."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Cost:
    """The least work of one call: each input byte read once, each output byte written once."""

    num_bytes: int
    flops: int = 0

    def floor_s(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Seconds that no implementation can beat on a machine with these rates."""
        return max(self.num_bytes / bytes_per_s, self.flops / flops_per_s)


class CasesModule(Protocol):
    """The contract of a room's cases.py. `Case` is a frozen dataclass whose first field is `dtype: torch.dtype`.

    Fields that only the host knows (sequence lengths) default to None: `of` leaves them out, so `when(case)` cannot
    depend on them and dispatch never synchronises with the device.
    """

    Case: type
    POINTS: dict[str, Any]  # name -> Case at a real model's shape; bench rows

    def of(self, *args: Any) -> Any:
        """Case of a call, from shapes, strides and dtypes only."""

    def strategy(self, st: Any, *, small: bool) -> Any:
        """Hypothesis strategy of Cases (`st` is hypothesis.strategies); `small` keeps the Triton interpreter fast."""

    def make(self, case: Any, device: torch.device, seed: int) -> tuple[Any, ...]:
        """Fresh random arguments of the op. Cache slots that nobody owns hold NaN."""

    def cost(self, case: Any) -> Cost: ...

    # `make` fills a None of a host-only field at random from its seed; shapes and strides follow from the rest alone,
    # so that a CUDA graph captured with one call's tensors can be replayed with another's.
    #
    # Optional, all read by bench/gate.py:
    #   LAWS                      list of law(run, case, device, seed) -> None that raise AssertionError; run is the
    #                             kernel under test
    #   agrees(args, out, reference_out, case) -> str | None
    #                             a complaint, for ops whose equality is not elementwise; replaces the error budget
    #   agrees_written(args, written, reference, case) -> {argument: str | None}
    #                             the same for mutated arguments and outputs (given by name) whose equality is not
    #                             elementwise; of those that it does not name the error budget decides
    #   owned(case, args) -> {argument: bool mask}
    #                             what of a mutated argument may change; default: what the reference changes
    #   ROWS                      names of the arguments whose first axis, like every output's, is the batch; by it a
    #                             `batch_invariant` kernel is held to its word: rows i:i+1 alone, then in the batch
    #   alone(args) -> list of (args of one row alone, slice of its rows in the outputs)
    #                             the same where slicing is not enough (varlen); stands above ROWS
    #   FAR                       a Case whose tensors reach past 2**31 elements; run on GPUs only
    #   REGIONS                   list of ({axis: value or [low, high]}, [names of POINTS in it]) for measured choices;
    #                             default: one winner per op


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_bytes(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()
