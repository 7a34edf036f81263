"""The gate itself: every fault that it exists for turns it red."""

import dataclasses

import pytest
import torch

from bench import gate
from nanodeploy.ops import agreement
from nanodeploy.ops.registry import OPS, Kernel

CPU = torch.device("cpu")


def contender(fn, op_name="rms_norm", **facts) -> Kernel:
    """A kernel that runs on this machine as it is."""
    like = next(iter(OPS[op_name].kernels.values()))
    blank = {"needs": "cpu", "when": lambda case: True, "batch_invariant": False, "aot": None, "requires": None}
    return dataclasses.replace(like, name=fn.__name__, fn=fn, **{**blank, **facts})


def examine(kernel, op_name="rms_norm"):
    op = OPS[op_name]
    return gate.examine(op, kernel, CPU, count=12)


def norm(x, weight, eps):
    return OPS["rms_norm"].reference(x, weight, eps)


def honest(x, weight, eps):
    out = torch.empty_like(x)
    return out.copy_(norm(x, weight, eps))


def forgets_the_last_row(x, weight, eps):
    out = torch.empty_like(x)
    out[:-1] = norm(x, weight, eps)[:-1]
    return out


def reads_unwritten_scratch(x, weight, eps):
    return norm(x, weight, eps) + torch.empty(1, dtype=x.dtype, device=x.device) * 0


def is_a_little_off(x, weight, eps):
    return norm(x, weight * (1 + 4 * torch.finfo(x.dtype).eps), eps)


def writes_its_input(x, weight, eps):
    out = norm(x, weight, eps)
    weight += 1
    return out


def sums_in_the_working_dtype(x, weight, eps):
    mean = (x * x).cumsum(-1)[:, -1:] / x.shape[1]
    return x * torch.rsqrt(mean + eps) * weight


def overflows(x, weight, eps):
    return norm(x, weight, eps).masked_fill(torch.arange(x.shape[1]) == 0, torch.inf)


def another_shape(x, weight, eps):
    return norm(x, weight, eps).flatten()


def crashes(x, weight, eps):
    raise ValueError("no such thing")


def test_an_honest_kernel_is_green(monkeypatch):
    monkeypatch.setitem(OPS["rms_norm"].kernels, "honest", contender(honest))
    verdict = examine(contender(honest))
    assert verdict.verdict == "green", verdict.failure
    assert verdict.checks["agreement"] == 12


@pytest.mark.parametrize(
    ("fn", "word"),
    [
        (forgets_the_last_row, "poison"),
        (reads_unwritten_scratch, "poison"),
        (is_a_little_off, "budget"),
        (writes_its_input, "wrote into its input weight"),
        (sums_in_the_working_dtype, "exceeds"),
        (overflows, "inf in one"),
        (another_shape, "the reference gives"),
        (crashes, "no such thing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_red(fn, word):
    verdict = examine(contender(fn))
    assert verdict.verdict == "red"
    assert word in verdict.failure
    assert "case Case(" in verdict.failure


def test_a_small_bias_everywhere_is_red_though_each_element_passes():
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(64, 256, generator=g, dtype=torch.float64)
    ref = truth.half()
    biased = (truth * (1 + 0.7 * torch.finfo(torch.float16).eps)).half()
    assert agreement.disagreement("out", ref, ref, truth) is None
    assert "||error||" in agreement.disagreement("out", biased, ref, truth)


def test_the_worst_element_is_named():
    truth = torch.ones(3, 4, 5, dtype=torch.float64)
    got = truth.float()
    got[1, 2, 3], got[0, 0, 0] = 2, 1.5
    assert "at [1, 2, 3]: got 2" in agreement.disagreement("out", got, truth.float(), truth)


def test_chunks_are_compared_as_the_whole_is(monkeypatch):
    monkeypatch.setattr(agreement, "CHUNK", 8)
    truth = torch.ones(6, 4, dtype=torch.float64)
    got = truth.float()
    got[5, 1] = 3
    assert "at [5, 1]: got 3" in agreement.disagreement("out", got, truth.float(), truth)
    assert "NaN in one" in agreement.disagreement("out", got.fill_(torch.nan), truth.float(), truth)


def batch_mean_creeps_in(x, weight, eps):
    return norm(x, weight, eps) * (1 + x.shape[0] * torch.finfo(x.dtype).eps / 8)


def test_a_row_that_feels_the_batch_is_red():
    op = OPS["rms_norm"]
    case = op.cases.Case(torch.float32, 5, 64)
    with pytest.raises(AssertionError, match="other bits alone"):
        gate.invariance(op, contender(batch_mean_creeps_in), case, CPU, seed=0)
    gate.invariance(op, contender(honest), case, CPU, seed=0)


def test_a_declared_invariance_that_no_room_can_prove_shows(monkeypatch):
    monkeypatch.delattr(OPS["rms_norm"].cases, "ROWS")
    todo = gate.plan(OPS["rms_norm"], contender(honest, batch_invariant=True), CPU, 4)
    assert "no ROWS" in todo["invariance"]


def writes_a_neighbour(kv_pages, k, v, slots):
    OPS["store_kv"].reference(kv_pages, k, v, slots)
    kv_pages.view(-1)[0] = 0  # the first element belongs to nobody as long as no token has slot 0


def skips_a_token(kv_pages, k, v, slots):
    OPS["store_kv"].reference(kv_pages, k[1:], v[1:], slots[1:])


@pytest.mark.parametrize(("fn", "word"), [(writes_a_neighbour, "poison: wrote 1 elements"), (skips_a_token, "NaN")])
@pytest.mark.parametrize("room_says", [True, False], ids=["owned", "derived"])
def test_a_stray_write_is_red(fn, word, room_says, monkeypatch):
    op = OPS["store_kv"]
    if not room_says:
        monkeypatch.delattr(op.cases, "owned")
    case = op.cases.Case(torch.float16, 3, 1, 16, 4, 3)
    seed = next(s for s in range(99) if (op.cases.make(case, CPU, s)[3] > 0).all())
    gate.agreement(op, contender(op.reference, "store_kv"), case, CPU, seed)
    with pytest.raises(AssertionError, match=word):
        gate.agreement(op, contender(fn, "store_kv"), case, CPU, seed)


def test_outputs_that_the_op_did_not_promise_are_red_for_the_compiler(monkeypatch):
    op = OPS["rms_norm"]
    case = op.cases.Case(torch.float32, 4, 16)
    gate.compiler(op, OPS["rms_norm"].kernels["one_row"], case, CPU, seed=0)
    monkeypatch.setitem(op.kernels, "another_shape", contender(another_shape))
    with pytest.raises(torch.testing._internal.optests.OpCheckError):
        gate.compiler(op, op.kernels["another_shape"], case, CPU, seed=0)


def test_what_cannot_run_says_why():
    assert "not installed" in gate.why_not(contender(honest, requires="no_such_package"), CPU)
    verdict = examine(contender(honest, requires="no_such_package"))
    assert verdict.verdict == "not run" and "not installed" in verdict.lines()
    assert "interpreter cannot" in gate.why_not(contender(honest, needs="sm90", interpretable=False), CPU)


def test_draw_is_the_same_in_every_run_and_cheapest_first():
    op = OPS["rms_norm"]
    kernel = contender(honest, when=lambda case: case.dim == 64)
    cases = gate.draw(gate.cases(op, kernel, CPU), 8, op)
    assert cases == gate.draw(gate.cases(op, kernel, CPU), 8, op)
    assert len(set(cases)) == len(cases) and {case.dim for case in cases} == {64}
    costs = [op.cases.cost(case).num_bytes for case in cases]
    assert costs == sorted(costs)


def test_forcing_a_kernel_ends_with_the_block():
    op = OPS["rms_norm"]
    with pytest.raises(ZeroDivisionError), gate.forced(op, "one_row"):
        assert op.override == "one_row"
        1 / 0  # noqa: B018
    assert op.override is None


def test_shards_share_the_cases_and_add_up():
    kernel = OPS["rms_norm"].kernels["one_row"]
    whole = gate.examine(OPS["rms_norm"], kernel, CPU, count=6)
    shares = [gate.examine(OPS["rms_norm"], kernel, CPU, 6, shard, 4) for shard in range(4)]
    assert [share.checks["agreement"] for share in shares] == [2, 2, 1, 1]
    merged = gate.merge(shares)
    assert merged.checks == whole.checks and merged.verdict == "green" and merged.not_run == whole.not_run
    bad = dataclasses.replace(shares[2], failure="AssertionError: wrong")
    assert gate.merge([*shares[:2], bad, shares[3]]).verdict == "red"
    blank = gate.Verdict("rms_norm", "one_row", "file", not_run=dict.fromkeys(gate.CHECKS, "why"))
    assert gate.merge([blank] * 4).verdict == "not run"


def test_a_gate_that_dies_is_red(monkeypatch):
    """A segmentation fault or a sticky CUDA error ends the process; the verdict says so."""
    monkeypatch.setattr(gate.sys, "executable", "/bin/false")
    verdicts = gate.gate_apart("rms_norm", 2, 0, 1)
    assert [v.kernel for v in verdicts] == list(OPS["rms_norm"].kernels)
    assert all(v.verdict == "red" and "ended with 1" in v.failure for v in verdicts)
