"""All layers share one piece of compiled code, and a step never copies a cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import PagedRunner
from tiny_models import FAMILIES, build, hf_model, prompt, save
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import profile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(hf_model(), tmp_path_factory.mktemp("saved"))


def steps(runner: PagedRunner, sizes) -> list[torch.Tensor]:
    out = []
    for i, size in enumerate(sizes):
        logits = runner.step(chunks={str(i % 3): prompt(size, seed=i)}, padding=0 if size == 1 else i % 2)
        out += logits.values()
    out += runner.step(decodes={"0": 5}, chunks={"other": prompt(11)}).values()
    out += runner.step(decodes={"0": 6, "other": 7}).values()
    return out


@pytest.fixture(scope="module")
def saved_families(tmp_path_factory):
    return {family: save(hf_model(family=family), tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=3, deadline=None)
@given(order=st.permutations([1, 2, 7, 64, 1, 3]))
def test_three_layers_of_any_sizes_compile_twice_for_each_kind(saved_families, family, order):
    """Once for one token, once for more; then neither another order, another cache nor other buffers matter."""
    torch._dynamo.reset()
    directory = saved_families[family]
    compiled, counter = build(directory), CompileCounterWithBackend("eager")
    compiled.compile_layers(backend=counter)
    num_kinds = len({type(layer.mlp) for layer in compiled.model.layers})
    assert num_kinds == (1 if family.startswith("qwen3") else 2)
    got = steps(PagedRunner(compiled, page_size=4), order)
    assert counter.frame_count == 2 * num_kinds
    torch.testing.assert_close(got, steps(PagedRunner(build(directory), page_size=4), order))
    steps(PagedRunner(compiled, page_size=4, num_pages=150, max_seqs=9, max_len=400), order)
    assert counter.frame_count == 2 * num_kinds


def largest_allocation(model, runner: PagedRunner) -> int:
    """Bytes of the largest tensor that one step makes."""
    batch = runner.batch({}, {"measured": prompt(5)})
    with torch.inference_mode(), profile(profile_memory=True) as recorded:
        model(batch, runner.caches)
    return max(event.self_cpu_memory_usage for event in recorded.events())


@pytest.mark.slow
def test_inductor_equals_eager_and_writes_the_cache_in_place(saved):
    eager, compiled = build(saved), build(saved)
    compiled.compile_layers()
    runner = PagedRunner(compiled, page_size=16, num_pages=500)
    addresses = [cache.pages.data_ptr() for cache in runner.caches]
    other = PagedRunner(eager, page_size=16, num_pages=500)
    for size in (5, 1, 30):
        torch.testing.assert_close(
            runner.step(chunks={"a": prompt(size)})["a"], other.step(chunks={"a": prompt(size)})["a"]
        )
    for cache, wanted in zip(runner.caches, other.caches, strict=True):
        torch.testing.assert_close(cache.pages, wanted.pages, equal_nan=True)
    assert addresses == [cache.pages.data_ptr() for cache in runner.caches]
    assert largest_allocation(compiled, runner) < runner.caches[0].pages.nbytes / 50


def test_the_measure_of_allocations_sees_a_copied_cache(saved):
    """The control: aot_eager runs the functional graph as it is, which copies each cache."""
    model = build(saved)
    model.compile_layers(backend="aot_eager")
    runner = PagedRunner(model, page_size=16, num_pages=500)
    runner.step(chunks={"a": prompt(5)})
    assert largest_allocation(model, runner) >= runner.caches[0].pages.nbytes
