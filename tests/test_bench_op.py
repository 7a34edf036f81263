"""bench.op and its receipts, without a GPU: what is measured is made up, what is done with it is not."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import gate, op, receipt, slice, watch
from bench.machine import Limits
from bench.timing import Timing
from nanodeploy.ops import machine, registry
from nanodeploy.ops.registry import OPS

CEILINGS = Limits(copy_bytes_per_s=4e12, bf16_flops_per_s=8e14)
RMS = OPS["rms_norm"]


def row(kernel, point, us):
    return op.Row(point, kernel, us, 0.0, 1e12, "GB/s", 50.0, "")


@pytest.fixture
def two_kernels(monkeypatch):
    """rms_norm with a second contender, `other`."""
    other = dataclasses.replace(RMS.kernels["one_row"], name="other")
    monkeypatch.setitem(RMS.kernels, "other", other)
    return other


@pytest.fixture
def pretend_gpu(monkeypatch, tmp_path):
    """Made-up times and limits; results go to tmp_path. Tensors stay on the CPU."""
    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gate, "default_device", lambda: device)
    monkeypatch.setattr(gate, "why_not", lambda kernel, device: "not here" if kernel.requires else None)
    monkeypatch.setattr(op, "input_sets", lambda make, call_bytes: [make(0)])
    monkeypatch.setattr(op, "time_call", lambda fn, sets, call_bytes, graph: Timing(40.0, 0.1, "graph"))
    monkeypatch.setattr(op, "stream_time", lambda calls: Timing(400.0, 0.1, "stream"))
    monkeypatch.setattr(op, "limits", lambda: CEILINGS)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(receipt, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(op, "CHOICES", tmp_path / "choices")
    monkeypatch.setattr(machine, "key", lambda: "pretend")
    small = {"T4": RMS.cases.Case(torch.float16, 4, 64), "T8": RMS.cases.Case(torch.float16, 8, 64)}
    monkeypatch.setattr(RMS.cases, "POINTS", small)
    monkeypatch.setattr(op, "OPS", {"rms_norm": RMS})
    return tmp_path


def green(o, kernel, device, count, *share):
    return gate.Verdict(o.name, kernel.name, "nanodeploy/ops/rms_norm/one_row.py", checks={"agreement": count})


def red(o, kernel, device, count, *share):
    return gate.Verdict(o.name, kernel.name, "nanodeploy/ops/rms_norm/one_row.py", failure="AssertionError: wrong")


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.op", *arguments])
    return op.main()


# Rates and choices


def test_a_row_says_the_rate_that_bounds_it():
    case = RMS.cases.Case(torch.bfloat16, 1000, 1000)  # 4 MB: 1.0005 us at 4 TB/s
    bound = op.make_row("p", "k", RMS, case, Timing(2.001, 0.0, "graph"), CEILINGS)
    assert bound.unit == "GB/s" and bound.rate == pytest.approx(2e12, rel=1e-3)
    assert bound.percent == pytest.approx(50, rel=1e-3) and bound.note == ""
    matrix = OPS["linear"].cases.Case(torch.bfloat16, 8192, 8192, 8192)  # 1.1 TFLOP: 1374 us at 800 TFLOP/s
    bound = op.make_row("p", "k", OPS["linear"], matrix, Timing(2748.8, 300.0, "stream", False), CEILINGS)
    assert bound.unit == "TFLOP/s" and bound.rate == pytest.approx(4e14, rel=1e-3)
    assert bound.note == "inputs in L2, launched from Python, ± 300.0 us"


def test_the_winner_is_the_fastest_by_geometric_mean(two_kernels):
    points = list(RMS.cases.POINTS)
    rows = [row("one_row", p, us) for p, us in zip(points, (1, 100, 1, 1))]
    rows += [row("other", p, us) for p, us in zip(points, (2, 10, 2, 2))]
    rows += [row("reference", p, 0.1) for p in points] + [row("other@main", p, 0.1) for p in points]
    (found,) = op.choices(RMS, rows)
    assert (found["where"], found["kernel"]) == ({}, "other") and found["slower_by"] == {"one_row": 1.057}


def test_one_contender_leaves_nothing_to_choose():
    assert op.choices(RMS, [row("one_row", p, 1) for p in RMS.cases.POINTS]) == []


def test_a_region_takes_only_kernels_that_run_at_all_its_points(two_kernels, monkeypatch):
    first, *rest = RMS.cases.POINTS
    monkeypatch.setattr(RMS.cases, "REGIONS", [({"num_tokens": 1}, [first]), ({}, rest)], raising=False)
    rows = [row("one_row", p, 5) for p in RMS.cases.POINTS] + [row("other", first, 1), row("other", rest[0], 1)]
    assert [(r["where"], r["kernel"]) for r in op.choices(RMS, rows)] == [({"num_tokens": 1}, "other"), ({}, "one_row")]


def test_a_winner_that_no_graph_holds_is_followed_by_one_that_does(two_kernels, monkeypatch):
    monkeypatch.setitem(RMS.kernels, "other", dataclasses.replace(two_kernels, capturable=False))
    rows = [row(k, p, us) for k, us in (("one_row", 5), ("other", 1)) for p in RMS.cases.POINTS]
    assert [r["kernel"] for r in op.choices(RMS, rows)] == ["other", "one_row"]


def test_written_choices_are_what_dispatch_takes(two_kernels, pretend_gpu, monkeypatch):
    monkeypatch.setattr(registry, "CHOICES", pretend_gpu / "choices")
    monkeypatch.setattr(machine, "satisfies", lambda needs: True)
    monkeypatch.setitem(registry._measured, "pretend", None)
    del registry._measured["pretend"]
    rows = [row(k, p, us) for k, us in (("one_row", 5), ("other", 1)) for p in RMS.cases.POINTS]
    path = op.write_choices([op.Report("rms_norm", [], rows)])
    kept = json.loads(path.read_text()) | {"sample": [{"where": {}, "kernel": "two_pass"}]}
    path.write_text(json.dumps(kept))
    assert json.loads(op.write_choices([op.Report("rms_norm", [], rows)]).read_text()) == kept
    choice = RMS.choose(RMS.cases.Case(torch.float16, 4, 64), on_gpu=True)
    assert (choice.name, choice.reason) == ("other", "measured, pretend")
    registry._measured.pop("pretend")


# The command


def test_a_red_gate_prints_no_numbers(pretend_gpu, monkeypatch, capsys):
    monkeypatch.setattr(gate, "examine", red)
    monkeypatch.setattr(op, "roofline", lambda *args: pytest.fail("timed behind a red gate"))
    assert command(monkeypatch, "rms_norm", "--kernel", "one_row") == 1
    said = capsys.readouterr().out
    assert "RED" in said and "AssertionError: wrong" in said and "GB/s" not in said


def test_gate_roofline_slice_in_that_order(pretend_gpu, two_kernels, monkeypatch, capsys):
    steps = [slice.StepTime("as chosen", "decode", 100, 10, 1.0), slice.StepTime("other", "decode", 90, 10, 0.9)]

    class Stand:
        def __init__(self, device):
            pass

        def compare(self, op_name, kernels):
            assert (op_name, kernels) == ("rms_norm", ["other"])
            return steps, ["a remark"]

    monkeypatch.setattr(gate, "examine", green)
    monkeypatch.setattr(op, "Model", Stand)
    assert command(monkeypatch, "rms_norm", "--kernel", "other") == 0
    said = capsys.readouterr().out
    order = [said.index(words) for words in ("green", "copy 4000 GB/s", "| T4", "-10.0%", "a remark")]
    assert order == sorted(order)
    t4 = [line.split("|")[2].strip() for line in said.splitlines() if line.startswith("| T4")]
    assert t4 == ["other", "one_row", "reference"]
    assert command(monkeypatch, "rms_norm", "--kernel", "other", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["rows"]) == 6 and report["steps"][1]["step_ms"] == 0.9 and report["gate"][0]["verdict"] == "green"


def test_all_writes_the_table_and_leaves_out_what_is_red(pretend_gpu, two_kernels, monkeypatch, capsys):
    monkeypatch.setattr(gate, "examine", lambda o, k, d, n: (red if k.name == "other" else green)(o, k, d, n))
    assert command(monkeypatch, "--all", "--write-choices") == 1
    text = (pretend_gpu / "results" / "pretend" / "ops.md").read_text()
    assert "other is red" in text and "| other" not in text and "| one_row" in text
    numbers = json.loads((pretend_gpu / "results" / "pretend" / "ops.json").read_text())
    assert {r["kernel"] for r in numbers["ops"][0]["rows"]} == {"one_row", "reference"}
    assert numbers["limits"]["copy_bytes_per_s"] == 4e12
    assert (pretend_gpu / "choices" / "pretend.json").read_text().strip() == "{}"


def test_all_trusts_a_green_receipt_until_the_file_changes(pretend_gpu, monkeypatch, capsys):
    gated = []
    monkeypatch.setattr(gate, "examine", lambda o, k, d, n: gated.append(k.name) or green(o, k, d, n))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretend")
    path = gate.write_receipt([green(RMS, RMS.kernels["one_row"], None, 5)])
    assert command(monkeypatch, "--all") == 0 and gated == []
    written = json.loads(path.read_text())
    written["kernels"]["rms_norm/one_row"]["hashes"]["nanodeploy/ops/rms_norm/cases.py"] = "0" * 64
    path.write_text(json.dumps(written))
    assert command(monkeypatch, "--all") == 0 and gated == ["one_row"]


def test_without_a_gpu_the_gate_is_all_there_is(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command(monkeypatch, "rms_norm", "--kernel", "one_row", "--cases", "2") == 0
    said = capsys.readouterr().out
    assert "green" in said and "no GPU" in said


def test_unknown_kernels_are_refused_by_name(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, "rms_norm", "--kernel", "nothing")
    assert "there are one_row" in capsys.readouterr().err


def in_git() -> bool:
    return op.header.git("rev-parse", "HEAD:nanodeploy/ops/rms_norm/one_row.py") is not None


@pytest.mark.skipif(not in_git(), reason="no git history here")
def test_a_past_revision_runs_beside_the_present_one():
    before = dict(RMS.kernels)
    past = op.at_revision(RMS, RMS.kernels["one_row"], "HEAD")
    assert past.name == "one_row@HEAD" and RMS.kernels == before
    assert past.fn is not RMS.kernels["one_row"].fn
    gate.agreement(RMS, past, RMS.cases.Case(torch.float16, 3, 64), torch.device("cpu"), seed=0)
    with pytest.raises(SystemExit, match="git has no"):
        op.at_revision(RMS, RMS.kernels["one_row"], "no-such-revision")
    assert RMS.kernels == before


# Receipts


@pytest.fixture
def rooms(tmp_path, monkeypatch):
    """A small tree: room `a` whose kernel borrows from room `b`."""
    monkeypatch.setattr(receipt, "ROOT", tmp_path)
    monkeypatch.setattr(receipt, "OPS", tmp_path / "nanodeploy" / "ops")
    monkeypatch.setattr(receipt, "RESULTS", tmp_path / "results")
    for name, text in {
        "a/reference.py": "",
        "a/cases.py": "",
        "a/fast.py": "from nanodeploy.ops.b.shared import x\n@a.kernel(needs='sm80')\n",
        "b/reference.py": "",
        "b/cases.py": "",
        "b/shared.py": "x = 1\n",
    }.items():
        path = tmp_path / "nanodeploy" / "ops" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("@a.kernel(needs='sm80')", "made = a.kernel(needs='sm80')"))
    return tmp_path / "nanodeploy" / "ops"


def write_entry(rooms, verdict="green"):
    entry = {"file": "nanodeploy/ops/a/fast.py", "verdict": verdict, "hashes": receipt.hashes(rooms / "a" / "fast.py")}
    receipt.write("m", "a GPU", {"a/fast": entry})


def test_a_kernel_without_a_receipt_is_named(rooms):
    assert receipt.changed() == ["nanodeploy/ops/a/fast.py was never gated on a GPU"]


@pytest.mark.parametrize("file", ["a/fast.py", "a/reference.py", "a/cases.py", "b/shared.py"])
def test_a_change_to_what_a_verdict_stands_on_is_named(rooms, file):
    write_entry(rooms)
    assert receipt.changed() == []
    assert receipt.is_green(receipt.read("m"), "a/fast", rooms / "a" / "fast.py")
    with open(rooms / file, "a") as appended:
        appended.write("# changed\n")
    (line,) = receipt.changed()
    assert line.startswith("a/fast changed since it was gated on a GPU") and file in line
    assert not receipt.is_green(receipt.read("m"), "a/fast", rooms / "a" / "fast.py")


def test_other_rooms_do_not_matter(rooms):
    write_entry(rooms)
    (rooms / "b" / "cases.py").write_text("# changed\n")
    assert receipt.changed() == []


def test_red_stays_named(rooms):
    write_entry(rooms, verdict="red")
    assert receipt.changed() == ["a/fast was red on a GPU"]


# Watching


def test_watch_runs_again_when_a_file_changes(tmp_path, monkeypatch, capfd):
    file = tmp_path / "kernel.py"
    file.write_text("1")

    def start(arguments):
        # The run itself edits the room, so the watcher must see a change made while it ran.
        edit = f"open({str(file)!r}, 'a').write('#')"
        script = f"import sys; sys.stdin.readline() and (print('ran', *sys.argv[1:]), {edit})"
        return subprocess.Popen([sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, text=True)

    monkeypatch.setattr(watch, "start", start)
    assert watch.watch(tmp_path, ["rms_norm"], runs=3) == 0
    assert capfd.readouterr().out.count("ran rms_norm") == 3
    assert file.read_text() == "1###"


def test_new_and_removed_files_are_changes(tmp_path):
    before = watch.stamps(tmp_path)
    (tmp_path / "mine.py").write_text("")
    after = watch.stamps(tmp_path)
    assert after != before
    (tmp_path / "mine.py").unlink()
    (tmp_path / "notes.txt").write_text("")
    assert watch.stamps(tmp_path) == before


# The slice


TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 10000,
}


@pytest.fixture
def tiny_slice(monkeypatch):
    scenarios = (slice.Scenario(3, 128, True), slice.Scenario(1, 64, False))
    monkeypatch.setattr(slice, "SCENARIOS", scenarios)

    def timer(calls):
        for call in calls:
            call()
        return Timing(100.0, 0.0, "graph")

    monkeypatch.setattr(slice, "graph_time", timer)
    monkeypatch.setattr(slice, "stream_time", timer)
    return slice.Model(torch.device("cpu"), compiled=False, **TINY)


def with_cpu_kernel(op_name, monkeypatch, when=lambda case: True):
    """A contender that runs on a CPU and counts its calls."""
    calls = []
    target = OPS[op_name]

    def counted(*args):
        calls.append(target.cases.of(*args))
        return target.reference(*args)

    like = next(iter(target.kernels.values()))
    facts = {"needs": "cpu", "when": when, "requires": None, "capturable": True}
    kernel = dataclasses.replace(like, name="counted", fn=counted, **facts)
    monkeypatch.setitem(target.kernels, "counted", kernel)
    return calls


def test_the_slice_forces_the_kernel_and_extrapolates(tiny_slice, monkeypatch):
    calls = with_cpu_kernel("decode_attention", monkeypatch)
    times, remarks = tiny_slice.compare("decode_attention", ["counted"])
    assert remarks == [] and [t.scenario for t in times] == ["decode 3 x 128"] * 2
    assert times[0].kernel.startswith("as chosen") and times[1].kernel == "counted"
    assert times[1].step_ms == pytest.approx((100 * 36 / 4 + 100) / 1e3)
    assert calls and {case.num_seqs for case in calls} == {3}


def test_an_op_of_the_prompt_is_timed_in_the_prefill_step(tiny_slice, monkeypatch):
    calls = with_cpu_kernel("prefill_attention", monkeypatch)
    times, remarks = tiny_slice.compare("prefill_attention", ["counted"])
    assert [t.scenario for t in times] == ["prefill 1 x 64"] * 2 and remarks == [] and calls


def test_a_kernel_is_timed_in_the_first_step_it_takes(tiny_slice, monkeypatch):
    with_cpu_kernel("linear_silu_mul", monkeypatch, when=lambda case: case.num_tokens == 64)
    times, _ = tiny_slice.compare("linear_silu_mul", ["counted"])
    assert [t.scenario for t in times] == ["prefill 1 x 64"] * 2


def test_an_op_outside_the_model_is_remarked_on(tiny_slice, monkeypatch):
    with_cpu_kernel("sample", monkeypatch)
    times, remarks = tiny_slice.compare("sample", ["counted"])
    assert times == [] and "counted: no step of" in remarks[0]


def test_decodes_of_the_slice_read_their_whole_context(tiny_slice):
    """Rows of the batch: each decode is the last token of its own pages, and a prompt brings all of its own."""
    for scenario in slice.SCENARIOS:
        batch = slice.make_batch(scenario, torch.device("cpu"))
        assert len(batch.slots.unique()) == len(batch.slots)
        for row, (kv_len, pages) in enumerate(zip(batch.rows.decode_lens.tolist(), batch.rows.decode_table)):
            mine = [i for i, s in enumerate(batch.slots.tolist()) if s // slice.PAGE_SIZE in pages.tolist()]
            assert [batch.positions[i].item() for i in mine][-1] == kv_len - 1 == scenario.context - 1
            assert mine[-1] == batch.logit_rows[row]
