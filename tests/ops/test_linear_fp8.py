"""FP8 products beyond what every kernel is held to: bits that do not depend on the batch, NaN, and strided input."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import gate
from nanodeploy import ops
from nanodeploy.ops.agreement import bits
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK, empty_token_scales, fp8_scales

DEVICE = gate.default_device()
ON_GPU = DEVICE.type == "cuda"
MANY = settings(settings.get_profile("gpu" if ON_GPU else "ci"), max_examples=60 if ON_GPU else 10)
KERNELS = [k for k in ops.linear_fp8.kernels.values() if k.order == "k128" and not gate.why_not(k, DEVICE)]


@settings(MANY)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_any_number_of_tokens(data, seed):
    """Another number of tokens takes other tiles, or another kernel of the order; the bits of a row stay."""
    cases = ops.linear_fp8.cases
    case = data.draw(cases.strategy(st, small=not ON_GPU).filter(lambda case: any(k.when(case) for k in KERNELS)))
    case = dataclasses.replace(case, num_tokens=data.draw(st.integers(1, 1500 if ON_GPU else 140)))
    x, x_scales, weight, weight_scales, dtype = cases.make(case, DEVICE, seed)
    if not ON_GPU:  # the interpreter multiplies by NumPy: sums that are exact anyhow
        x, weight = (torch.randint(-8, 9, t.shape, device=DEVICE).to(E4M3) for t in (x, weight))
    begin = data.draw(st.integers(0, case.num_tokens - 1))
    end = data.draw(st.sampled_from([begin + 1, case.num_tokens]) | st.integers(begin + 1, case.num_tokens))
    results = []
    for kernel in KERNELS:
        for place, rows in ((slice(begin, end), slice(None)), (slice(None), slice(begin, end))):
            args = x[rows], x_scales[rows], weight, weight_scales, dtype
            if kernel.when(cases.of(*args)):
                results.append(kernel.fn(*args)[place])
    assert results
    for other in results[1:]:
        assert torch.equal(bits(other.contiguous()), bits(results[0].contiguous()))


@pytest.mark.skipif(not KERNELS, reason="no kernel can run here")
def test_rows_and_scales_as_they_come():
    """Rows with gaps, rows that begin off 16 bytes, scales that lie by rows."""
    g = torch.Generator(DEVICE).manual_seed(0)
    wide = torch.randint(-8, 9, (5, 300), generator=g, device=DEVICE).to(E4M3)
    weight = torch.randint(-8, 9, (130, 272), generator=g, device=DEVICE).to(E4M3)
    scales = torch.rand((5, 3), generator=g, device=DEVICE) + 0.5
    weight_scales = torch.rand((2, 3), generator=g, device=DEVICE) / 1000
    for first in (0, 3, 16):
        x = wide[:, first : first + 272]
        wanted = ops.linear_fp8.reference(x, scales, weight, weight_scales, torch.float32)
        for laid_out in (scales, empty_token_scales(5, 272, DEVICE).copy_(scales)):
            for kernel in KERNELS:
                if kernel.when(ops.linear_fp8.cases.of(x, laid_out, weight, weight_scales, torch.float16)):
                    got = kernel.fn(x, laid_out, weight, weight_scales, torch.float16)
                    assert torch.allclose(got.float(), wanted, rtol=2e-3, atol=1e-4), (kernel.name, first)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(odd):
    """It makes its own row NaN, and no other; nothing turns it into a number."""
    if ON_GPU:
        quantisers = [kernel.fn for kernel in ops.quantize_fp8.kernels.values() if kernel.available()]
        products = [kernel.fn for kernel in KERNELS]
    else:
        quantisers, products = [ops.quantize_fp8.reference], [ops.linear_fp8.reference]
    weight = torch.ones(128, 256, device=DEVICE).to(E4M3)
    weight_scales = torch.ones(1, 2, device=DEVICE)
    x = torch.ones(70, 256, device=DEVICE, dtype=torch.bfloat16)
    x[3, 130] = odd
    for quantise in quantisers:
        values, scales = quantise(x)
        for product in products:
            row_is_nan = product(values, scales, weight, weight_scales, torch.bfloat16).isnan().all(dim=1)
            assert row_is_nan.nonzero().tolist() == [[3]]


@given(st.lists(st.floats(0, 2.0**127, width=32), min_size=1, max_size=8))
def test_scales_can_be_divided_by(amax):
    scales = fp8_scales(torch.tensor(amax))
    assert (scales > 0).all() and (1 / scales).isfinite().all()
    assert ((torch.tensor(amax) * (1 / scales)) <= 448.0001).all()


def test_scales_lie_as_tma_wants_them():
    for num_tokens in (0, 1, 3, 4, 5, 130):
        scales = empty_token_scales(num_tokens, 300, DEVICE)
        assert scales.shape == (num_tokens, 3) and scales.dtype == torch.float32
        assert (scales.stride(0) == 1 and scales.stride(1) * 4 % 16 == 0) or num_tokens == 0
        values, made = ops.quantize_fp8(torch.ones(num_tokens, 300, device=DEVICE))
        assert made.stride() == scales.stride() and values.shape == (num_tokens, 300)
    assert FP8_BLOCK == 128
