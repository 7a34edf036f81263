"""Kernels of one order (ops/registry.py) give a row the same bits: with any number of rows, in either attention."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gate
from nanodeploy.ops.agreement import alone, bits, call
from nanodeploy.ops.decode_attention import decode_attention
from nanodeploy.ops.layouts import SPLIT_TOKENS
from nanodeploy.ops.linear import linear
from nanodeploy.ops.linear_silu_mul import linear_silu_mul
from nanodeploy.ops.prefill_attention import prefill_attention
from nanodeploy.ops.registry import OPS, Op

DEVICE = gate.default_device()
ON_GPU = DEVICE.type == "cuda"
MANY = settings(settings.get_profile("gpu" if ON_GPU else "ci"), max_examples=60 if ON_GPU else 12)
SEEDS = st.integers(0, 2**16)


def pairs(first: Op, second: Op):
    """(order, kernels of it of the first op, of the second), where they can run."""
    for order in sorted({k.order for k in first.kernels.values() if k.order}):
        both = [[k for k in op.kernels.values() if k.order == order] for op in (first, second)]
        if all(both):
            reason = next((why for k in both[0] + both[1] if (why := gate.why_not(k, DEVICE))), None)
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            yield pytest.param(*both, id=f"{first.name}, {second.name}: {order}", marks=marks)


def ordered(op: Op):
    for order in sorted({k.order for k in op.kernels.values() if k.order}):
        kernels = [k for k in op.kernels.values() if k.order == order]
        runnable = [k for k in kernels if not gate.why_not(k, DEVICE)]
        marks = [] if runnable else [pytest.mark.skip(reason=gate.why_not(kernels[0], DEVICE))]
        yield pytest.param(op, runnable or kernels, id=f"{op.name}: {order}", marks=marks)


@pytest.mark.parametrize(("op", "kernels"), [*ordered(linear), *ordered(linear_silu_mul)])
@settings(MANY)
@given(data=st.data(), seed=SEEDS)
def test_any_number_of_rows(op, kernels, data, seed):
    """Another number of rows takes other tiles, or another kernel of the order; the bits of a row stay."""
    fits = op.cases.strategy(st, small=not ON_GPU).filter(lambda case: any(k.when(case) for k in kernels))
    case = dataclasses.replace(data.draw(fits), num_tokens=data.draw(st.integers(1, 1500 if ON_GPU else 140)))
    x, weight = op.cases.make(case, DEVICE, seed)
    if not ON_GPU and kernels[0].needs != "cpu":  # the interpreter multiplies by NumPy: sums that are exact anyhow
        x, weight = x.round(), (weight * 8).round()
    begin = data.draw(st.integers(0, case.num_tokens - 1))
    end = data.draw(st.sampled_from([begin + 1, case.num_tokens]) | st.integers(begin + 1, case.num_tokens))
    results = []
    for kernel in kernels:
        for rows, place in ((x, slice(begin, end)), (x[begin:end], slice(None))):
            if kernel.when(op.cases.of(rows, weight)):
                results.append(kernel.fn(rows, weight)[place])
    for other in results[1:]:
        assert torch.equal(bits(other.contiguous()), bits(results[0].contiguous()))


@pytest.mark.parametrize(("decodes", "prefills"), pairs(decode_attention, prefill_attention))
@settings(MANY)
@given(data=st.data(), seed=SEEDS)
def test_a_token_is_decoded_with_the_bits_of_prefill(decodes, prefills, data, seed):
    """The last tokens of each sequence, decoded and as a chunk; alone, and as the end of a longer chunk."""
    small = not ON_GPU
    strategy = decode_attention.cases.strategy(st, small=small)
    case = data.draw(strategy.filter(lambda case: any(k.when(case) for k in decodes)))
    args = decode_attention.cases.make(case, DEVICE, seed)
    q, kv_pages, kv_scales, page_table, kv_lens, _, _, sinks, scale, window = args
    decoded = [k.fn(*args) for k in decodes if k.when(decode_attention.cases.of(*args))]
    num_queries = q.shape[0] // kv_lens.shape[0]
    longer = data.draw(st.integers(0, 600 if ON_GPU else 70))
    bounds, chunks = [0], []
    ends: list[int] = []
    rows: list[int] = []
    for seq, kv_len in enumerate(kv_lens.tolist()):
        if kv_len < num_queries:
            continue
        before = min(longer, kv_len - num_queries)
        own = q[seq * num_queries : (seq + 1) * num_queries]
        chunks += [torch.randn(before, *q.shape[1:], device=DEVICE).to(q.dtype), own]
        bounds.append(bounds[-1] + before + num_queries)
        ends += range(bounds[-1] - num_queries, bounds[-1])
        rows.append(seq)
    if not rows:
        return
    cu_q_lens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    rest = (sinks, scale, window, SPLIT_TOKENS)
    call = (torch.cat(chunks), kv_pages, kv_scales, page_table[rows], kv_lens[rows], cu_q_lens, *rest)
    wanted = torch.stack([decoded[0][seq * num_queries + i] for seq in rows for i in range(num_queries)])
    for kernel in prefills:
        if kernel.when(prefill_attention.cases.of(*call)):
            assert torch.equal(bits(kernel.fn(*call)[ends].contiguous()), bits(wanted.contiguous())), kernel.name
    for other in decoded[1:]:
        assert torch.equal(bits(other.contiguous()), bits(decoded[0].contiguous()))


ROW_BY_ROW = [op for op in OPS.values() if hasattr(op.cases, "ROWS") and not op.mutates]
ROW_BY_ROW = [op for op in ROW_BY_ROW if not any(k.needs == "cpu" and k.order for k in op.kernels.values())]


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in ROW_BY_ROW])
@settings(MANY)
@given(data=st.data(), seed=SEEDS)
def test_the_references_that_deterministic_runs_on_a_cpu(op, data, seed):
    """Ops without a kernel for --deterministic on the CPU run their reference there, which must not mix rows."""
    case = data.draw(op.cases.strategy(st, small=True))
    args = op.cases.make(case, torch.device("cpu"), seed)
    whole = call(op, op.reference, args)[1]
    for one_args, place in alone(op, args):
        for name, one in call(op, op.reference, one_args)[1].items():
            assert torch.equal(bits(one.contiguous()), bits(whole[name][place].contiguous())), name
