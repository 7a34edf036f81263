"""The gate: what every kernel of every op must pass before anybody times it. tests/ops runs the same checks.

python -m bench.gate OP [--kernel K] [--cases N]    the verdict on one op's kernels
python -m bench.gate --file PATH                    the verdict on the kernels of one file
python -m bench.gate --all                          all ops; on a GPU it writes bench/results/<machine>/gate.json
python -m bench.gate --changed                      names the kernels that changed since the newest receipt

Without a GPU the kernels run in Triton's interpreter, on small cases.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench import interpret, receipt  # noqa: F401  before anything that imports triton
from bench.header import ROOT
from nanodeploy import ops  # noqa: F401  loads every room into OPS
from nanodeploy.config import cache_dir, triton_interpret
from nanodeploy.ops import machine
from nanodeploy.ops.agreement import Truth, alone, bits, call, names, outputs
from nanodeploy.ops.registry import OPS, Kernel, Op

QUICK, FULL = 16, 48  # drawn cases: while working on a kernel, and for the receipt
SIZES = ("num_tokens", "num_seqs")  # the fields of a Case that vary between the calls of a running engine
TIMEOUT_S = 900  # for one process of --all


# ---- running one kernel


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN (integers: their largest value), so that what was never written shows."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # determinism is not what is wanted here, nor any word about it
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


class CountingBackend:
    """A torch.compile backend that counts how often it is asked to compile."""

    def __init__(self, name: str):
        self.name, self.count = name, 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return torch._dynamo.lookup_backend(self.name)(graph, inputs)


class Naming:
    """Adds the case to whatever error leaves the block."""

    def __init__(self, check: str, case: Any, seed: int):
        self.note = f"check {check}, case {case}, seed {seed}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.add_note(self.note)


@contextlib.contextmanager
def forced(op: Op, kernel_name: str | None) -> Iterator[None]:
    """Inside, the op runs this kernel ("reference": the reference; None: what it would choose by itself)."""
    before = op.override
    op.override = kernel_name
    op.decided.clear()
    try:
        yield
    finally:
        op.override = before
        op.decided.clear()


def open_case(case: Any) -> Any:
    """The case without what only the host knows, so that `make` draws it from its seed."""
    unknown = {f.name: None for f in dataclasses.fields(case) if f.default is None}
    return dataclasses.replace(case, **unknown)


# ---- the checks. Each raises AssertionError, or lets a kernel's own error out.


def agreement(op: Op, kernel: Kernel, case: Any, device: torch.device, seed: int) -> None:
    """Right on poisoned memory, in its outputs and in what it mutates; inputs and others' slots stay as they are."""
    args = op.cases.make(case, device, seed)
    inputs = {name: a for name, a in zip(names(op), args) if isinstance(a, Tensor) and name not in op.mutates}
    before = {name: a.clone() for name, a in inputs.items()}
    with poisoned_memory():
        returned, got = call(op, kernel.fn, args)
    for name, tensor in inputs.items():
        assert torch.equal(bits(tensor), bits(before[name])), f"wrote into its input {name}"
    expected = Truth(op, case, args)
    assert (stray := expected.stray_write(got)) is None, stray
    complaint = expected.complaint(returned, got)
    if complaint and "NaN" in complaint:
        complaint = f"poison: fresh memory and slots of nobody held NaN, and some was read or returned. {complaint}"
    assert complaint is None, complaint


def laws(op: Op, kernel: Kernel, case: Any, device: torch.device, seed: int) -> None:
    """The room's own laws."""
    for law in op.cases.LAWS:
        with Naming(law.__name__, case, seed):
            law(kernel.fn, case, device, seed)


def invariance(op: Op, kernel: Kernel, case: Any, device: torch.device, seed: int) -> None:
    """A row's bits are the same alone and in the batch. The first, the last and two rows between are tried."""
    args = op.cases.make(case, device, seed)
    rows = alone(op, args)
    if not rows:
        return
    _, whole = call(op, kernel.fn, args)
    for index in sorted({0, len(rows) // 3, 2 * len(rows) // 3, len(rows) - 1}):
        one_args, place = rows[index]
        if not kernel.when(op.cases.of(*one_args)):
            continue
        for name, one in call(op, kernel.fn, one_args)[1].items():
            same = torch.equal(bits(one.contiguous()), bits(whole[name][place].contiguous()))
            assert same, f"{name} of row {index} of {len(rows)} has other bits alone than in the batch"


def capture(op: Op, kernel: Kernel, case: Any, device: torch.device, seed: int) -> None:
    """Captured once in a CUDA graph and replayed with other values, lengths and pages, it is as right as eager."""
    first = op.cases.make(case, device, seed)
    other_case = open_case(case)
    other = op.cases.make(other_case, device, seed + 1)
    static = op.cases.make(case, device, seed)
    for name, a, b in zip(names(op), first, other):
        same = a.shape == b.shape and a.stride() == b.stride() if isinstance(a, Tensor) else a == b
        assert same, f"cases.make: {name} has another shape under another seed, so no graph can be replayed"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        kernel.fn(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = kernel.fn(*static)
    expected = {id(args): Truth(op, c, args) for c, args in ((case, first), (other_case, other))}
    for replay, args in enumerate((other, first, other)):
        for static_arg, arg in zip(static, args):
            if isinstance(arg, Tensor):
                static_arg.copy_(arg)
        for out in outputs(returned).values():
            out.fill_(torch.nan if out.is_floating_point() else -1)
        graph.replay()
        got = outputs(returned) | {n: a for n, a in zip(names(op), static) if n in op.mutates and a is not None}
        complaint = expected[id(args)].complaint(returned, got)
        assert complaint is None, f"replay {replay} of a CUDA graph: {complaint}"


def opcheck(op: Op, args: tuple[Any, ...]) -> None:
    """torch.library.opcheck, but for the test that no input changes where one is of fp8: torch cannot compare those."""
    has_fp8 = any(isinstance(a, Tensor) and a.dtype == torch.float8_e4m3fn for a in args)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op.torch_op, args, test_utils=tests[1:] if has_fp8 else tests)


def compiler(op: Op, kernel: Kernel, case: Any, device: torch.device, seed: int) -> None:
    """torch.library.opcheck; torch.compile takes it whole, and takes a second size without compiling again."""
    bigger = op.cases.make(case, device, seed)
    sizes = {name: getattr(case, name) - 1 for name in SIZES if hasattr(case, name)}
    smaller = op.cases.make(dataclasses.replace(open_case(case), **sizes), device, seed)
    torch._dynamo.reset()
    # By default two axes of one length are taken for one axis, and a call where they differ compiles again.
    with forced(op, kernel.name), torch.fx.experimental._config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        opcheck(op, bigger)
        backend = CountingBackend("inductor" if device.type == "cuda" else "aot_eager")
        compiled = torch.compile(lambda *args: op(*args), backend=backend, fullgraph=True, dynamic=True)
        call(op, compiled, bigger)
        once = backend.count
        result = call(op, compiled, smaller)
        assert backend.count == once, f"torch.compile compiled again for {op.cases.of(*smaller)}"
    complaint = Truth(op, op.cases.of(*smaller), smaller).complaint(*result)
    assert complaint is None, f"compiled: {complaint}"
    torch._dynamo.reset()


def far(op: Op, kernel: Kernel, case: Any, device: torch.device, seed: int) -> None:
    """Addresses past 2**31 elements. No float64 here: the reference alone fills much of the memory."""
    with _one_at_a_time():
        args = op.cases.make(case, device, seed)
        returned, got = call(op, kernel.fn, args)
        expected = Truth(op, case, args, with_float64=False)
        assert (stray := expected.stray_write(got)) is None, stray
        complaint = expected.complaint(returned, got)
        del args, returned, got, expected
        torch.cuda.empty_cache()
    assert complaint is None, complaint


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Gates of several ops run beside each other; what fills the GPU's memory takes turns."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / "gate.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# ---- which cases, which kernels


def why_not(kernel: Kernel, device: torch.device) -> str | None:
    """Why this kernel cannot run here; None if it can."""
    if kernel.requires and importlib.util.find_spec(kernel.requires) is None:
        return f"{kernel.requires} is not installed"
    if device.type == "cuda" or kernel.needs == "cpu":
        return None if kernel.available() else f"needs {kernel.needs}"
    if kernel.requires or not kernel.interpretable:
        return "needs a GPU: Triton's interpreter cannot run it"
    return None if triton_interpret() else "needs a GPU, or TRITON_INTERPRET=1"


def cases(op: Op, kernel: Kernel, device: torch.device) -> st.SearchStrategy:
    """What the kernel takes, drawn by Hypothesis."""
    return op.cases.strategy(st, small=device.type != "cuda").filter(kernel.when)


def draw(strategy: st.SearchStrategy, count: int, op: Op) -> list[Any]:
    """`count` distinct cases (fewer if there are fewer), the same in every run, cheapest first.

    The first that fails is then small already. Shrinking is not for a GPU, where one bad access ends the process.
    """
    seen: dict[Any, None] = {}

    @settings(
        max_examples=4 * count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Any) -> None:
        if len(seen) < count:
            seen[case] = None

    collect()
    return sorted(seen, key=lambda case: op.cases.cost(case).num_bytes)


def has_two_sizes(case: Any) -> bool:
    """Whether each axis that varies is long enough for `compiler`: 0 and 1 are sizes that torch.compile singles out."""
    return all(getattr(case, name) >= 3 for name in SIZES if hasattr(case, name))


@dataclass
class Verdict:
    """What the gate says of one kernel."""

    op: str
    kernel: str
    file: str
    checks: dict[str, int] = field(default_factory=dict)  # check -> cases that passed
    not_run: dict[str, str] = field(default_factory=dict)  # check -> why
    failure: str | None = None
    trace: str | None = None  # for an error that is not a check's own
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        return "red" if self.failure else "green" if self.checks else "not run"

    def lines(self) -> str:
        """For a terminal."""
        name = f"{self.op}/{self.kernel}"
        if self.verdict == "not run":
            return f"{name}: not run ({', '.join(sorted(set(self.not_run.values())))})"
        passed = ", ".join(f"{check} {count}" for check, count in self.checks.items())
        skipped = "".join(f"\n  not run: {check} ({why})" for check, why in self.not_run.items())
        if not self.failure:
            return f"{name}: green in {self.seconds:.1f} s ({passed}){skipped}"
        trace = f"\n{self.trace}" if self.trace else ""
        return f"{name}: RED\n  {self.failure}{trace}\n  passed before: {passed or 'nothing'}"


def plan(op: Op, kernel: Kernel, device: torch.device, count: int) -> dict[str, list[Any] | str]:
    """Check -> its cases, or why it is not run. The lesser checks reuse cases, whose kernels are compiled by then."""
    drawn = draw(cases(op, kernel, device), count, op)
    some = drawn[:: max(1, len(drawn) // max(4, count // 4))]
    on_gpu = device.type == "cuda"
    todo: dict[str, list[Any] | str] = {"agreement": drawn}
    todo["laws"] = some if getattr(op.cases, "LAWS", None) else "the room has none"
    if not kernel.batch_invariant:
        todo["invariance"] = "not declared"
    elif op.mutates:
        todo["invariance"] = "it returns no rows"
    else:
        has_rows = hasattr(op.cases, "ROWS") or hasattr(op.cases, "alone")
        todo["invariance"] = some if has_rows else "declared, but the room has no ROWS and no alone()"
    if not kernel.capturable:
        todo["capture"] = "declared not capturable"
    else:
        todo["capture"] = some if on_gpu else "no GPU"
    todo["compiler"] = draw(cases(op, kernel, device).filter(has_two_sizes), 1, op)
    points = [case for case in op.cases.POINTS.values() if kernel.when(open_case(case))]
    todo["points"] = points if on_gpu else "no GPU"
    far_case = getattr(op.cases, "FAR", None)
    if far_case is None or not kernel.when(far_case):
        todo["far"] = "the room has no FAR" if far_case is None else "the kernel does not take FAR"
    else:
        todo["far"] = [far_case] if on_gpu else "no GPU"
    return todo


CHECKS: dict[str, Callable[[Op, Kernel, Any, torch.device, int], None]] = {
    "agreement": agreement,
    "laws": laws,
    "invariance": invariance,
    "capture": capture,
    "compiler": compiler,
    "points": agreement,
    "far": far,
}


def examine(
    op: Op,
    kernel: Kernel,
    device: torch.device,
    count: int,
    shard: int = 0,
    num_shards: int = 1,
    without: tuple[str, ...] = (),
) -> Verdict:
    """Every check but those `without` on its cases (on this shard's share of them); stops at the first that fails."""
    verdict = Verdict(op.name, kernel.name, str(Path(kernel.path).relative_to(ROOT)))
    if reason := why_not(kernel, device):
        verdict.not_run = dict.fromkeys(CHECKS, reason)
        return verdict
    begin = time.perf_counter()
    try:
        for check, todo in plan(op, kernel, device, count).items():
            if check in without:
                todo = "left out"
            if isinstance(todo, str):
                verdict.not_run[check] = todo
                continue
            verdict.checks[check] = 0
            for seed in range(shard, len(todo), num_shards):
                with Naming(check, todo[seed], seed):
                    CHECKS[check](op, kernel, todo[seed], device, seed)
                verdict.checks[check] += 1
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
    except Exception as error:  # whatever a kernel does wrong is its verdict
        verdict.failure = "\n  ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
        if not isinstance(error, AssertionError):
            verdict.trace = "".join(traceback.format_tb(error.__traceback__)[-4:])
    verdict.seconds = round(time.perf_counter() - begin, 2)
    return verdict


# ---- the commands


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gate(op_name: str, kernel_name: str | None, count: int, shard: int = 0, num_shards: int = 1) -> list[Verdict]:
    """The verdicts on one kernel, or on all of an op."""
    op = OPS[op_name]
    kernels = [op.kernels[kernel_name]] if kernel_name else list(op.kernels.values())
    return [examine(op, kernel, default_device(), count, shard, num_shards) for kernel in kernels]


def gate_file(path: Path, count: int, without: tuple[str, ...] = ()) -> list[Verdict]:
    """The verdicts on the kernels that a file registers, whichever ops they are of."""
    found = [(op, k) for op in OPS.values() for k in op.kernels.values() if Path(k.path).resolve() == path.resolve()]
    return [examine(op, kernel, default_device(), count, without=without) for op, kernel in found]


def gate_apart(op_name: str, count: int, shard: int, num_shards: int) -> list[Verdict]:
    """`gate` in a process of its own, so that a kernel that kills its CUDA context kills nothing else."""
    share = ["--cases", str(count), "--shard", f"{shard}/{num_shards}"]
    command = [sys.executable, "-m", "bench.gate", op_name, *share, "--json"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        why = f"the gate of {op_name} did not end in {TIMEOUT_S} s: a kernel hangs, or waits for another program"
    else:
        if done.returncode in (0, 1) and done.stdout.strip():
            return [Verdict(**verdict) for verdict in json.loads(done.stdout.splitlines()[-1])]
        why = f"the gate's process ended with {done.returncode}: {done.stderr.strip()[-2000:]}"
    paths = {k.name: str(Path(k.path).relative_to(ROOT)) for k in OPS[op_name].kernels.values()}
    return [Verdict(op_name, name, path, failure=why) for name, path in paths.items()]


def merge(shares: list[Verdict]) -> Verdict:
    """One kernel's verdict from those of its shards."""
    first = next((v for v in shares if v.failure), shares[0])
    checks = {check: sum(v.checks.get(check, 0) for v in shares) for check in CHECKS if check not in first.not_run}
    seconds = round(sum(v.seconds for v in shares), 2)
    return dataclasses.replace(first, checks=checks if any(v.checks for v in shares) else {}, seconds=seconds)


def gate_all(count: int, workers: int, num_shards: int) -> list[Verdict]:
    """Every op, several processes at a time: most of the time is Triton compiling. Seconds are summed over shards."""
    jobs = [(name, count, shard, num_shards) for name in sorted(OPS) for shard in range(num_shards)]
    shares: dict[tuple[str, str], list[Verdict]] = {}
    verdicts = []
    with ThreadPoolExecutor(workers) as pool:
        for found in pool.map(lambda job: gate_apart(*job), jobs):
            for verdict in found:
                mine = shares.setdefault((verdict.op, verdict.kernel), [])
                mine.append(verdict)
                if len(mine) == num_shards:
                    verdicts.append(merge(mine))
                    print(verdicts[-1].lines(), flush=True)
    return verdicts


def write_receipt(verdicts: list[Verdict]) -> Path:
    entries = {
        f"{v.op}/{v.kernel}": dataclasses.asdict(v) | {"verdict": v.verdict, "hashes": receipt.hashes(ROOT / v.file)}
        for v in verdicts
    }
    return receipt.write(machine.key(), torch.cuda.get_device_name(), entries)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("op", nargs="?", choices=sorted(OPS))
    parser.add_argument("--kernel", help="only this kernel")
    parser.add_argument("--file", type=Path, help="only the kernels that this file registers; no OP then")
    parser.add_argument("--without", choices=CHECKS, action="append", default=[], help="with --file: leave out a check")
    parser.add_argument("--cases", type=int, help=f"drawn cases per kernel; default {QUICK}, with --all {FULL}")
    parser.add_argument("--all", action="store_true", help="every op; on a GPU, write the receipt")
    parser.add_argument("--changed", action="store_true", help="what changed since the newest receipt; exit status 0")
    parser.add_argument(
        "--workers", type=int, help="processes at a time with --all; default: half the cores, 8 at most"
    )
    parser.add_argument("--shard", default="0/1", help="I/N: only every N-th case, from case I on")
    parser.add_argument("--json", action="store_true", help="verdicts as one line of JSON")
    args = parser.parse_args()
    if args.changed:
        for line in receipt.changed():
            print(f"warning: {line}", file=sys.stderr)
        return 0
    if args.all:
        workers = args.workers or min(8, max(1, (os.cpu_count() or 1) // 2))
        verdicts = gate_all(args.cases or FULL, workers, num_shards=4 if torch.cuda.is_available() else 1)
        if torch.cuda.is_available():
            print(f"receipt: {write_receipt(verdicts)}")
        return int(any(v.failure for v in verdicts))
    if not args.op and not args.file:
        parser.error("name an op, or --file, or --all, or --changed")
    if args.op and args.kernel and args.kernel not in OPS[args.op].kernels:
        parser.error(f"{args.op} has no kernel {args.kernel}; there are {', '.join(OPS[args.op].kernels)}")
    shard, num_shards = (int(n) for n in args.shard.split("/"))
    if args.file:
        verdicts = gate_file(args.file, args.cases or QUICK, tuple(args.without))
    else:
        verdicts = gate(args.op, args.kernel, args.cases or QUICK, shard, num_shards)
    if args.json:
        print(json.dumps([dataclasses.asdict(v) for v in verdicts]))
    else:
        for verdict in verdicts:
            print(verdict.lines())
    return int(any(v.failure for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
