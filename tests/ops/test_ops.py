"""Every kernel of every op, against its reference: on a GPU in full, else in Triton's interpreter on small cases.

Nothing here names an op: what the registry lists is tested, by the checks of bench/gate.py and the room's own cases.py.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gate
from nanodeploy.ops.registry import OPS

DEVICE = gate.default_device()
ON_GPU = DEVICE.type == "cuda"
MANY = settings(settings.get_profile("gpu" if ON_GPU else "ci"), max_examples=60 if ON_GPU else 40)
FEW = settings(MANY, max_examples=MANY.max_examples // 4)
SEEDS = st.integers(0, 2**16)


def kernels(applies=lambda op, kernel: True):
    """Parameters (op, kernel) of the kernels that a check applies to; those that cannot run here are skipped."""
    for op in OPS.values():
        for kernel in op.kernels.values():
            if applies(op, kernel):
                reason = gate.why_not(kernel, DEVICE)
                marks = [pytest.mark.skip(reason=reason)] if reason else []
                yield pytest.param(op, kernel, id=f"{op.name}/{kernel.name}", marks=marks)


every_kernel = pytest.mark.parametrize(("op", "kernel"), kernels())
every_op = pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in OPS.values()])


@every_kernel
@settings(MANY)
@given(data=st.data())
def test_kernel_agrees_on_poisoned_memory(op, kernel, data):
    gate.agreement(op, kernel, data.draw(gate.cases(op, kernel, DEVICE)), DEVICE, data.draw(SEEDS))


@pytest.mark.parametrize(("op", "kernel"), kernels(lambda op, kernel: getattr(op.cases, "LAWS", None)))
@settings(FEW)
@given(data=st.data())
def test_kernel_keeps_the_laws_of_its_room(op, kernel, data):
    gate.laws(op, kernel, data.draw(gate.cases(op, kernel, DEVICE)), DEVICE, data.draw(SEEDS))


@pytest.mark.parametrize(("op", "kernel"), kernels(lambda op, kernel: kernel.batch_invariant and not op.mutates))
@settings(FEW)
@given(data=st.data())
def test_row_alone_has_the_bits_it_has_in_the_batch(op, kernel, data):
    says_rows = hasattr(op.cases, "ROWS") or hasattr(op.cases, "alone")
    assert says_rows, f"{kernel.name} declares batch_invariant; {op.name}/cases.py needs ROWS or alone() to prove it"
    gate.invariance(op, kernel, data.draw(gate.cases(op, kernel, DEVICE)), DEVICE, data.draw(SEEDS))


@every_kernel
def test_torch_compile_takes_it_whole_and_once(op, kernel):
    (case,) = gate.draw(gate.cases(op, kernel, DEVICE).filter(gate.has_two_sizes), 1, op)
    gate.compiler(op, kernel, case, DEVICE, seed=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "kernel"), kernels(lambda op, kernel: getattr(kernel, "capturable", True)))
@settings(FEW)
@given(data=st.data())
def test_graph_replays_with_other_values(op, kernel, data):
    gate.capture(op, kernel, data.draw(gate.cases(op, kernel, DEVICE)), DEVICE, data.draw(SEEDS))


@pytest.mark.gpu
@every_kernel
def test_kernel_agrees_at_real_shapes(op, kernel):
    for seed, case in enumerate(op.cases.POINTS.values()):
        if kernel.when(gate.open_case(case)):
            gate.agreement(op, kernel, case, DEVICE, seed)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "kernel"), kernels(lambda op, kernel: hasattr(op.cases, "FAR") and kernel.when(op.cases.FAR))
)
def test_addresses_past_two_to_the_31(op, kernel):
    gate.far(op, kernel, op.cases.FAR, DEVICE, seed=0)


# The rooms themselves.


@every_op
@settings(FEW)
@given(data=st.data())
def test_dispatch_sees_the_case_that_was_made(op, data):
    """`of` finds again what `make` was told, but for what only the host knows."""
    case = data.draw(op.cases.strategy(st, small=not ON_GPU))
    assert op.cases.of(*op.cases.make(case, DEVICE, data.draw(SEEDS))) == gate.open_case(case)


@every_op
@settings(FEW)
@given(data=st.data())
def test_reference_rounds_like_its_dtype(op, data):
    """The reference's error against float64 is that of a rounding or two, so it can set the kernels' budget."""
    case = data.draw(op.cases.strategy(st, small=not ON_GPU))
    args = op.cases.make(case, DEVICE, data.draw(SEEDS))
    expected = gate.Truth(op, case, args)
    for name, truth in (expected.truth or {}).items():
        ref = expected.ref[name]
        if not ref.is_floating_point() or (name in op.mutates and hasattr(op.cases, "agrees_written")):
            continue  # equal, or judged by the room itself
        assert torch.equal(ref.double().isnan(), truth.isnan())
        finite = truth.isfinite()
        error = torch.linalg.vector_norm(ref.double()[finite] - truth[finite])
        slack = 64 if ref.dtype == torch.float32 else 1  # fp32: the sums round too, and a softmax scales their error
        assert error <= slack * torch.finfo(ref.dtype).eps * torch.linalg.vector_norm(truth[finite])


@every_op
def test_reference_is_a_torch_op(op):
    """Schema, fake outputs (shapes, dtypes, strides) and aliasing hold for the reference as for any kernel."""
    (case,) = gate.draw(op.cases.strategy(st, small=True).filter(gate.has_two_sizes), 1, op)
    with gate.forced(op, "reference"):
        gate.opcheck(op, op.cases.make(case, DEVICE, 0))


@every_op
def test_points_cost_something_and_regions_name_points(op):
    for case in op.cases.POINTS.values():
        cost = op.cases.cost(case)
        assert cost.num_bytes > 0 and cost.flops >= 0
        assert dataclasses.fields(case)[0].name == "dtype"
    for where, points in getattr(op.cases, "REGIONS", ()):
        assert set(points) <= op.cases.POINTS.keys()
        assert all(hasattr(op.cases.POINTS[point], axis) for axis in where for point in points)
