"""`nanodeploy tune` without a GPU: kernels run in Triton's interpreter, and only their times are made up."""

import dataclasses
import json

import pytest
import torch

from nanodeploy import cli, tune
from nanodeploy.ops import machine, registry, tuned
from nanodeploy.ops.registry import OPS

RMS = OPS["rms_norm"]
CASES = RMS.cases
US = {"one_row": 3.0, "rival": 2.0, "wrong": 1.0, "broken": 1.0, "eager_only": 1.5}


def rival(x, weight, eps):
    return RMS.kernels["one_row"].fn(x, weight, eps)


def wrong(x, weight, eps):
    out = RMS.reference(x, weight, eps)
    out[0, 0] += 1
    return out


def broken(x, weight, eps):
    raise RuntimeError("too little shared memory\nand more")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU that is none: every kernel is at home on it, and a kernel's name says how long it takes."""
    monkeypatch.setenv("NANODEPLOY_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine, "key", lambda: "pretend")
    monkeypatch.setattr(machine, "satisfies", lambda needs: True)
    monkeypatch.setattr(registry, "_measured", {})
    monkeypatch.setattr(tune, "input_sets", lambda make, num_bytes: [make(0)])
    timed = lambda fn, sets, num_bytes, graph: tune_timing(US[fn.__name__], graph)
    monkeypatch.setattr(tune, "time_call", timed)
    points = {"T2": CASES.Case(torch.float16, 2, 64), "T3": CASES.Case(torch.float16, 3, 64)}
    monkeypatch.setattr(CASES, "POINTS", points)
    return tmp_path


def tune_timing(us, graph):
    return dataclasses.make_dataclass("Timing", ["us", "graph"])(us, graph)


def contend(monkeypatch, *fns, **settings):
    """These beside rms_norm's own kernel."""
    for fn in fns:
        kernel = dataclasses.replace(RMS.kernels["one_row"], name=fn.__name__, fn=fn, **settings)
        monkeypatch.setitem(RMS.kernels, fn.__name__, kernel)


def measure():
    return tune.measure(RMS, torch.device("cpu"))


def test_the_fastest_that_agrees_is_chosen(gpu, monkeypatch, capsys):
    contend(monkeypatch, rival, wrong, broken)
    assert measure() == [{"where": {}, "kernel": "rival", "slower_by": {"one_row": 1.5}}]
    said = capsys.readouterr().err
    assert "wrong is refused, at T2: out: 1 of 128 elements are outside the error budget" in said
    assert "broken is refused, at T2: RuntimeError: too little shared memory" in said and "and more" not in said


def test_where_all_others_are_refused_the_one_that_stands_is_written(gpu, monkeypatch):
    contend(monkeypatch, wrong)
    assert measure() == [{"where": {}, "kernel": "one_row", "slower_by": {}}]


def test_what_no_graph_can_hold_is_followed_by_what_one_can(gpu, monkeypatch):
    contend(monkeypatch, rival, capturable=False)
    assert [row["kernel"] for row in measure()] == ["rival", "one_row"]


def test_a_point_that_does_not_fit_is_left_out_and_said(gpu, monkeypatch, capsys):
    contend(monkeypatch, rival)

    def make(case, device, seed, real=CASES.make):
        if case.num_tokens == 3:
            raise torch.OutOfMemoryError("no")
        return real(case, device, seed)

    monkeypatch.setattr(CASES, "make", make)
    monkeypatch.setattr(CASES, "REGIONS", [({"num_tokens": 2}, ["T2"]), ({}, ["T3"])], raising=False)
    assert [row["where"] for row in measure()] == [{"num_tokens": 2}]
    assert "rms_norm at T3: too large" in capsys.readouterr().err


def test_an_op_with_one_contender_needs_no_measuring(gpu):
    assert measure() == []


def test_what_was_tuned_stands_above_what_is_shipped_until_the_room_changes(gpu, monkeypatch):
    shipped = gpu / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(registry, "CHOICES", shipped)
    rows = {op: [{"where": {}, "kernel": "shipped"}] for op in ("rms_norm", "linear")}
    (shipped / "pretend.json").write_text(json.dumps(rows))
    ours = [{"where": {}, "kernel": "ours"}]
    assert tuned.write("pretend", {"rms_norm": ours}) == gpu / "choices" / "pretend.json"
    assert registry.measured("pretend") == {"rms_norm": ours, "linear": rows["linear"]}
    tuned.write("pretend", {"silu_mul": ours})
    assert tuned.read("pretend") == {"rms_norm": ours, "silu_mul": ours}, "the other ops keep theirs"
    monkeypatch.setattr(tuned, "room", lambda name: "edited")
    assert tuned.read("pretend") == {}


def test_the_command(gpu, monkeypatch, capsys):
    monkeypatch.setattr(
        tune, "measure", lambda op, device: [{"where": {"num_tokens": 1}, "kernel": "k", "slower_by": {"j": 1.2}}]
    )
    assert cli.main(["tune", "--ops", "rms_norm, silu_mul"]) == 0
    out = capsys.readouterr().out
    assert "rms_norm: k  (num_tokens 1; j takes 1.2x)" in out and str(tuned.path("pretend")) in out
    assert set(tuned.read("pretend")) == {"rms_norm", "silu_mul"}


def test_mistakes_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--ops", "rms_nrom"]) == 1
    assert "Did you mean rms_norm?" in capsys.readouterr().err
    assert cli.main(["tune"]) == 1
    assert "torch sees none" in capsys.readouterr().err
