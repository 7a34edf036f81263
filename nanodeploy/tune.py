"""`nanodeploy tune`: which kernel of each op is fastest on this GPU, at the shapes that its room names.

Start-up measures nothing. It takes the table that is shipped for the device or, before it, the one that this command
wrote; where there is neither, the first kernel that fits. A kernel that disagrees with the reference at any of these
shapes, or does not run here, is refused, and the others are chosen from. (The whole gate, bench/gate.py, is for those
who write kernels.)
"""

import argparse
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from triton.runtime.errors import TritonError

from nanodeploy import ops  # noqa: F401  loads every room into OPS
from nanodeploy.config import use_compile_caches
from nanodeploy.errors import ConfigError
from nanodeploy.flags import suggest
from nanodeploy.ops import machine, tuned
from nanodeploy.ops.agreement import Truth, call
from nanodeploy.ops.registry import OPS, Kernel, Op
from nanodeploy.ops.timing import input_sets, time_call

FLOAT64_FLOPS = 1e11  # up to this much work the reference also runs on float64 copies


def main(argv: Sequence[str]) -> int:
    """Measure, write the table, say what was chosen. Raises ConfigError without a GPU or for an unknown op."""
    parser = argparse.ArgumentParser(prog="nanodeploy tune", description=__doc__, allow_abbrev=False)
    parser.add_argument("--ops", metavar="NAME,NAME", help=f"default: all that have a choice; {', '.join(sorted(OPS))}")
    names = parser.parse_args(argv).ops
    wanted = [name.strip() for name in names.split(",")] if names else list(OPS)
    for name in wanted:
        if name not in OPS:
            raise ConfigError(f"--ops {name}: no such op.{suggest(name, OPS)} There are {', '.join(sorted(OPS))}.")
    if not torch.cuda.is_available():
        raise ConfigError("nanodeploy tune measures kernels on a GPU, and torch sees none.")
    use_compile_caches()
    found = {}
    for name in wanted:
        if rows := measure(OPS[name], torch.device("cuda")):
            found[name] = rows
            for row in rows:
                where = ", ".join(f"{axis} {value}" for axis, value in row["where"].items()) or "everywhere else"
                beside = ", ".join(f"{kernel} takes {factor:g}x" for kernel, factor in row["slower_by"].items())
                print(f"{name}: {row['kernel']}  ({where}{'; ' + beside if beside else ''})", flush=True)
    print(f"wrote {tuned.write(machine.key(), found)}")
    return 0


def measure(op: Op, device: torch.device) -> list[dict[str, Any]]:
    """The winners of an op on this device; none if there is nothing to choose from."""
    contenders = [kernel for kernel in op.kernels.values() if kernel.needs != "cpu" and kernel.available()]
    if len(contenders) < 2:
        return []
    us: dict[tuple[str, str], float] = {}
    for point, case in op.cases.POINTS.items():
        try:
            times, refused = at_point(op, case, contenders, device)
        except torch.OutOfMemoryError:
            _say(f"{op.name} at {point}: too large for this GPU's memory, left out")
            continue
        finally:
            torch.cuda.empty_cache()
        for name, reason in refused.items():
            _say(f"{op.name}: {name} is refused, at {point}: {reason}")
        contenders = [kernel for kernel in contenders if kernel.name not in refused]
        us |= {(name, point): time for name, time in times.items()}
    standing = {kernel.name for kernel in contenders}
    return winners(op, {(name, point): time for (name, point), time in us.items() if name in standing})


def at_point(
    op: Op, case: Any, contenders: Sequence[Kernel], device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """(microseconds by kernel, reasons by refused kernel) of those that take the case."""
    cost = op.cases.cost(case)
    sets = input_sets(functools.partial(op.cases.make, case, device), cost.num_bytes)
    contenders = [kernel for kernel in contenders if kernel.when(op.cases.of(*sets[0]))]
    truth = Truth(op, case, sets[0], with_float64=cost.flops <= FLOAT64_FLOPS) if contenders else None
    times, refused = {}, {}
    for kernel in contenders:
        assert truth is not None
        try:
            returned, got = call(op, kernel.fn, sets[0])
            complaint = truth.complaint(returned, got) or truth.stray_write(got)
            if complaint is None:
                times[kernel.name] = time_call(kernel.fn, sets, cost.num_bytes, graph=kernel.capturable).us
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError, TritonError) as error:  # too little shared memory, a vendor's missing binary
            complaint = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no word why'}"
        if complaint is not None:
            refused[kernel.name] = complaint
    return times, refused


def winners(op: Op, us: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Rows of a measured table, from microseconds by (kernel, point): in each region of the room, the fastest over its
    points (geometric mean).

    Only kernels that run at all points of a region count. A winner that no CUDA graph can hold is followed by the
    fastest that one can, which dispatch takes while it captures.
    """
    names = list(dict.fromkeys(kernel for kernel, _ in us))
    found = []
    for where, points in getattr(op.cases, "REGIONS", [({}, list(op.cases.POINTS))]):
        means = {
            name: math.exp(sum(math.log(us[name, point]) for point in points) / len(points))
            for name in names
            if all((name, point) in us for point in points)
        }
        ranked = sorted(means, key=lambda name: means[name])
        chosen = [*ranked[:1], *[name for name in ranked if op.kernels[name].capturable][:1]]
        for winner in dict.fromkeys(chosen):
            slower_by = {name: round(means[name] / means[winner], 3) for name in ranked if name != winner}
            found.append({"where": where, "kernel": winner, "slower_by": slower_by})
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
