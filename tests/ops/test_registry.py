"""Dispatch: which kernel an op runs, and what it says when none fits."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanodeploy.errors import ConfigError
from nanodeploy.ops import machine, registry
from nanodeploy.ops.registry import OPS, matches

RMS = OPS["rms_norm"]
CASE = RMS.cases.Case(torch.bfloat16, 8, 4096)


def never(*args):
    raise AssertionError("not this one")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine that satisfies every kernel, with an empty table of measurements."""
    monkeypatch.setattr(machine, "satisfies", lambda needs: True)
    monkeypatch.setattr(machine, "key", lambda: "pretend")
    monkeypatch.setattr(registry, "CHOICES", tmp_path)
    monkeypatch.setattr(registry, "_measured", {})
    return tmp_path


@pytest.fixture
def contenders(monkeypatch):
    """rms_norm with `first`, `wide` (dim over 1000), `vendor` (a package) and `eager` (no graph holds it)."""
    like = RMS.kernels["one_row"]
    made = {
        "eager": dataclasses.replace(like, name="eager", capturable=False),
        "vendor": dataclasses.replace(like, name="vendor", requires="json"),
        "first": dataclasses.replace(like, name="first", when=lambda case: case.dim <= 8192),
        "wide": dataclasses.replace(like, name="wide", when=lambda case: case.dim > 1000),
    }
    monkeypatch.setattr(RMS, "kernels", made)
    monkeypatch.setattr(RMS, "override", None)
    RMS.decided.clear()
    yield made
    RMS.decided.clear()


def measured(folder, *rows):
    (folder / "pretend.json").write_text(json.dumps({"rms_norm": list(rows)}))


def test_on_a_cpu_the_reference_runs(contenders):
    assert RMS.choose(CASE, on_gpu=False).name == "reference"


def test_a_cpu_kernel_is_taken_on_a_cpu(contenders):
    """But only where --deterministic asks for it: it stands in for a reference that is not batch-invariant."""
    contenders["plain"] = dataclasses.replace(contenders["first"], name="plain", needs="cpu", order="plain")
    assert RMS.choose(CASE, on_gpu=False).name == "reference"
    registry.use({}, deterministic=True)
    try:
        assert RMS.choose(CASE, on_gpu=False).name == "plain"
    finally:
        registry.use({})


def test_without_measurements_the_first_of_our_own_that_fits(gpu, contenders):
    del contenders["eager"]
    assert RMS.choose(CASE, on_gpu=True).name == "first"
    assert RMS.choose(dataclasses.replace(CASE, dim=9000), on_gpu=True).name == "wide"


def test_a_measurement_goes_before_order_and_may_name_a_vendor(gpu, contenders):
    measured(gpu, {"where": {"dim": [None, 4096]}, "kernel": "vendor"}, {"where": {}, "kernel": "wide"})
    assert RMS.choose(CASE, on_gpu=True).name == "vendor"
    assert RMS.choose(dataclasses.replace(CASE, dim=5000), on_gpu=True).name == "wide"


def test_a_measured_kernel_that_does_not_take_the_case_is_passed_over(gpu, contenders):
    measured(gpu, {"where": {}, "kernel": "wide"}, {"where": {}, "kernel": "gone"}, {"where": {}, "kernel": "first"})
    assert RMS.choose(dataclasses.replace(CASE, dim=64), on_gpu=True).name == "first"


def test_a_vendor_that_is_not_installed_is_no_contender(gpu, contenders):
    contenders["vendor"] = dataclasses.replace(contenders["vendor"], requires="no_such_package")
    measured(gpu, {"where": {}, "kernel": "vendor"}, {"where": {}, "kernel": "wide"})
    assert RMS.choose(CASE, on_gpu=True).name == "wide"
    with pytest.raises(ConfigError, match="needs the package no_such_package"):
        registry.use({"rms_norm": "vendor"})


def test_while_capturing_only_what_a_graph_can_hold(gpu, contenders):
    measured(gpu, {"where": {}, "kernel": "eager"}, {"where": {}, "kernel": "wide"})
    assert RMS.choose(CASE, on_gpu=True).name == "eager"
    assert RMS.choose(CASE, on_gpu=True, capturing=True).name == "wide"


def test_nothing_that_fits_on_a_gpu_is_an_error_that_says_what_there_is(gpu, contenders):
    contenders.clear()
    with pytest.raises(ConfigError, match=r"no kernel on sm.*rms_norm=reference"):
        RMS.choose(CASE, on_gpu=True)


def test_flags_win_and_are_checked(gpu, contenders):
    registry.use({"rms_norm": "wide"})
    assert (RMS.choose(CASE, on_gpu=True).name, RMS.choose(CASE, on_gpu=True).reason) == ("wide", "flag")
    with pytest.raises(ConfigError, match="does not take"):
        RMS.choose(dataclasses.replace(CASE, dim=64), on_gpu=True)
    registry.use({"rms_norm": "reference"})
    assert RMS.choose(CASE, on_gpu=True).name == "reference"
    registry.use({})
    assert RMS.override is None
    with pytest.raises(ConfigError, match="no such op; there are"):
        registry.use({"rms_nrom": "wide"})
    with pytest.raises(ConfigError, match="rms_norm has reference, eager, vendor"):
        registry.use({"rms_norm": "nothing"})


def test_a_call_runs_what_was_chosen_and_says_so(contenders):
    contenders["plain"] = dataclasses.replace(
        contenders["first"], name="plain", needs="cpu", order="plain", fn=RMS.reference
    )
    args = RMS.cases.make(RMS.cases.Case(torch.float32, 2, 64), torch.device("cpu"), 0)
    assert torch.equal(RMS(*args), RMS.reference(*args))
    assert registry.chosen()["rms_norm"] == {"reference": "cpu"}
    registry.use({}, deterministic=True)
    try:
        assert torch.equal(RMS(*args), RMS.reference(*args))
        assert registry.chosen()["rms_norm"] == {"plain": "deterministic"}
    finally:
        registry.use({})


def test_a_kernel_takes_exactly_the_arguments_of_the_op():
    with pytest.raises(TypeError, match=r"takes \['x', 'gain', 'eps'\]"):

        @RMS.kernel(needs="sm80")
        def misnamed(x, gain, eps):
            return x

    assert "misnamed" not in RMS.kernels


@given(low=st.none() | st.integers(0, 9), high=st.none() | st.integers(0, 9), got=st.integers(0, 9))
def test_regions_are_inclusive_and_open_where_null(low, high, got):
    case = dataclasses.replace(CASE, num_tokens=got)
    inside = (low is None or low <= got) and (high is None or got <= high)
    assert matches({"num_tokens": [low, high]}, case) == inside
    assert matches({"num_tokens": [low, high], "dim": 1}, case) is False
    assert matches({"num_tokens": got}, case) and matches({}, case)
