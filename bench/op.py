"""One op, one command: the gate, then the roofline, then what it does to a step of a model.

python -m bench.op NAME [--kernel K] [--watch] [--base REV]     while working on a kernel
python -m bench.op --all [--write-choices]                      the table under bench/results/<machine>/

A red gate prints the failing check with its case, and no numbers. Without a GPU only the gate runs, in Triton's
interpreter. Times are medians of CUDA graph replays over rotating inputs; "%" is of the least time that this machine's
own copy bandwidth and bf16 matrix rate, measured in the same run, allow for the bytes and flops of the call.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import gate, header, receipt, watch
from bench.machine import Limits, limits
from bench.slice import Model
from bench.timing import Timing, input_sets, stream_time, time_call
from nanodeploy.ops import machine
from nanodeploy.ops.registry import CHOICES, OPS, Kernel, Op
from nanodeploy.tune import winners

REFERENCE_FLOPS = 1e11  # a reference is timed where it is cheap
BASES = tempfile.TemporaryDirectory(prefix="nanodeploy-base-")  # sources of other revisions; Triton reads them again


@dataclass(frozen=True)
class Row:
    """One kernel at one point."""

    point: str
    kernel: str
    us: float
    spread_us: float
    rate: float  # bytes or flops per second, whichever bounds the call
    unit: str  # "GB/s" or "TFLOP/s"
    percent: float  # of the machine's limit
    note: str
    num_bytes: int = 0  # the least that a call can do with
    flops: int = 0

    def cells(self) -> list[str]:
        rate = f"{self.rate / (1e9 if self.unit == 'GB/s' else 1e12):.0f} {self.unit}"
        return [self.point, self.kernel, f"{self.us:.2f}", rate, f"{self.percent:.0f} %", self.note]


HEADINGS = ["point", "kernel", "us", "rate", "limit", ""]


def make_row(point: str, kernel: str, op: Op, case: Any, timing: Timing, ceilings: Limits) -> Row:
    cost = op.cases.cost(case)
    seconds = timing.us / 1e6
    bytes_s, flops_s = cost.num_bytes / ceilings.copy_bytes_per_s, cost.flops / ceilings.bf16_flops_per_s
    amount, unit = (cost.num_bytes, "GB/s") if bytes_s >= flops_s else (cost.flops, "TFLOP/s")
    notes = [] if timing.from_memory else ["inputs in L2"]
    notes += ["launched from Python"] if timing.how == "stream" else []
    notes += [f"± {timing.spread_us:.1f} us"] if timing.spread_us > 0.05 * timing.us else []
    percent = 100 * max(bytes_s, flops_s) / seconds
    rate, note = amount / seconds, ", ".join(notes)
    return Row(point, kernel, timing.us, timing.spread_us, rate, unit, percent, note, cost.num_bytes, cost.flops)


def roofline(op: Op, contenders: list[Kernel], ceilings: Limits) -> tuple[list[Row], list[str]]:
    """(every contender at every point of the room, remarks). Rows of a point stand together."""
    device = gate.default_device()
    rows: list[Row] = []
    remarks = []
    for point, case in op.cases.POINTS.items():
        cost = op.cases.cost(case)
        sets = input_sets(functools.partial(op.cases.make, case, device), cost.num_bytes)
        for kernel in contenders:
            if not kernel.when(op.cases.of(*sets[0])):
                continue
            try:
                timing = time_call(kernel.fn, sets, cost.num_bytes, graph=kernel.capturable)
            except (RuntimeError, OSError) as error:
                if kernel.requires is None:
                    raise
                remarks.append(f"{kernel.name} at {point}: {kernel.requires} failed: {str(error).splitlines()[0]}")
                continue
            rows.append(make_row(point, kernel.name, op, case, timing, ceilings))
        if cost.flops <= REFERENCE_FLOPS:
            timing = stream_time([functools.partial(op.reference, *sets[0])])
            rows.append(make_row(point, "reference", op, case, timing, ceilings))
        del sets
        torch.cuda.empty_cache()
    return rows, remarks


def at_revision(op: Op, kernel: Kernel, revision: str) -> Kernel:
    """The kernel as its file stood at a git revision, named kernel@revision. The rest of the tree stays as it is."""
    path = Path(kernel.path).relative_to(header.ROOT)
    source = header.git("show", f"{revision}:{path.as_posix()}")
    if source is None:
        raise SystemExit(f"--base {revision}: git has no {path} there.")
    file = Path(BASES.name) / f"{path.stem}_at_base.py"
    file.write_text(source + "\n")
    spec = importlib.util.spec_from_file_location(f"bench_base_{op.name}_{path.stem}", file)
    assert spec and spec.loader
    now = dict(op.kernels)
    del op.kernels[kernel.name]
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        if kernel.name not in op.kernels:
            raise SystemExit(f"--base {revision}: {path} had no kernel {kernel.name} there.")
        return dataclasses.replace(op.kernels[kernel.name], name=f"{kernel.name}@{revision}")
    finally:
        op.kernels.clear()
        op.kernels.update(now)


# ---- reports


@dataclass
class Report:
    """What one run says of one op. Without rows if the gate is red, or there is no GPU."""

    op: str
    verdicts: list[gate.Verdict]
    rows: list[Row] = dataclasses.field(default_factory=list)
    steps: list[Any] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def red(self) -> bool:
        return any(v.failure for v in self.verdicts)

    def to_dict(self) -> dict[str, Any]:
        verdicts = [dataclasses.asdict(v) | {"verdict": v.verdict} for v in self.verdicts]
        parts = {"rows": self.rows, "steps": self.steps}
        return {
            "op": self.op,
            "gate": verdicts,
            **{name: [dataclasses.asdict(x) for x in part] for name, part in parts.items()},
            "remarks": self.remarks,
        }


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Markdown, with columns aligned so that it reads well on a terminal too."""
    widths = [max(len(line[i]) for line in [headings, *rows]) for i in range(len(headings))]

    def line(cells: list[str]) -> str:
        return ("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths)) + " |").rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, rows)])


def step_table(steps: list[Any]) -> str:
    """Each step time beside the choice's own in the same scenario, which stands first."""
    own: dict[str, float] = {}
    lines = []
    for step in steps:
        base = own.setdefault(step.scenario, step.step_ms)
        lines.append(
            [
                step.scenario,
                step.kernel,
                f"{step.slice_us:.0f}",
                f"{step.step_ms:.3f}",
                f"{step.step_ms / base - 1:+.1%}",
            ]
        )
    return table(["step of Qwen3-8B", "kernel", "4 layers, us", "whole step, ms", "change"], lines)


def limits_line(ceilings: Limits) -> str:
    return (
        f"limits measured in this run: copy {ceilings.copy_bytes_per_s / 1e9:.0f} GB/s, "
        f"bf16 product {ceilings.bf16_flops_per_s / 1e12:.0f} TFLOP/s"
    )


def study(op: Op, kernel_name: str | None, base: str | None, count: int) -> Report:
    """Gate and roofline of one op, or of one of its kernels beside the others."""
    report = Report(op.name, gate.gate(op.name, kernel_name, count))
    if report.red or not torch.cuda.is_available():
        return report
    named = [op.kernels[kernel_name]] if kernel_name else list(op.kernels.values())
    past = [at_revision(op, named[0], base)] if base else []
    measure(report, op, [*named, *past, *(k for k in op.kernels.values() if k not in named)])
    return report


def measure(report: Report, op: Op, contenders: list[Kernel]) -> None:
    """The roofline of those that can run here, and a remark on each that cannot."""
    reasons = {kernel.name: gate.why_not(kernel, gate.default_device()) for kernel in contenders}
    report.remarks += [f"{name} is not a contender: {reason}" for name, reason in reasons.items() if reason]
    report.rows, remarks = roofline(op, [k for k in contenders if not reasons[k.name]], limits())
    report.remarks += remarks


def add_slice(report: Report, kernel_names: list[str]) -> None:
    op = OPS[report.op]
    here = [name for name in kernel_names if gate.why_not(op.kernels[name], gate.default_device()) is None]
    report.steps, remarks = Model(gate.default_device()).compare(op.name, here)
    report.remarks += remarks


# ---- choices


def choices(op: Op, rows: list[Row]) -> list[dict[str, Any]]:
    """Rows for nanodeploy/ops/choices, as `nanodeploy tune` makes them. Empty for an op with one contender."""
    us = {(row.kernel, row.point): row.us for row in rows if row.kernel in op.kernels}
    return winners(op, us) if len({kernel for kernel, _ in us}) > 1 else []


def write_choices(reports: list[Report]) -> Path:
    """Replace the rows of these ops in this device's table; the other ops keep theirs."""
    path = CHOICES / f"{machine.key()}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for report in reports:
        known.pop(report.op, None)
        if found := choices(OPS[report.op], report.rows):
            known[report.op] = found
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    return path


# ---- the commands


def run_one(op: Op, args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    report = study(op, args.kernel, args.base, args.cases or gate.QUICK)
    if report.rows:
        add_slice(report, [args.kernel] if args.kernel else list(op.kernels))
    if args.json:
        print(json.dumps({"header": header.header(), **report.to_dict()}, default=str))
        return int(report.red)
    for verdict in report.verdicts:
        print(verdict.lines())
    if report.red:
        print("The gate is red: no numbers.")
        return 1
    if not torch.cuda.is_available():
        print("No roofline and no slice: this machine has no GPU. The gate ran in Triton's interpreter.")
        return 0
    print(f"\n{header.one_line(header.header())}\n{limits_line(limits())}\n")
    print(table(HEADINGS, [row.cells() for row in report.rows]))
    if report.steps:
        print(f"\n{step_table(report.steps)}")
    for remark in report.remarks:
        print(f"({remark})")
    print(f"{time.perf_counter() - begin:.0f} s")
    return 0


def run_all(args: argparse.Namespace) -> int:
    """Every op. Kernels that the receipt of this machine knows as green, unchanged since, are not gated again."""
    on_gpu = torch.cuda.is_available()
    known = receipt.read(machine.key())
    reports = []
    for op in OPS.values():
        print(f"{op.name} ...", file=sys.stderr, flush=True)
        kernels = list(op.kernels.values())
        todo = [k for k in kernels if not receipt.is_green(known, f"{op.name}/{k.name}", Path(k.path))]
        verdicts = [gate.examine(op, k, gate.default_device(), args.cases or gate.QUICK) for k in todo]
        report = Report(op.name, verdicts)
        reports.append(report)
        for verdict in verdicts:
            if not args.json:
                print(verdict.lines(), flush=True)
            if verdict.failure:
                report.remarks.append(f"{verdict.kernel} is red, so it has no numbers")
        red = {v.kernel for v in verdicts if v.failure}
        if on_gpu:
            measure(report, op, [k for k in kernels if k.name not in red])
    if args.json:
        print(json.dumps({"header": header.header(), "ops": [r.to_dict() for r in reports]}, default=str))
    if on_gpu:
        for path in (*write_results(reports), *([write_choices(reports)] if args.write_choices else [])):
            print(f"wrote {path}", file=sys.stderr)
    elif not args.json:
        print("No roofline: this machine has no GPU. The gate ran in Triton's interpreter.")
    return int(any(r.red for r in reports))


def write_results(reports: list[Report]) -> tuple[Path, Path]:
    """ops.md and ops.json of this machine."""
    folder = receipt.RESULTS / machine.key()
    head, ceilings = header.header(), limits()
    numbers = {"limits": dataclasses.asdict(ceilings), "ops": [r.to_dict() for r in reports]}
    header.write_json(folder / "ops.json", numbers)
    parts = ["# Every op, every contender", header.one_line(head), limits_line(ceilings)]
    parts.append("Medians of CUDA graph replays over rotating inputs; limit: the least time at these rates over ours.")
    for report in reports:
        parts += [f"## {report.op}", table(HEADINGS, [row.cells() for row in report.rows])]
        parts += [f"- {remark}" for remark in report.remarks]
    path = folder / "ops.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path, folder / "ops.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.op", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", choices=sorted(OPS), metavar="NAME", help=", ".join(sorted(OPS)))
    parser.add_argument("--kernel", help="gate this one, and time it beside the others; default: all of the op")
    parser.add_argument("--base", metavar="REV", help="also time the kernel's file as of this git revision")
    parser.add_argument("--watch", action="store_true", help="again whenever a file of the room changes; Ctrl-C ends")
    parser.add_argument("--all", action="store_true", help="every op; writes ops.md and ops.json")
    parser.add_argument("--write-choices", action="store_true", help="with --all: the measured table for dispatch")
    parser.add_argument("--cases", type=int, help=f"drawn cases per kernel in the gate; default {gate.QUICK}")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of tables")
    args = parser.parse_args()
    if args.all:
        return run_all(args)
    if not args.op:
        parser.error("name an op, or --all")
    op = OPS[args.op]
    if args.kernel and args.kernel not in op.kernels:
        parser.error(f"{op.name} has no kernel {args.kernel}; there are {', '.join(op.kernels)}")
    if args.base and not args.kernel and len(op.kernels) != 1:
        parser.error("--base wants --kernel: which one to compare with its past?")
    if args.watch:
        arguments = [a for a in sys.argv[1:] if a != "--watch"]
        return watch.watch(Path(op.cases.__file__).parent, arguments)
    return run_one(op, args)


if __name__ == "__main__":
    sys.exit(main())
