"""What the rooms of Gated DeltaNet layers owe each other, and the layout of their slots."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gate
from nanodeploy import ops
from nanodeploy.ops.gdn_scan import cases as scan
from nanodeploy.ops.gdn_scan.reference import CHUNK, gdn_scan
from nanodeploy.ops.gdn_step import cases as step
from nanodeploy.ops.gdn_step.reference import gdn_step
from nanodeploy.ops.states import StateLayout

DEVICE = gate.default_device()
ON_GPU = DEVICE.type == "cuda"
FEW = settings(settings.get_profile("gpu" if ON_GPU else "ci"), max_examples=20 if ON_GPU else 6)


def kernels(op):
    """Kernels of an op, and the reference, that run here."""
    for kernel in op.kernels.values():
        reason = gate.why_not(kernel, DEVICE)
        yield pytest.param(kernel.name, id=kernel.name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
    yield pytest.param("reference", id="reference")


@pytest.mark.parametrize("step_kernel", kernels(gdn_step))
@pytest.mark.parametrize("scan_kernel", kernels(gdn_scan))
@settings(FEW)
@given(data=st.data())
def test_a_scan_is_repeated_steps(scan_kernel, step_kernel, data):
    """Convolution, scan and norm of whole sequences give what one step after the other gives, and leave its states."""
    fits = [
        op.kernels[name].when for op, name in ((gdn_scan, scan_kernel), (gdn_step, step_kernel)) if name in op.kernels
    ]
    strategy = step.strategy(st, small=not ON_GPU).filter(lambda case: case.state_dtype == torch.float32)
    case = data.draw(strategy)
    case = dataclasses.replace(case, per_seq=data.draw(st.sampled_from([1, 3, CHUNK + 2])), keeps="last", gap=0)
    if case.per_seq > 3:
        case = dataclasses.replace(case, num_seqs=1)
    case = dataclasses.replace(case, num_slots=case.num_seqs)
    qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, *slots, eps = step.make(
        case, DEVICE, data.draw(st.integers(0, 99))
    )
    tails, states, read_slots, write_slots = slots
    bounds = case.per_seq * torch.arange(case.num_seqs + 1, dtype=torch.int32, device=DEVICE)
    scan_case = gdn_scan.cases.of(qkv, a, b, a_log, dt_bias, states, bounds, read_slots, write_slots)
    if not all(when(c) for when, c in zip(fits, (scan_case, case))):
        return

    scan_tails, scan_states = tails.clone(), states.clone()
    with gate.forced(gdn_scan, scan_kernel):
        conv = ops.causal_conv(qkv, conv_weight, scan_tails, bounds, read_slots, write_slots)
        mixed = ops.gdn_scan(conv, a, b, a_log, dt_bias, scan_states, bounds, read_slots, write_slots)
    whole = ops.gated_rms_norm(mixed, z, norm_weight, eps)

    came, out = read_slots, torch.empty_like(whole)
    own = write_slots.view(case.num_seqs, -1)[:, -1].contiguous()
    with gate.forced(gdn_step, step_kernel):
        for token in range(case.per_seq):
            rows = torch.arange(token, len(qkv), case.per_seq, device=DEVICE)
            one = [t[rows] for t in (qkv, z, a, b)]
            out[rows] = ops.gdn_step(*one, conv_weight, a_log, dt_bias, norm_weight, tails, states, came, own, eps)
            came = own
    assert torch.equal(tails, scan_tails)
    assert scan.near(scan_states, states, case.dtype) is None
    # The norm makes rows of tiny values large, and their errors with them.
    size = whole.double().square().mean().sqrt().item()
    error = (whole.double() - out.double()).square().mean().sqrt().item()
    assert error <= (2e-4 if case.dtype == torch.float32 else 4 * torch.finfo(case.dtype).eps) * size


def test_on_the_cpu_scan_and_steps_have_one_order():
    """--deterministic: a token has the bits of a decode whether it is decoded or part of a prompt."""
    assert gdn_scan.kernels["rows"].order == gdn_step.kernels["rows"].order == "rows"
    case = step.Case(torch.float32, 2, 70, 2, 4, 16, 32, 2, keeps="last")
    qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, *_ = step.make(case, torch.device("cpu"), 0)
    bounds = torch.tensor([0, 70, 140], dtype=torch.int32)
    own = torch.arange(2, dtype=torch.int32)
    fresh = torch.full_like(own, -1)
    write_slots = torch.full((140,), -1, dtype=torch.int32)
    write_slots[[69, 139]] = own
    one_slots = [case.layout.empty(2, torch.device("cpu")) for _ in range(2)]
    names = {"causal_conv": "rows", "gdn_scan": "rows", "gdn_step": "rows"}
    conv = ops.causal_conv.kernels[names["causal_conv"]].fn(
        qkv, conv_weight, one_slots[0].tails, bounds, fresh, write_slots
    )
    mixed = gdn_scan.kernels["rows"].fn(conv, a, b, a_log, dt_bias, one_slots[0].states, bounds, fresh, write_slots)
    assert torch.isfinite(mixed).all()
    came = fresh
    for token in range(70):
        rows = torch.tensor([token, 70 + token])
        stepped = gdn_step.kernels["rows"].fn(
            qkv[rows],
            z[rows],
            a[rows],
            b[rows],
            conv_weight,
            a_log,
            dt_bias,
            norm_weight,
            *one_slots[1],
            came,
            own,
            1e-6,
        )
        for row, got in zip(rows, stepped):
            assert torch.equal(got, ops.gated_rms_norm.reference(mixed[row], z[row], norm_weight, 1e-6))
        came = own
    assert torch.equal(one_slots[0].tails, one_slots[1].tails)
    assert torch.equal(one_slots[0].states, one_slots[1].states)


def test_slots_are_as_large_as_they_say():
    for dtype, state_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        layout = StateLayout(2 * 4 * 16 + 8 * 32, 4, 8, 32, 16, dtype, state_dtype)
        tails, states = layout.empty(5, torch.device("cpu"))
        assert tails.shape == (5, 3, 384) and states.shape == (5, 8, 32, 16)
        assert (tails.dtype, states.dtype) == (dtype, state_dtype)
        assert tails.nbytes + states.nbytes == 5 * layout.slot_bytes
