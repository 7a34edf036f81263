"""The kernel lab: a kernel file that is saved while the server runs is gated, and the server switches to it.

A thread watches nanodeploy/ops and gates what was saved, as it was saved, in a process of its own. All that touches the
engine happens between two of its steps, in `turn` and `step`. A saved kernel runs under guard: where it raises, or now
and then disagrees with the reference on live inputs, what stood in its place before takes over again.
"""

import dataclasses
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from nanodeploy.config import Config
from nanodeploy.errors import ConfigError
from nanodeploy.ops.live import LiveCall, TooLarge
from nanodeploy.ops.registry import OPS, Kernel, Op
from nanodeploy.runtime import saves
from nanodeploy.runtime.saves import ROOMS, Saves
from nanodeploy.wire import LabReport, TokenEvent

POLL_S = 0.3  # between two looks at the files
GATE_TIMEOUT_S = 300.0
CHECK_PERIOD_S = 2.0  # between two steps in which saved kernels are compared with their references
REPORT_PERIOD_S = 0.5
NUM_STEPS = 50  # of a batch size, whose median is its step time
MIN_STEPS = 20  # from which a step time is told in the log
MAX_ATTEMPTS = 50  # kept for /lab
MAX_CASES = 512  # remembered of an op, the latest
REASON_LINES = 12
# The gate of one file, as a child that dies with the engine. It runs in the snapshot's root: all it imports is there.
GATE = """
import runpy, sys
from nanodeploy.runtime.process import die_with
die_with(int(sys.argv[1]))
sys.argv = ["bench.gate", *sys.argv[2:]]
runpy.run_module("bench.gate", run_name="__main__", alter_sys=True)
"""


class LabEngine(Protocol):
    """What the lab needs of runtime.engine.Engine."""

    config: Config
    runner: Any  # runtime.runner.Runner: graphs (None: it runs without), recapture()
    in_flight: Any  # runtime.runner.InFlight, or None

    def step(self) -> list[TokenEvent]: ...
    def busy(self) -> bool: ...
    def reset_prefix_cache(self) -> None: ...


@dataclass
class Attempt:
    """One saved file, what the gate said of it, and what became of it."""

    files: list[str]  # relative to nanodeploy/ops: what was saved and what imports it, in the order of loading
    ops: list[str] = field(default_factory=list)
    kernels: list[str] = field(default_factory=list)  # "op/kernel" that the files register
    time: str = field(default_factory=lambda: datetime.now().isoformat(timespec="seconds"))
    outcome: str = "gating"  # switched, contender, refused, superseded, removed, rolled back
    reason: str = ""
    seconds: float = 0.0  # of the gate
    checks: dict[str, int] = field(default_factory=dict)  # check -> cases that passed
    step_ms: dict[str, dict[str, float]] = field(default_factory=dict)  # batch size -> before, after
    num_live_checks: int = 0

    @property
    def name(self) -> str:
        return ", ".join(self.files)


@dataclass
class Green:
    """What the thread hands over: an attempt whose gate was green, its files, and where they lie."""

    attempt: Attempt
    tree: dict[str, bytes | None]  # the saved files
    root: Path
    taken: threading.Event = field(default_factory=threading.Event)


# ---- gating: a thread and its child processes


class Gatekeeper(threading.Thread):
    """Sees files change and gates them one group at a time. Hands over what is green, and says what is not."""

    def __init__(self, root: Path):
        super().__init__(name="lab", daemon=True)
        self.saves = Saves(root)
        self.running: dict[str, bytes] = saves.read_tree(root)  # what the engine has loaded; replaced as a whole
        self.told: deque[Attempt] = deque()  # ended here: refused or superseded
        self.green: deque[Green] = deque()
        self.current: Attempt | None = None
        self.pending: dict[str, bytes | None] = {}
        self.stopping = threading.Event()
        self.folder = tempfile.TemporaryDirectory(prefix="nanodeploy-lab-", ignore_cleanup_errors=True)
        self.num_snapshots = 0

    def run(self) -> None:
        while not self.stopping.wait(POLL_S):
            self.pending |= self.saves.look()
            while self.pending and not self.stopping.is_set():
                saved, self.pending = self.pending, {}
                for attempt in self.attempts(saved):
                    self.gate(attempt, saved)

    def close(self) -> None:
        """Ends the thread and the gate's process. Snapshots are removed."""
        self.stopping.set()
        if self.is_alive():
            self.join()
        self.folder.cleanup()

    def attempts(self, saved: dict[str, bytes | None]) -> list[Attempt]:
        """The saved files in groups that can only be loaded together. What cannot be gated is refused here."""
        good: dict[str, bytes] = {}
        for name, content in saved.items():
            if content is None:
                self.hand_over(Green(Attempt([short(name)]), {name: None}, Path()))
                continue
            try:
                saves.candidates(name, content)
            except SyntaxError as error:
                self.refuse(Attempt([short(name)]), f"line {error.lineno}: {error.msg}")
            except ValueError as error:
                self.refuse(Attempt([short(name)]), f"it cannot be read: {error}")
            else:
                good[name] = content
        found = []
        for group in saves.groups(good, {**self.running, **good}):
            attempt = Attempt([short(name) for name in group])
            fixed = [name for name in group if not saves.is_kernel_file(name)]
            if fixed:
                which = "it is" if fixed == group else f"{', '.join(map(short, fixed))}, which imports it, is"
                self.refuse(attempt, f"{which} no kernel file: restart the server to use it")
            else:
                found.append(attempt)
        return found

    def gate(self, attempt: Attempt, saved: dict[str, bytes | None]) -> None:
        """Gate every file of an attempt; hand it over if all are green."""
        began = time.monotonic()
        self.current = attempt
        mine = {name: content for file in attempt.files if (content := saved.get(name := ROOMS + file)) is not None}
        self.num_snapshots += 1
        root = Path(self.folder.name).resolve() / str(self.num_snapshots)
        try:
            saves.write_tree({**self.running, **mine}, root)
            reason = self.first_failure(attempt, root, set(mine))
        except OSError as error:
            reason = f"the gate could not be started: {error}"
        attempt.seconds = round(time.monotonic() - began, 1)
        attempt.ops = sorted({name.partition("/")[0] for name in attempt.kernels})
        if reason is None and not attempt.kernels:
            reason = "it registers no kernel"
        if mine.keys() & self.pending.keys():
            self.refuse(attempt, "it was saved again", "superseded")
        elif reason:
            self.refuse(attempt, reason)
        else:
            self.hand_over(Green(attempt, {**mine}, root))
        if attempt.outcome != "switched":
            shutil.rmtree(root, ignore_errors=True)
        self.current = None

    def first_failure(self, attempt: Attempt, root: Path, saved: set[str]) -> str | None:
        """Gate the files until one fails, and note what they register."""
        for file in attempt.files:
            verdicts, reason = self.verdicts(root, ROOMS + file, saved)
            for verdict in verdicts:
                attempt.kernels.append(f"{verdict['op']}/{verdict['kernel']}")
                for check, count in verdict["checks"].items():
                    attempt.checks[check] = attempt.checks.get(check, 0) + count
                reason = reason or judge(verdict)
            if reason:
                return reason
        return None

    def verdicts(self, root: Path, file: str, saved: set[str]) -> tuple[list[dict[str, Any]], str | None]:
        """Run the gate on one file of a snapshot: (verdicts, why there are none)."""
        arguments = ["--file", str(root / file), "--json", "--without", "far"]
        command = [sys.executable, "-c", GATE, str(os.getpid()), *arguments]
        out_path, error_path = root / "gate.out", root / "gate.err"
        with out_path.open("w") as out, error_path.open("w") as errors:
            child = subprocess.Popen(command, cwd=root, stdin=subprocess.DEVNULL, stdout=out, stderr=errors)
            deadline = time.monotonic() + GATE_TIMEOUT_S
            try:
                while child.poll() is None and not saved & self.pending.keys():
                    if self.stopping.is_set():
                        return [], "the server is shutting down"
                    if time.monotonic() > deadline:
                        return [], f"the gate did not end in {GATE_TIMEOUT_S:.0f} s"
                    try:
                        child.wait(POLL_S)
                    except subprocess.TimeoutExpired:
                        self.pending |= self.saves.look()
            finally:
                child.kill()
                code = child.wait()
        lines = out_path.read_text(errors="replace").splitlines()
        if code in (0, 1) and lines and lines[-1].startswith("["):
            return json.loads(lines[-1]), None
        return [], last_lines(error_path.read_text(errors="replace")) or f"the gate's process ended with {code}"

    def refuse(self, attempt: Attempt, reason: str, outcome: str = "refused") -> None:
        attempt.outcome, attempt.reason = outcome, reason
        attempt.ops = attempt.ops or [file.partition("/")[0] for file in attempt.files[:1] if "/" in file]
        self.told.append(attempt)

    def hand_over(self, green: Green) -> None:
        """Wait until the engine has taken it: what is gated next must build on it."""
        self.green.append(green)
        while not green.taken.wait(POLL_S) and not self.stopping.is_set():
            pass


def judge(verdict: dict[str, Any]) -> str | None:
    """Why a kernel with this verdict is not to be used; None if it is green."""
    kernel = f"{verdict['op']}/{verdict['kernel']}"
    if verdict["failure"]:
        return last_lines(f"{kernel}: {verdict['failure']}\n{verdict['trace'] or ''}")
    if not verdict["checks"]:
        return f"{kernel} was not gated: {', '.join(sorted(set(verdict['not_run'].values())))}"
    return None


def short(name: str) -> str:
    return name.removeprefix(ROOMS)


def last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-REASON_LINES:])


# ---- a saved kernel in the engine


class Refused(Exception):
    """Why a file that passed the gate is not switched to."""


@dataclass
class Guarded:
    """A saved kernel in the place of what ran before, and what watches over it."""

    op: Op
    kernel: Kernel
    before: Op  # the op as it was, with choices of its own: it runs what the saved kernel does not take or fails at
    attempt: Attempt
    on_gpu: bool
    chance: random.Random
    called: bool = False
    checking: bool = False  # in this step, one call is to be compared with the reference
    num_calls: int = 0  # in this step, outside graphs
    checked_call: int = 0  # which of them
    failure: str | None = None
    unchecked: str | None = None  # why the last comparison did not come about

    def __post_init__(self) -> None:
        self.placed = dataclasses.replace(self.kernel, fn=self.run, when=self.when)

    @property
    def live(self) -> bool:
        """Whether it stands in the op, and no later one in its place."""
        return self.op.kernels.get(self.kernel.name) is self.placed

    def when(self, case: Any) -> bool:
        """What the saved kernel takes, and what its predecessor was chosen for: no case is left without a kernel."""
        return self.takes(case) or self.was_chosen(case)

    def takes(self, case: Any) -> bool:
        try:
            return bool(self.kernel.when(case))
        except Exception as error:  # whatever a saved kernel does wrong must not end the server
            self.failure = self.failure or f"when({case}) raised {type(error).__name__}: {error}"
            return False

    def was_chosen(self, case: Any) -> bool:
        return chosen(self.before, case, self.on_gpu) == self.kernel.name

    def run(self, *args: Any) -> Any:
        self.called = True
        if self.failure or not self.takes(self.op.cases.of(*args)):
            return self.before.run(*args)
        call = None
        if self.checking and not capturing():
            if self.num_calls == self.checked_call:
                call = self.taken_down(args)
            self.num_calls += 1
        try:
            returned = self.kernel.fn(*args)
            if call is not None:
                self.compare(call, returned)
        except Exception as error:  # whatever a saved kernel does wrong must not end the server
            self.failure = f"{type(error).__name__}: {error}"
        return self.before.run(*args) if self.failure else returned

    def taken_down(self, args: tuple[Any, ...]) -> LiveCall | None:
        try:
            return LiveCall(self.op, args, self.chance)
        except TooLarge:
            self.unchecked = "the call was too large for the reference"
        except torch.OutOfMemoryError:
            self.unchecked = "no memory was left for the reference"
        return None

    def compare(self, call: LiveCall, returned: Any) -> None:
        try:
            complaint = call.complaint(returned)
        except torch.OutOfMemoryError:
            self.unchecked = "no memory was left for the reference"
            return
        self.unchecked = None
        self.attempt.num_live_checks += 1
        if complaint:
            self.failure = f"on live inputs, {self.op.cases.of(*call.live)}: {complaint}"

    def begin_check(self) -> None:
        self.checking, self.num_calls = True, 0

    def end_check(self) -> None:
        self.checking = False
        if self.num_calls:
            self.checked_call = self.chance.randrange(self.num_calls)


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def chosen(op: Op, case: Any, on_gpu: bool) -> str | None:
    """The name of what an op takes for a case; None: nothing fits."""
    try:
        return op.choose(case, on_gpu=on_gpu).name
    except ConfigError:
        return None


@dataclass
class Switch:
    """Saved files that the engine has loaded, and what stood in their place."""

    attempt: Attempt
    guards: list[Guarded]
    kernels: list[Kernel | None]  # beside the guards
    favourites: dict[str, str | None]  # op -> its favourite
    modules: dict[str, ModuleType | None]
    files: dict[str, bytes | None]

    @property
    def live(self) -> bool:
        return any(guard.live for guard in self.guards)


def load_modules(files: list[str], root: Path) -> dict[str, ModuleType | None]:
    """Run files of a snapshot as the modules they stand for. Returns what stood there. Whatever they raise comes out,
    and then nothing has changed."""
    before = {saves.module_name(ROOMS + file): sys.modules.get(saves.module_name(ROOMS + file)) for file in files}
    try:
        for file, name in zip(files, before, strict=True):
            spec = importlib.util.spec_from_file_location(name, root / ROOMS / file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            place_modules({name: module})
            spec.loader.exec_module(module)
    except BaseException:
        place_modules(before)
        raise
    return before


def place_modules(modules: dict[str, ModuleType | None]) -> None:
    """Make these what an import finds; None: nothing."""
    for name, module in modules.items():
        package, _, stem = name.rpartition(".")
        if module is None:
            sys.modules.pop(name, None)
            vars(sys.modules[package]).pop(stem, None)
        else:
            sys.modules[name] = module
            setattr(sys.modules[package], stem, module)


def num_decodes(engine: LabEngine) -> int:
    """Of the step in flight, if it is one of decodes alone; else 0."""
    plan = engine.in_flight.plan if engine.in_flight else None
    return 0 if plan is None or plan.chunks else len(plan.decodes)


class StepTimes:
    """The engine's step times, as wall time from the end of one step to the end of the next, by number of decodes."""

    def __init__(self) -> None:
        self.ms: dict[int, deque[float]] = {}
        self.last: float | None = None  # when the last step ended; None: what comes next is not to be counted

    def pause(self) -> None:
        self.last = None

    def end(self, num_decodes: int) -> None:
        """A step has ended; 0 decodes: it was of another kind."""
        now = time.perf_counter()
        if self.last is not None and num_decodes:
            self.ms.setdefault(num_decodes, deque(maxlen=NUM_STEPS)).append(1e3 * (now - self.last))
        self.last = now

    def medians(self, at_least: int = 1) -> dict[str, float]:
        """Batch size -> ms, of sizes that were seen so often."""
        return {str(n): round(statistics.median(ms), 3) for n, ms in sorted(self.ms.items()) if len(ms) >= at_least}


# ---- the lab itself


class Lab:
    """What the engine's loop calls: `turn` between steps, `step` in place of the engine's own. Not thread-safe."""

    def __init__(self, root: Path | None = None):
        """`root` holds nanodeploy/ and bench/; default: where this file came from. Raises ConfigError without bench."""
        root = root or Path(__file__).resolve().parents[2]
        if not (root / "bench" / "gate.py").exists():
            raise ConfigError(f"--lab needs a source checkout, with bench/ beside nanodeploy/; {root} has none.")
        if importlib.util.find_spec("hypothesis") is None:
            raise ConfigError("--lab needs the package hypothesis: install nanodeploy with its extra, dev.")
        self.gatekeeper = Gatekeeper(root)
        self.history: deque[Attempt] = deque(maxlen=MAX_ATTEMPTS)
        self.switches: list[Switch] = []
        self.seen: dict[str, dict[Any, None]] = {}  # op -> (on GPU, case) that the engine has wanted a kernel for
        self.in_use: dict[str, dict[str, str]] = {}  # op -> kernel -> reason
        self.steps = StepTimes()
        self.latest: Attempt | None = None  # the switch that step times are compared across
        self.told_steps = False
        self.checked_at = -math.inf
        self.lines: list[str] = []
        self.reported_at = -math.inf
        self.num_rollbacks = 0
        self.chance = random.Random(0)

    def open(self, engine: LabEngine) -> None:
        """Start watching, on behalf of an engine that is ready."""
        self.engine = engine
        self.on_gpu = engine.config.device == "cuda"
        count = len(self.gatekeeper.saves.known)
        self.lines.append(f"lab: watching the {count} files of {ROOMS}; /lab says what became of each save")
        self.gatekeeper.start()

    def close(self) -> None:
        self.gatekeeper.close()

    # -- what the loop calls

    def turn(self) -> LabReport | None:
        """Take what the gate has decided and undo what failed. Returns news for the front end: at once when something
        happened, else every half second."""
        while self.gatekeeper.told:
            self.tell(self.gatekeeper.told.popleft())
        while self.gatekeeper.green:
            green = self.gatekeeper.green.popleft()
            try:
                if green.attempt.kernels:
                    self.switch(green)
                else:
                    self.remove(green)
            except Refused as reason:
                green.attempt.outcome, green.attempt.reason = "refused", str(reason)
                self.tell(green.attempt)
            green.taken.set()
        for switch in list(self.switches):
            if failure := next((guard.failure for guard in switch.guards if guard.failure and guard.live), None):
                self.roll_back(switch, failure)
        if not self.engine.busy():
            self.steps.pause()
        now = time.monotonic()
        if not self.lines and now < self.reported_at + REPORT_PERIOD_S:
            return None
        self.reported_at = now
        self.compare_steps()
        lines, self.lines = self.lines, []
        return LabReport(lines, self.state())

    def step(self) -> list[TokenEvent]:
        """The engine's step. While a saved kernel is in place, now and then one without graphs, in which it is
        compared with its reference."""
        engine = self.engine
        waited_for = num_decodes(engine)
        guards = [
            guard
            for switch in self.switches
            for guard in switch.guards
            if guard.live and (guard.called or switch.attempt.outcome == "switched")
        ]
        checking = bool(guards) and time.monotonic() > self.checked_at + CHECK_PERIOD_S
        events = self.checking_step(guards) if checking else engine.step()
        if checking or self.gatekeeper.current:  # slower than others
            self.steps.pause()
        else:
            launched = num_decodes(engine)
            self.steps.end(launched if launched == waited_for else 0)
        return events

    def checking_step(self, guards: list[Guarded]) -> list[TokenEvent]:
        runner = self.engine.runner
        self.checked_at = time.monotonic()
        for guard in guards:
            guard.begin_check()
        graphs, runner.graphs = runner.graphs, None
        try:
            return self.engine.step()
        finally:
            runner.graphs = graphs
            for guard in guards:
                guard.end_check()

    # -- switching and back

    def switch(self, green: Green) -> None:
        """Load the files and put their kernels in place. Raises Refused; then nothing has changed."""
        attempt = green.attempt
        self.note_cases()
        registered = {op.name: dict(op.kernels) for op in OPS.values()}
        try:
            modules = load_modules(attempt.files, green.root)
            found = [
                (op, kernel)
                for op in OPS.values()
                for name, kernel in op.kernels.items()
                if kernel is not registered[op.name].get(name)
            ]
        except Exception as error:  # it passed the gate, in another process; whatever goes wrong in this one
            raise Refused(f"loading it raised {type(error).__name__}: {error}") from error
        finally:
            for op in OPS.values():
                op.kernels.clear()
                op.kernels.update(registered[op.name])
                op.decided.clear()
        if reason := next(filter(None, (unfit(op, kernel) for op, kernel in found)), None):
            place_modules(modules)
            raise Refused(reason)

        ops = {op.name: op for op, _ in found}
        befores = {name: dataclasses.replace(op, kernels=dict(op.kernels), decided={}) for name, op in ops.items()}
        switch = Switch(attempt, [], [], {}, modules, {})
        for op, kernel in found:
            switch.guards.append(Guarded(op, kernel, befores[op.name], attempt, self.on_gpu, self.chance))
            switch.kernels.append(op.kernels.get(kernel.name))
        used = {name: {chosen(op, case, gpu) for gpu, case in self.seen.get(name, ())} for name, op in ops.items()}
        for guard in switch.guards:
            guard.op.put(guard.kernel.name, guard.placed)
        for name, op in ops.items():
            switch.favourites[name] = op.favourite
            names = [kernel.name for its_op, kernel in found if its_op is op]
            if not used[name].intersection(names):  # nothing that ran before: what was saved last is what is wanted
                op.favourite = names[-1]
        switch.files = {name: self.gatekeeper.running.get(name) for name in green.tree}
        self.run_files(green.tree)
        self.switches.append(switch)
        self.history.append(attempt)
        chosen_now = [guard for guard in switch.guards if self.is_chosen(guard)]
        if chosen_now:
            attempt.outcome = "switched"
            self.new_kernels(attempt)
            names = [f"{guard.op.name}/{guard.kernel.name}" for guard in chosen_now]
            self.lines.append(f"lab: {attempt.name} green in {attempt.seconds} s; switched to {', '.join(names)}")
        else:
            attempt.outcome = "contender"
            attempt.reason = "; ".join(dict.fromkeys(self.why_not(guard) for guard in switch.guards))
            self.lines.append(f"lab: {attempt.name} green in {attempt.seconds} s; not in use: {attempt.reason}")

    def note_cases(self) -> None:
        """Remember what the engine has wanted kernels for: clearing choices forgets it."""
        for op in OPS.values():
            seen = self.seen.setdefault(op.name, {})
            seen.update(dict.fromkeys(op.decided))
            for key in list(seen)[:-MAX_CASES]:
                del seen[key]

    def is_chosen(self, guard: Guarded) -> bool:
        """Whether the saved kernel itself is what the op takes, for some case that came."""
        return any(
            guard.takes(case) and chosen(guard.op, case, gpu) == guard.kernel.name
            for gpu, case in self.seen.get(guard.op.name, ())
        )

    def why_not(self, guard: Guarded) -> str:
        """Why a saved kernel is not in use."""
        op, name = guard.op, guard.kernel.name
        seen = self.seen.get(op.name)
        if not seen:
            return f"the engine has not called {op.name} yet"
        if op.override and op.override != name:
            return f"--kernels fixes {op.name}={op.override}"
        if not self.on_gpu and guard.kernel.needs != "cpu":
            return f"on a CPU the engine runs the reference of {op.name}; the gate ran {name} in Triton's interpreter"
        takes = any(guard.takes(case) for _, case in seen)
        return f"{name} takes none of the cases that {op.name} had" if not takes else f"{op.name} takes another kernel"

    def remove(self, green: Green) -> None:
        """A file is gone. What came with it goes, too; what the server started with stays."""
        (file,) = green.attempt.files
        self.history.append(green.attempt)
        green.attempt.outcome = "removed"
        green.attempt.ops = [file.partition("/")[0]] if "/" in file else []
        mine = [switch for switch in self.switches if file in switch.attempt.files and switch.live]
        first = next((i for i, switch in enumerate(self.switches) if switch.files.get(ROOMS + file, b"") is None), None)
        if mine and first is not None:
            for switch in [s for s in reversed(self.switches[first:]) if file in s.attempt.files]:
                self.undo(switch)
            self.lines.append(f"lab: {file} removed; back to what ran before")
            return
        is_loaded = ROOMS + file in self.gatekeeper.running
        green.attempt.reason = "what is loaded of it stays until a restart" if is_loaded else "nothing of it was loaded"
        self.lines.append(f"lab: {file} removed; {green.attempt.reason}")

    def roll_back(self, switch: Switch, failure: str) -> None:
        """A saved kernel failed. What it wrote into pages that others may share is forgotten."""
        self.undo(switch)
        self.engine.reset_prefix_cache()
        self.num_rollbacks += 1
        switch.attempt.outcome, switch.attempt.reason = "rolled back", failure
        self.lines.append(f"lab: {switch.attempt.name} rolled back: {' '.join(failure.splitlines()[:2])}")

    def undo(self, switch: Switch) -> None:
        """Put back what stood before."""
        self.note_cases()
        for guard, kernel in zip(switch.guards, switch.kernels, strict=True):
            if guard.live:
                guard.op.put(guard.kernel.name, kernel)
            if guard.op.favourite == guard.kernel.name:
                guard.op.favourite = switch.favourites[guard.op.name]
        place_modules(switch.modules)
        self.run_files(switch.files)
        self.switches.remove(switch)
        self.new_kernels(None)

    def run_files(self, files: Mapping[str, bytes | None]) -> None:
        """Note that the engine now runs these files: what is gated next is gated beside them."""
        running = {**self.gatekeeper.running, **files}
        self.gatekeeper.running = {name: content for name, content in running.items() if content is not None}

    def new_kernels(self, attempt: Attempt | None) -> None:
        """The kernels have changed: graphs are captured again when they are next wanted, step times begin anew."""
        if attempt:
            attempt.step_ms = {size: {"before": ms} for size, ms in self.steps.medians(MIN_STEPS).items()}
        self.latest, self.told_steps = attempt, False
        self.steps = StepTimes()
        self.checked_at = -math.inf
        self.engine.runner.recapture()

    # -- what is told

    def tell(self, attempt: Attempt) -> None:
        self.history.append(attempt)
        seconds = f" after {attempt.seconds} s" if attempt.seconds else ""
        reason = " ".join(line.strip() for line in attempt.reason.splitlines()[-2:])
        self.lines.append(f"lab: {attempt.name} {attempt.outcome}{seconds}: {reason}")

    def compare_steps(self) -> None:
        """Note step times since the latest switch; once there are enough, say them beside those before it."""
        if self.latest is None:
            return
        for size, ms in self.steps.medians(MIN_STEPS).items():
            self.latest.step_ms.setdefault(size, {})["after"] = ms
        both = {size: t for size, t in self.latest.step_ms.items() if len(t) == 2}
        if both and not self.told_steps:
            self.told_steps = True
            times = ", ".join(f"batch {size} step {t['before']:.2f} -> {t['after']:.2f} ms" for size, t in both.items())
            self.lines.append(f"lab: {self.latest.name}: {times}")

    def state(self) -> dict[str, Any]:
        """What /lab shows."""
        current = self.gatekeeper.current
        guards = [guard for switch in self.switches for guard in switch.guards if guard.live]
        ops: dict[str, Any] = {}
        for name, op in sorted(OPS.items()):
            if op.decided:
                self.in_use[name] = {choice.name: choice.reason for choice in list(op.decided.values())}
            ops[name] = {
                "in_use": self.in_use.get(name, {}),
                "saved": [g.kernel.name for g in guards if g.op is op],
                "not_checked": next((g.unchecked for g in guards if g.op is op and g.unchecked), None),
                "history": [dataclasses.asdict(attempt) for attempt in self.history if name in attempt.ops],
            }
        return {
            "watching": ROOMS,
            "gating": None if current is None else current.files,
            "step_ms": self.steps.medians(),
            "rollbacks": self.num_rollbacks,
            "ops": ops,
            "other": [dataclasses.asdict(attempt) for attempt in self.history if not set(attempt.ops) & ops.keys()],
        }


def unfit(op: Op, kernel: Kernel) -> str | None:
    """Why a kernel cannot stand where its predecessor does; None if it can."""
    before = op.kernels.get(kernel.name)
    if before is None:
        return None
    if op.deterministic and kernel.order != before.order:
        return f"--deterministic: {kernel.name} summed in the order {before.order}, now in {kernel.order}"
    if before.capturable and not kernel.capturable:
        return f"{kernel.name} says capturable=False now, and the server's CUDA graphs want it"
    return None
