"""The kernel lab without HTTP: what counts as a save, what is loaded together, what a switch changes and undoes."""

import random
import shutil
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodeploy.config import Config
from nanodeploy.ops.live import LiveCall
from nanodeploy.ops.registry import OPS
from nanodeploy.runtime import saves
from nanodeploy.runtime.lab import Attempt, Gatekeeper, Green, Lab, StepTimes
from nanodeploy.runtime.saves import ROOMS, Saves

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
OP = OPS["add_rms_norm"]
KERNEL = """
import torch

from nanodeploy.ops.add_rms_norm.reference import add_rms_norm


@add_rms_norm.kernel(needs="cpu"{facts})
def {name}(x, residual, weight, eps):
    {first}
    out, total = add_rms_norm.reference(x, residual, weight, eps)
    return out * {factor}, total
"""


# What was saved


@pytest.fixture
def room(tmp_path: Path) -> Path:
    folder = tmp_path / ROOMS / "norm"
    folder.mkdir(parents=True)
    (folder / "old.py").write_text("a = 1\n")
    return folder


def test_a_save_is_told_once_it_rests(tmp_path: Path, room: Path):
    watched = Saves(tmp_path)
    assert watched.look() == {}
    (room / "new.py").write_text("b = 2\n")
    assert watched.look() == {}  # it may still be written
    assert watched.look() == {ROOMS + "norm/new.py": b"b = 2\n"}
    assert watched.look() == {}
    (room / "old.py").write_text("a = 11\n")
    assert watched.look() == {}
    (room / "old.py").write_text("a = 111\n")
    assert watched.look() == {}
    assert watched.look() == {ROOMS + "norm/old.py": b"a = 111\n"}


def test_what_is_gone_is_told_and_what_came_back_in_time_is_not(tmp_path: Path, room: Path):
    watched = Saves(tmp_path)
    (room / "old.py").rename(room / "elsewhere")
    assert watched.look() == {}
    (room / "elsewhere").rename(room / "old.py")
    assert watched.look() == {} and watched.look() == {}
    (room / "old.py").unlink()
    assert watched.look() == {} and watched.look() == {ROOMS + "norm/old.py": None}


@st.composite
def trees(draw):
    """Files of one room that import some of those before them; and which of them are saved."""
    count = draw(st.integers(1, 8))
    uses = [draw(st.sets(st.integers(0, i - 1))) if i else set() for i in range(count)]
    tree = {
        f"{ROOMS}r/f{i}.py": "".join(f"from nanodeploy.ops.r.f{j} import x\n" for j in sorted(used)).encode()
        for i, used in enumerate(uses)
    }
    return tree, uses, draw(st.sets(st.sampled_from(range(count)), min_size=1))


@given(trees())
def test_what_imports_a_saved_file_is_loaded_after_it_and_with_it(drawn):
    tree, uses, saved = drawn
    found = saves.groups([f"{ROOMS}r/f{i}.py" for i in sorted(saved)], tree)
    groups = [[int(name[-4]) for name in group] for group in found]
    flat = [i for group in groups for i in group]
    assert len(flat) == len(set(flat)), "a file is in two groups"
    affected = set(saved)
    for i, used in enumerate(uses):
        if used & affected:
            affected.add(i)
    assert set(flat) == affected
    for group in groups:
        for place, i in enumerate(group):
            assert not uses[i] & set(group[place + 1 :]), f"{i} stands before what it imports"


def test_relative_imports_and_packages_are_imports():
    found = saves.candidates(f"{ROOMS}r/a.py", b"from . import b\nfrom .c import d\nimport nanodeploy.ops.other.e\n")
    assert {f"{ROOMS}r/b.py", f"{ROOMS}r/c.py", f"{ROOMS}other/e.py"} <= found


# One call beside the reference


def perturbed(returned):
    """The first output with its last element changed."""
    out = returned[0] if isinstance(returned, (tuple, list)) else returned
    flat = out.view(-1)
    flat[-1] = flat[-1] + 1


@pytest.mark.parametrize("name", sorted(OPS))
def test_a_live_call_is_redone_from_a_part_of_it(name):
    """The reference agrees with itself, whichever part is redone; what it returned falsely shows."""
    op = OPS[name]
    if not op.cases.POINTS:
        pytest.skip("the room has no cases yet")

    @settings(max_examples=8, deadline=None)
    @given(op.cases.strategy(st, small=True), st.randoms(use_true_random=False))
    def check(case, chance):
        args = op.cases.make(case, CPU, 0)
        call = LiveCall(op, args, chance)
        returned = op.reference(*args)
        assert call.complaint(returned) is None

    check()


def test_a_wrong_value_of_a_live_call_shows():
    args = OP.cases.make(OP.cases.Case(torch.float32, 4, 64), CPU, 0)
    call = LiveCall(OP, args, random.Random(0))
    returned = OP.reference(*args)
    perturbed(returned)
    assert "error budget" in call.complaint(returned)


def test_a_stray_write_into_the_cache_shows():
    op = OPS["store_kv"]
    case = op.cases.Case(torch.float32, 5, 2, 16, 4, 8, num_skipped=1)
    args = op.cases.make(case, CPU, 0)
    call = LiveCall(op, args, random.Random(0))
    op.reference(*args)
    assert call.complaint(None) is None
    page = call.pages[0]
    written = args[3][args[3] >= 0]
    free = next(slot for slot in range(int(page) * 4, int(page) * 4 + 4) if slot not in written.tolist())
    args[0][page, 0, free % 4] = 7.0
    assert "not its own" in call.complaint(None)


# Switching, on the real registry


@dataclass
class Runner:
    graphs: object = "graphs"
    num_recaptured: int = 0

    def recapture(self) -> None:
        self.num_recaptured += 1


@dataclass
class FakeEngine:
    """Each step calls add_rms_norm three times, on `num_rows` rows."""

    runner: Runner = field(default_factory=Runner)
    config: Config = field(default_factory=lambda: Config(device="cpu"))
    in_flight: object = None
    num_rows: int = 4
    num_resets: int = 0
    outputs: list = field(default_factory=list)
    graphs_seen: list = field(default_factory=list)

    def step(self) -> list:
        self.graphs_seen.append(self.runner.graphs)
        self.in_flight = SimpleNamespace(plan=SimpleNamespace(decodes=[None] * self.num_rows, chunks=[]))
        args = OP.cases.make(OP.cases.Case(torch.float32, self.num_rows, 64), CPU, 0)
        self.outputs = [OP(*args) for _ in range(3)]
        wanted = OP.reference(*args)
        self.right = all(torch.allclose(out[0], wanted[0]) for out in self.outputs)
        return []

    def busy(self) -> bool:
        return True

    def reset_prefix_cache(self) -> None:
        self.num_resets += 1


class Bench:
    """A lab on a small tree. `save` stands for a file whose gate was green."""

    def __init__(self, root: Path):
        self.root, self.count = root, 0
        (root / "bench").mkdir()
        (root / "bench" / "gate.py").touch()
        (root / ROOMS).mkdir(parents=True)
        self.lab, self.engine = Lab(root), FakeEngine()
        self.lab.engine, self.lab.on_gpu = self.engine, False
        self.engine.step()

    def save(self, name: str = "mine", factor: str = "1", facts: str = "", first: str = "pass") -> Attempt:
        self.count += 1
        text = KERNEL.format(name=name, factor=factor, facts=facts, first=first).encode()
        file, root = f"add_rms_norm/{name}.py", self.root / str(self.count)
        saves.write_tree({ROOMS + file: text}, root)
        attempt = Attempt([file], ["add_rms_norm"], [f"add_rms_norm/{name}"])
        self.lab.gatekeeper.green.append(Green(attempt, {ROOMS + file: text}, root))
        self.lab.turn()
        return attempt

    def remove(self, name: str = "mine") -> None:
        file = f"add_rms_norm/{name}.py"
        self.lab.gatekeeper.green.append(Green(Attempt([file]), {ROOMS + file: None}, Path()))
        self.lab.turn()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.lab.step()
            self.lab.turn()

    @property
    def in_use(self) -> str:
        (choice,) = {choice.name for choice in OP.decided.values()}
        return choice


@pytest.fixture
def bench(tmp_path: Path):
    kernels, modules = dict(OP.kernels), set(sys.modules)
    OP.decided.clear()
    yield Bench(tmp_path)
    OP.kernels.clear()
    OP.kernels.update(kernels)
    OP.favourite = None
    OP.decided.clear()
    for name in set(sys.modules) - modules:
        if name.startswith("nanodeploy.ops.add_rms_norm."):
            del sys.modules[name]


def test_a_saved_kernel_is_used_from_the_next_step_on_and_checked_without_graphs(bench: Bench):
    assert bench.in_use == "reference"
    attempt = bench.save()
    assert attempt.outcome == "switched" and bench.engine.runner.num_recaptured == 1
    bench.steps(3)
    assert bench.in_use == "mine" and bench.engine.right and attempt.num_live_checks == 1
    assert bench.engine.graphs_seen == ["graphs", None, "graphs", "graphs"] and bench.engine.runner.graphs == "graphs"
    state = bench.lab.state()["ops"]["add_rms_norm"]
    assert state["in_use"] == {"mine": "saved in the lab"} and state["saved"] == ["mine"]
    assert [entry["outcome"] for entry in state["history"]] == ["switched"]


def test_a_kernel_that_drifts_is_rolled_back_and_its_call_repaired(bench: Bench):
    good = bench.save()
    bench.steps(2)
    bad = bench.save(factor="(1.5 if len(x) == 4 else 1)")
    assert bad.outcome == "switched"
    bench.steps(1)
    assert bench.engine.right, "its first call is compared, and what it failed at is run again"
    assert bad.outcome == "rolled back" and "on live inputs" in bad.reason and bench.engine.num_resets == 1
    bench.steps(1)
    assert bench.engine.right and bench.in_use == "mine" and good.outcome == "switched"
    assert bench.lab.state()["rollbacks"] == 1


def test_nan_on_live_inputs_is_drift(bench: Bench):
    attempt = bench.save(factor="float('nan')")
    bench.steps(2)
    assert attempt.outcome == "rolled back" and "NaN" in attempt.reason
    bench.steps(1)
    assert bench.engine.right and bench.in_use == "reference"


def test_drift_that_comes_later_is_found_by_a_later_check(bench: Bench):
    attempt = bench.save(factor="(1.5 if len(x) == 6 else 1)")
    bench.steps(2)
    assert attempt.outcome == "switched" and attempt.num_live_checks == 1
    bench.engine.num_rows = 6
    bench.lab.checked_at = -1e9  # the period is over
    bench.steps(1)
    assert attempt.outcome == "rolled back"
    bench.steps(1)
    assert bench.engine.right and bench.in_use == "reference"


@pytest.mark.parametrize("first", ["raise ZeroDivisionError('on purpose')", "raise RuntimeError('on purpose')"])
def test_a_kernel_that_raises_hurts_no_step(bench: Bench, first: str):
    attempt = bench.save(first=first)
    bench.steps(1)
    assert bench.engine.right and attempt.outcome == "rolled back" and "on purpose" in attempt.reason


def test_a_predicate_that_raises_hurts_no_step(bench: Bench):
    attempt = bench.save(facts=", when=lambda case: 1 / 0")
    bench.steps(1)
    assert bench.engine.right and attempt.outcome == "rolled back" and "ZeroDivisionError" in attempt.reason


def test_what_the_new_version_no_longer_takes_stays_with_the_old(bench: Bench):
    bench.save()
    bench.steps(1)
    narrow = bench.save(facts=", when=lambda case: case.num_tokens < 3", factor="7")
    bench.steps(2)
    assert narrow.outcome == "contender" and "takes none of the cases" in narrow.reason and bench.engine.right


def test_loading_that_fails_changes_nothing(bench: Bench):
    bench.save()
    kernels, module = dict(OP.kernels), sys.modules["nanodeploy.ops.add_rms_norm.mine"]
    root = bench.root / "broken"
    saves.write_tree({ROOMS + "add_rms_norm/mine.py": b"import no_such_package\n"}, root)
    attempt = Attempt(["add_rms_norm/mine.py"], ["add_rms_norm"], ["add_rms_norm/mine"])
    bench.lab.gatekeeper.green.append(Green(attempt, {}, root))
    bench.lab.turn()
    assert attempt.outcome == "refused" and "no_such_package" in attempt.reason
    assert OP.kernels == kernels and sys.modules["nanodeploy.ops.add_rms_norm.mine"] is module


def test_a_flag_stands_above_the_lab(bench: Bench):
    OP.override = "reference"
    try:
        attempt = bench.save()
        assert attempt.outcome == "contender" and "--kernels fixes add_rms_norm=reference" in attempt.reason
    finally:
        OP.override = None


def test_a_removed_file_takes_all_its_versions_along(bench: Bench):
    bench.save()
    bench.steps(2)
    bench.save(facts=", batch_invariant=True")
    bench.steps(2)
    bench.remove()
    bench.steps(1)
    assert bench.in_use == "reference" and "mine" not in OP.kernels and bench.engine.right
    assert "nanodeploy.ops.add_rms_norm.mine" not in sys.modules
    assert ROOMS + "add_rms_norm/mine.py" not in bench.lab.gatekeeper.running


def test_step_times_are_told_before_and_after(bench: Bench):
    bench.steps(30)
    attempt = bench.save()
    lines = []
    bench.lab.reported_at = -1e9
    for _ in range(40):
        bench.lab.step()
        bench.lab.reported_at = -1e9
        lines += bench.lab.turn().lines
    assert set(attempt.step_ms["4"]) == {"before", "after"}
    assert any("batch 4 step " in line and " -> " in line for line in lines)


def test_step_times_leave_out_what_stood_between():
    times = StepTimes()
    times.end(8)
    times.end(8)
    times.pause()
    time.sleep(0.02)
    times.end(8)
    times.end(0)
    times.end(4)
    assert set(times.ms) == {8, 4} and len(times.ms[8]) == 1 and max(times.ms[8]) < 10


# With the gate itself


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("nanodeploy", "bench"):
        ignore = shutil.ignore_patterns("__pycache__", "results", "demo")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def gated(keeper: Gatekeeper, name: str, text: str) -> Attempt:
    """What becomes of one save."""
    saved = {ROOMS + name: text.encode()}
    for attempt in keeper.attempts(saved):
        threading.Thread(target=take, args=(keeper,), daemon=True).start()
        keeper.gate(attempt, saved)
        return attempt
    return keeper.told.pop()


def take(keeper: Gatekeeper) -> None:
    while not keeper.green:
        time.sleep(0.05)
    keeper.green[-1].attempt.outcome = "switched"
    keeper.green.pop().taken.set()


@pytest.mark.slow
def test_the_gate_judges_what_was_saved(tree: Path):
    keeper = Gatekeeper(tree)
    try:
        good = gated(keeper, "add_rms_norm/mine.py", KERNEL.format(name="mine", factor="1", facts="", first="pass"))
        assert good.outcome == "switched" and good.kernels == ["add_rms_norm/mine"] and good.checks["agreement"] == 16
        bad = gated(keeper, "add_rms_norm/mine.py", KERNEL.format(name="mine", factor="1.01", facts="", first="pass"))
        assert bad.outcome == "refused" and "outside the error budget" in bad.reason
        none = gated(keeper, "add_rms_norm/mine.py", "x = 1\n")
        assert none.outcome == "refused" and none.reason == "it registers no kernel"
        wrong = gated(keeper, "add_rms_norm/mine.py", "import no_such_package\n")
        assert wrong.outcome == "refused" and "no_such_package" in wrong.reason
    finally:
        keeper.close()
    assert not Path(keeper.folder.name).exists()


def test_what_no_gate_can_judge_wants_a_restart(tree: Path):
    keeper = Gatekeeper(tree)
    for name in ("add_rms_norm/reference.py", "registry.py", "case.py"):
        attempt = gated(keeper, name, (tree / ROOMS / name).read_text() + "\n")
        assert attempt.outcome == "refused" and "restart" in attempt.reason
    assert "line 1" in gated(keeper, "add_rms_norm/mine.py", "def oops(").reason
    keeper.close()
