"""--deterministic: a request's tokens and log-probabilities are the same to the bit however the engine came to them."""

import functools
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, make_model, run
from tiny import make_engine as make_tiny

from nanodeploy.config import Config
from nanodeploy.runtime.engine import Engine
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest

# Ways to run the same requests: by what is scarce.
WAYS = {"plain": {}, "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 3}, "few pages": {}}
MOST_TOKENS = 12  # of an answer
LONGEST = {**dict.fromkeys(FAMILIES, 60), "cuda": 600}  # of a prompt; on the GPU past one stretch of attention's sums
PAGES = {**dict.fromkeys(FAMILIES, 7), "cuda": 45}  # of 16 tokens, where they are few


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory):
    directories = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, directory in directories.items():
        make_model(family).save_pretrained(directory)

    @functools.cache
    def make(device: str, way: str) -> Engine:
        """`device` is cuda, or a family, whose tiny model then runs on the CPU."""
        flags: dict = {"kvcache_block_size": 16, "deterministic": True, **WAYS[way]}
        if way == "few pages":
            flags |= {"num_kvcache_blocks": PAGES[device], "max_model_len": LONGEST[device] + MOST_TOKENS}
        if device != "cuda":
            return make_tiny(directories[device], **flags)
        flags = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "num_kvcache_blocks": 400, **flags}
        engine = Engine(Config(model="demo:qwen3", device="cuda", **flags))
        for cache in engine.runner.caches:
            cache.pages.fill_(math.nan)
        return engine

    return make


def drawn(data, device: str, least: int) -> list[GenerateRequest]:
    """Requests that share prefixes and never stop early; some are sampled."""
    requests = []
    for i in range(data.draw(st.integers(least, 6))):
        text, length = data.draw(st.integers(0, 1)), data.draw(st.integers(1, LONGEST[device]))
        prompt = [(7 * j * j + 3 * j + text) % (VOCAB - 1) for j in range(length)]
        params = SamplingParams(
            temperature=data.draw(st.sampled_from([0.0, 0.9])),
            seed=data.draw(st.integers(0, 99)),
            max_tokens=data.draw(st.integers(1, MOST_TOKENS)),
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=data.draw(st.sampled_from([None, 2])),
        )
        requests.append(GenerateRequest(str(i), prompt, params))
    return requests


def told(engine: Engine, requests, arrivals=None, forget=True) -> dict:
    """What each request was told: tokens, their log-probabilities, those of its prompt. All numbers as they are."""
    if forget:
        engine.reset_prefix_cache()
    answers = run(engine, requests, arrivals)
    scores = {id: [e.prompt_logprobs for e in a.events if e.prompt_logprobs is not None] for id, a in answers.items()}
    return {id: (a.tokens, a.logprobs, scores[id]) for id, a in answers.items()}


def check_however_it_was_computed(engine_of, device, data) -> None:
    requests = drawn(data, device, least=2)
    arrivals = [data.draw(st.integers(0, 9)) for _ in requests]
    engine = engine_of(device, "plain")
    wanted: dict = {}
    for request in requests:
        wanted |= told(engine, [request])
    assert told(engine, requests, arrivals) == wanted
    assert told(engine, requests, forget=False) == wanted  # from the prefix cache
    assert told(engine_of(device, "chunks of 7"), requests, arrivals) == wanted
    assert told(engine_of(device, "few pages"), requests, arrivals) == wanted


def check_scores_of_an_answer(engine_of, device, data) -> None:
    engine = engine_of(device, "plain")
    requests = drawn(data, device, least=1)
    answers = told(engine, requests)
    again = []
    for request in requests:
        params = msgspec.structs.replace(request.params, max_tokens=1, prompt_logprobs=2)
        again.append(GenerateRequest(request.id, request.prompt_token_ids + answers[request.id][0], params))
    for id, (_, _, [scores]) in told(engine, again).items():
        tokens, logprobs, _ = answers[id]
        assert scores[-len(tokens) :] == logprobs


def check_few_pages_preempt(engine_of, device) -> None:
    engine = engine_of(device, "few pages")
    prompt = [3 * j % 50 for j in range(LONGEST[device])]
    params = SamplingParams(temperature=0, max_tokens=MOST_TOKENS, ignore_eos=True, logprobs=0)
    length = PAGES[device] // 2 * 16 - 3  # there is room for both, until they have grown by 4 tokens
    requests = [GenerateRequest(str(i), [i, *prompt[1:length]], params) for i in range(2)]
    before = engine.stats().num_preemptions
    together = told(engine, requests)
    assert engine.stats().num_preemptions > before
    assert together == told(engine, requests[:1]) | told(engine, requests[1:])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_however_it_was_computed(engine_of, family, data):
    check_however_it_was_computed(engine_of, family, data)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_prompt_logprobs_of_an_answer_are_its_logprobs(engine_of, family, data):
    check_scores_of_an_answer(engine_of, family, data)


@pytest.mark.parametrize("family", FAMILIES)
def test_preemption(engine_of, family):
    check_few_pages_preempt(engine_of, family)


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_however_it_was_computed_on_a_gpu(engine_of, data):
    check_however_it_was_computed(engine_of, "cuda", data)


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_prompt_logprobs_of_an_answer_are_its_logprobs_on_a_gpu(engine_of, data):
    check_scores_of_an_answer(engine_of, "cuda", data)


@pytest.mark.gpu
def test_preemption_on_a_gpu(engine_of):
    check_few_pages_preempt(engine_of, "cuda")
