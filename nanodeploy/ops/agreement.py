"""What it means that a kernel agrees with its op's reference. The gate holds kernels to it, and so does the kernel lab.

The error budget comes from the reference itself: how far it is from its own run on float64 copies of the inputs.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.registry import Op

INNER = 64 * torch.finfo(torch.float32).eps
NARROW = 16
CHUNK = 2**26  # elements compared at a time, so that float64 copies stay small
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def disagreement(name: str, got: Tensor, ref: Tensor, truth: Tensor | None, inner: float = INNER) -> str | None:
    """A complaint if `got` is further from the truth than the reference's own error allows, else None.

    truth is the reference run on float64 copies of the same inputs; ref ran in the working dtype, so ref - truth is the
    error that the op's own definition makes there. A kernel may sum in another order and round an intermediate to
    the working dtype, which costs about as much again; it may not be worse in kind:
      each element:  |got - truth| <= 3 max|ref - truth| of its row + eps rms(truth) of its row + inner (rms + |truth|)
      the whole:     ||got - truth|| <= 2 ||ref - truth|| + (eps/4 + inner) ||truth||
    The first line catches one wrong element, the second a small error everywhere. A row is the last axis: rows may
    differ in scale by orders of magnitude. eps, the dtype's spacing at 1, leaves room where the reference happens to be
    exact. inner, by default 64 spacings of fp32, is for the arithmetic inside: what a whole row shares (as a norm's
    scale), and a softmax that multiplies the rounding of its scores by their size. It matters where the dtype is fp32.
    Rows narrower than NARROW are judged as one row: in a few elements the reference may happen to be near the truth.
    Integers must be equal; NaN and infinities must stand in the same places.
    truth None (tensors too large for float64): ref stands for it, with 4 eps rms + eps |ref| and eps ||ref||.
    """
    if got.shape != ref.shape or got.dtype != ref.dtype:
        return f"{name} is {got.dtype} {tuple(got.shape)}; the reference gives {ref.dtype} {tuple(ref.shape)}"
    if got.numel() == 0:
        return None
    width = got.shape[-1] if got.ndim else 1
    if width < NARROW and got.numel() <= CHUNK:
        width = got.numel()
    tensors = [t.reshape(-1, width) for t in ((got, ref) if truth is None else (got, ref, truth))]
    eps = torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
    sums = torch.zeros(3, dtype=torch.float64, device=got.device)  # of error^2, (ref - truth)^2, truth^2
    rows_at_once = max(1, CHUNK // width)
    for first in range(0, tensors[0].shape[0], rows_at_once):
        part = [t[first : first + rows_at_once] for t in tensors]
        say = functools.partial(_complaint, name, part, first * width, got.shape)
        if not got.is_floating_point():
            if (wrong := part[0] != part[1]).any():
                return say(wrong, "differ from the reference")
            continue
        g, r, known = (part[i].double() for i in (0, 1, -1))
        for kind, is_kind in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
            if (wrong := is_kind(g) != is_kind(r)).any():
                return say(wrong, f"are {kind} in one, not in the other")
        finite = r.isfinite() & known.isfinite()
        g, r, known = (torch.where(finite, t, 0) for t in (g, r, known))
        error, own = (g - known).abs(), (r - known).abs()
        rms = known.square().mean(-1, keepdim=True).sqrt()
        if truth is None:
            allowed = eps * known.abs() + 4 * eps * rms
        else:
            allowed = 3 * own.amax(-1, keepdim=True) + eps * rms + inner * (rms + known.abs())
        if (wrong := error > allowed).any():
            return say(wrong, "are outside the error budget", error, allowed)
        sums += torch.stack([t.square().sum() for t in (error, own, known)])
    error_norm, own_norm, truth_norm = sums.sqrt().tolist()
    budget = eps * truth_norm if truth is None else 2 * own_norm + (eps / 4 + inner) * truth_norm
    if error_norm > budget:
        return f"{name}: each element is within its budget, but ||error|| {error_norm:.3e} exceeds {budget:.3e}"
    return None


def _complaint(
    name: str,
    part: list[Tensor],
    offset: int,
    shape: torch.Size,
    wrong: Tensor,
    what: str,
    error: Tensor | None = None,
    allowed: Tensor | None = None,
) -> str:
    """How many elements are wrong, and the worst (without an error to go by: the first) with its values."""
    severity = wrong.int() if error is None or allowed is None else torch.where(wrong, error - allowed, -torch.inf)
    flat = int(severity.flatten().argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(offset + flat), shape)]
    values = ", ".join(f"{who} {t.flatten()[flat].item():.7g}" for who, t in zip(("got", "reference", "truth"), part))
    if error is not None and allowed is not None:
        values += f"; error {error.flatten()[flat].item():.3e}, allowed {allowed.flatten()[flat].item():.3e}"
    return f"{name}: {int(wrong.sum())} of {wrong.numel()} elements {what}, as at {index}: {values}"


def call(op: Op, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, dict[str, Tensor]]:
    """Run on copies of what the op mutates. Returns (what fn returned, everything it made: outputs and mutated)."""
    written = [(name, args[index]) for index, name in enumerate(names(op)) if name in op.mutates]
    mutated = {name: copy(arg) for name, arg in written if arg is not None}
    returned = fn(*(mutated.get(name, arg) for name, arg in zip(names(op), args)))
    return returned, outputs(returned) | mutated


def outputs(returned: Any) -> dict[str, Tensor]:
    """What an op returned, by name: nothing, `out`, or `out[0]`, `out[1]`, ..."""
    if isinstance(returned, (tuple, list)):
        return {f"out[{i}]": tensor for i, tensor in enumerate(returned)}
    return {} if returned is None else {"out": returned}


def names(op: Op) -> tuple[str, ...]:
    """The op's argument names, in order."""
    return tuple(inspect.signature(op.reference).parameters)


def copy(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that NaN equals itself."""
    return tensor.view(BITS[tensor.element_size()])


def wide(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Floating tensors as float64."""
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


@dataclass
class Truth:
    """What one call should have given: the reference in the working dtype, and on float64 inputs."""

    op: Op
    case: Any
    args: tuple[Any, ...]
    with_float64: bool = True
    returned: Any = None
    ref: dict[str, Tensor] = field(default_factory=dict)
    truth: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        self.returned, self.ref = call(self.op, self.op.reference, self.args)
        # An op whose outputs are all judged by the room's own `agrees` needs no budget.
        if self.with_float64 and not hasattr(self.op.cases, "agrees"):
            self.truth = call(self.op, self.op.reference, wide(self.args))[1]

    def complaint(self, returned: Any, got: dict[str, Tensor]) -> str | None:
        """The first thing wrong with a kernel's result, by the room's `agrees` or by the error budget."""
        if got.keys() != self.ref.keys():
            return f"returned {', '.join(got)}; the reference returns {', '.join(self.ref)}"
        agrees = getattr(self.op.cases, "agrees", None)
        if agrees is not None:
            return agrees(self.args, returned, self.returned, self.case)
        judged: dict[str, str | None] = {}
        inner = getattr(self.op.cases, "INNER", INNER)
        if hasattr(self.op.cases, "agrees_written"):
            judged = self.op.cases.agrees_written(self.args, got, self.ref, self.case)
        for name, tensor in got.items():
            truth = self.truth[name] if self.truth else None
            complaint = judged[name] if name in judged else disagreement(name, tensor, self.ref[name], truth, inner)
            if complaint:
                return complaint
        return None

    def stray_write(self, got: dict[str, Tensor]) -> str | None:
        """What of a mutated argument changed although the room (or else the reference) does not write it."""
        declared = self.op.cases.owned(self.case, self.args) if hasattr(self.op.cases, "owned") else {}
        for name in self.op.mutates:
            if name not in got:  # an optional argument that is not there
                continue
            before = bits(self.args[names(self.op).index(name)])
            after = bits(got[name])
            may_change = declared[name] if name in declared else bits(self.ref[name]) != before
            stray = (after != before) & ~may_change
            if stray.any():
                at = [int(i) for i in torch.unravel_index(stray.flatten().int().argmax(), stray.shape)]
                return f"poison: wrote {int(stray.sum())} elements of {name} that are not its own, as at {at}"
        return None


def alone(op: Op, args: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], slice]]:
    """Every row of a call as a call of its own, with the place of its result in the batch's."""
    if hasattr(op.cases, "alone"):
        return op.cases.alone(args)
    split = [name in op.cases.ROWS for name in names(op)]
    num_rows = args[split.index(True)].shape[0]
    return [
        (tuple(a[i : i + 1] if s and a is not None else a for a, s in zip(args, split)), slice(i, i + 1))
        for i in range(num_rows)
    ]
