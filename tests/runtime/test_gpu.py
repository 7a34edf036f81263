"""The engine's laws where they are about the device: graphs, overlap, padding, memory. The demo checkpoint in bf16."""

import math

import pytest
import torch
from tiny import run, without_overlap

from nanodeploy import catalog
from nanodeploy.config import Config
from nanodeploy.runtime.engine import Engine
from nanodeploy.runtime.graphs import batch_sizes
from nanodeploy.sampling import SamplingParams
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import GenerateRequest


def test_graph_sizes():
    assert batch_sizes(1) == [1] and batch_sizes(3) == [1, 2, 3] and batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert batch_sizes(256)[-2:] == [248, 256]


def make_engine(**flags) -> Engine:
    flags = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "num_kvcache_blocks": 400, **flags}
    engine = Engine(Config(model="demo:qwen3", device="cuda", **flags))
    for cache in engine.runner.caches:
        cache.pages.fill_(math.nan)
    return engine


@pytest.fixture(scope="module")
def engine():
    return make_engine()


@pytest.fixture(scope="module")
def sums():
    """Prompts whose answers the demo knows for sure: that many roundings do not change them."""
    tokenizer = Tokenizer(catalog.locate("demo:qwen3").tokenizer_dir)
    texts = [f"<|im_start|>user\n{a}+{b}=?<|im_end|>\n<|im_start|>assistant\n" for a in range(1, 5) for b in (1, 2, 3)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def ask(prompts, **params):
    params = {"temperature": 0, "max_tokens": 24, **params}
    return [GenerateRequest(str(i), prompt, SamplingParams(**params)) for i, prompt in enumerate(prompts)]


def told(engine, requests, **how):
    engine.reset_prefix_cache()
    return {id: answer.told for id, answer in run(engine, requests, **how).items()}


@pytest.mark.gpu
@pytest.mark.parametrize("num_requests", [1, 2, 4, 8])
def test_graph_equals_eager(engine, sums, num_requests):
    """The same compiled layers at sizes that need no padding: equal to the token, over sure and unsure ones."""
    requests = ask(sums[:num_requests], ignore_eos=True, temperature=0.8, seed=5, max_tokens=40)
    wanted = told(engine, requests)
    graphs, engine.runner.graphs = engine.runner.graphs, None
    try:
        assert told(engine, requests) == wanted
    finally:
        engine.runner.graphs = graphs


@pytest.mark.gpu
def test_overlap_equals_no_overlap(engine):
    """Sequences of many lengths that never stop early, so that both ways run the same batches."""
    prompts = [[(i * j + 7) % 700 for j in range(1, 20 * i + 2)] for i in range(1, 13)]
    requests = [
        GenerateRequest(
            str(i),
            prompt,
            SamplingParams(
                max_tokens=20 + 3 * i, ignore_eos=True, seed=i, frequency_penalty=0.3 * (i % 2), logprobs=i % 3
            ),
        )
        for i, prompt in enumerate(prompts)
    ]
    assert told(engine, requests) == told(engine, requests, step=without_overlap)


@pytest.mark.gpu
def test_the_answer_does_not_depend_on_how_it_was_computed(engine, sums):
    """Padded, alone, in chunks, from the prefix cache, preempted, without graphs and compilation."""
    requests = ask(sums)
    wanted = told(engine, requests)
    assert all(reason == "stop" for _, reason, _ in wanted.values())
    for request in requests[:3]:
        assert told(engine, [request]) == {request.id: wanted[request.id]}
    assert {id: answer.told for id, answer in run(engine, requests).items()} == wanted  # pages are still cached
    assert told(make_engine(max_num_seqs=3, max_num_batched_tokens=7), requests) == wanted
    scarce = make_engine(kvcache_block_size=16, num_kvcache_blocks=6, max_num_seqs=8, max_model_len=90)
    longer = ask(sums, ignore_eos=True, max_tokens=60)
    answers = told(scarce, longer)
    assert scarce.stats().num_preemptions > 0
    for id, (tokens, _, _) in answers.items():
        assert tokens[: len(wanted[id][0])] == wanted[id][0]
    assert told(make_engine(enforce_eager=True), requests) == wanted


@pytest.mark.gpu
def test_no_op_falls_back_to_its_reference(engine):
    assert engine.info["kernels"] and not any("reference" in chosen for chosen in engine.info["kernels"].values())


@pytest.mark.gpu
def test_the_pool_is_what_the_memory_leaves():
    before = torch.cuda.memory_allocated()
    made = make_engine(num_kvcache_blocks=None, gpu_memory_utilization=0.2)
    free, total = torch.cuda.mem_get_info()
    assert 0.15 * total < total - free < 0.25 * total
    assert made.info["cache_bytes"] > 0.1 * total
    made.close()
    assert torch.cuda.memory_allocated() - before < 2**28
