"""The whole engine on a CPU. One law: whatever else runs, a request gets what transformers' model gives it alone."""

import gc
import json
import weakref

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import END, FAMILIES, MAX_LEN, VOCAB, Oracle, PaddedSteps, make_engine, make_model, run, take, without_overlap
from torch._dynamo.testing import CompileCounter

from nanodeploy.config import Config
from nanodeploy.errors import ConfigError, QueueFullError, RequestError
from nanodeploy.runtime import step
from nanodeploy.runtime.engine import Engine
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest

every_family = pytest.mark.parametrize("hf", FAMILIES, indirect=True, scope="session")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="session")
def hf(request):
    """Of Qwen3, unless the test asks for others too."""
    return make_model(getattr(request, "param", "qwen3"))


@pytest.fixture(scope="session")
def oracle(hf):
    with torch.inference_mode():
        yield Oracle(hf)


@pytest.fixture(scope="session")
def checkpoint(hf, tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    hf.save_pretrained(directory)
    return directory


# Prompts are cut from few texts, so that they share prefixes, and their lengths lie around the edges of pages.
TEXTS = [[(7 * i * i + 3 * i + k) % (VOCAB - 1) for i in range(80)] for k in (1, 5)]
prompts = st.builds(
    lambda text, length: TEXTS[text][:length],
    st.integers(0, 1),
    st.integers(1, 70) | st.sampled_from([15, 16, 17, 31, 32, 33, 48]),
)
token_ids = st.integers(0, VOCAB - 1)
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([0, -1, 1, 5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5]),
    min_p=st.sampled_from([0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    logit_bias=st.none() | st.dictionaries(token_ids, st.sampled_from([-100.0, -3.0, 4.0]), max_size=4),
    seed=st.integers(-5, 5),
    stop_token_ids=st.lists(token_ids, max_size=2),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 3, 6]),
    max_tokens=st.sampled_from([1, 6, 20, None]),
    logprobs=st.sampled_from([None, None, 0, 3]),
    prompt_logprobs=st.sampled_from([None, None, 0, 2]),
).filter(lambda params: params.min_tokens <= (params.max_tokens or MAX_LEN))
engines = st.fixed_dictionaries(
    {
        "kvcache_block_size": st.sampled_from([4, 16]),
        "max_num_seqs": st.integers(1, 6),
        "max_num_batched_tokens": st.sampled_from([6, 17, 256]),
        "num_kvcache_blocks": st.sampled_from([None, MAX_LEN // 4, MAX_LEN // 4 + 7]),  # scarce at 4 tokens a page
        "enable_prefix_caching": st.booleans(),
    }
)


def check_scores(got, token, raw, num_top):
    """One position's Logprobs against the raw log-probabilities [V] there."""
    assert got.token_id == token and len(got.top_ids) == len(got.top_logprobs) == num_top
    assert got.logprob == pytest.approx(raw[token].item(), abs=1e-4)
    assert got.rank == 1 + (raw > raw[token]).sum().item()
    best = raw.topk(num_top)
    assert got.top_ids == best.indices.tolist()
    assert got.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


def check(oracle, requests, answers):
    assert answers.keys() == {request.id for request in requests}
    for request in requests:
        answer, params, prompt = answers[request.id], request.params, request.prompt_token_ids
        told, rows = oracle.answer(request, answer.tokens)
        assert answer.told == told
        assert all(event.num_prompt_tokens == len(prompt) for event in answer.events)
        assert len(answer.logprobs) == (0 if params.logprobs is None else len(told[0]))
        for got, token, raw in zip(answer.logprobs, told[0], rows):
            check_scores(got, token, raw, params.logprobs)
        first, rest = answer.events[0], answer.events[1:]
        assert all(event.prompt_logprobs is None for event in rest)
        if params.prompt_logprobs is None:
            assert first.prompt_logprobs is None
        else:
            scores, raw = first.prompt_logprobs, oracle.logits(prompt).log_softmax(-1)
            assert scores[0] is None and len(scores) == len(prompt)
            for position in range(1, len(prompt)):
                check_scores(scores[position], prompt[position], raw[position - 1], params.prompt_logprobs)


@every_family
@given(
    flags=engines,
    asked=st.lists(st.tuples(prompts, sampling, st.integers(0, 8)), min_size=1, max_size=6),
    overlap=st.booleans(),
    padded=st.booleans(),
)
@settings(max_examples=25)
def test_every_request_gets_what_it_would_get_alone(checkpoint, oracle, flags, asked, overlap, padded):
    """Alone = batched = chunked = cached = preempted, for any sampling; overlapping steps change nothing, nor does
    padding as CUDA graphs have it."""
    engine = make_engine(checkpoint, **flags)
    if padded:
        engine.runner.graphs = PaddedSteps(engine)
    requests = [GenerateRequest(str(i), prompt, params) for i, (prompt, params, _) in enumerate(asked)]
    arrivals = [arrival for _, _, arrival in asked]
    answers = run(engine, requests, arrivals, Engine.step if overlap else without_overlap)
    check(oracle, requests, answers)


@every_family
def test_preempted_requests_go_on_where_they_were(checkpoint, oracle):
    params = [
        SamplingParams(max_tokens=60, ignore_eos=True, seed=3, frequency_penalty=0.5, logprobs=2, prompt_logprobs=1),
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=0, repetition_penalty=1.2),
        SamplingParams(max_tokens=60, ignore_eos=True, seed=4, min_tokens=50, stop_token_ids=[1, 2, 3]),
    ]
    engine = make_engine(checkpoint, kvcache_block_size=4, num_kvcache_blocks=MAX_LEN // 4)
    requests = [GenerateRequest(str(i), TEXTS[0][: 5 + i], p) for i, p in enumerate(params)]
    answers = run(engine, requests)
    assert engine.stats().num_preemptions > 0
    check(oracle, requests, answers)


@every_family
def test_a_prefix_is_computed_once(checkpoint, oracle):
    engine = make_engine(checkpoint)
    ask = [GenerateRequest(str(i), TEXTS[0][:50], GREEDY) for i in range(2)]
    ask += [GenerateRequest("salted", TEXTS[0][:50], GREEDY, cache_salt="x")]
    answers = [run(engine, [request])[request.id] for request in ask]
    assert [answer.end.num_cached_tokens for answer in answers] == [0, 48, 0]
    assert engine.stats().prefix_queries == 150 and engine.stats().prefix_hits == 48
    engine.reset_prefix_cache()
    again = GenerateRequest("again", TEXTS[0][:50], GREEDY)
    answers.append(run(engine, [again])["again"])
    assert answers[-1].end.num_cached_tokens == 0
    check(oracle, [*ask, again], {answer.end.id: answer for answer in answers})


@every_family
def test_sequences_on_one_prefix_are_grouped_and_get_their_own_answers(checkpoint, oracle, monkeypatch):
    """Decodes are put into an order in which groups are adjacent; whose token is whose must not depend on it."""
    monkeypatch.setattr(step, "MIN_GROUP", 2)
    monkeypatch.setattr(step, "MIN_PREFIX_TOKENS", 16)
    engine = make_engine(checkpoint, kvcache_block_size=4)
    engine.runner.graphs = PaddedSteps(engine)
    run(engine, [GenerateRequest(f"first {k}", TEXTS[k][:40], GREEDY) for k in range(2)])
    requests = [
        GenerateRequest(str(i), [*TEXTS[i % 2][: 40 - i % 3], i], msgspec.structs.replace(GREEDY, logprobs=1, seed=i))
        for i in range(7)
    ]
    check(oracle, requests, run(engine, requests))
    assert any(form.shared for form in engine.runner.graphs.forms)
    prefixes = engine.runner.inputs.decode.device.prefixes[:7]
    assert sorted(map(tuple, prefixes.tolist())) == [(0, 36)] * 4 + [(4, 36)] * 3


def test_requests_without_a_seed_get_theirs_from_the_engine(checkpoint, oracle):
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    requests = [GenerateRequest(str(i), TEXTS[0][:5], params) for i in range(4)]
    first = run(make_engine(checkpoint, seed=7), requests)
    second = run(make_engine(checkpoint, seed=7, max_num_seqs=1), requests)
    other = run(make_engine(checkpoint, seed=8), requests)
    tokens = [[answers[str(i)].tokens for i in range(4)] for answers in (first, second, other)]
    assert tokens[0] == tokens[1] != tokens[2]
    assert len({tuple(t) for t in tokens[0]}) == 4


@every_family
def test_64_greedy_tokens_however_they_were_computed(checkpoint, oracle):
    """Alone, from the prefix cache, in a batch, in padded steps, cut into chunks of several sizes, preempted."""
    params = msgspec.structs.replace(GREEDY, max_tokens=64)
    requests = [GenerateRequest(str(i), TEXTS[i % 2][: 30 - 4 * i], params) for i in range(4)]
    engine = make_engine(checkpoint)
    alone = {}
    for request in requests:
        alone |= run(engine, [request])
    check(oracle, requests, alone)
    told = {id: answer.told for id, answer in alone.items()}
    assert len({token for tokens, _, _ in told.values() for token in tokens}) > 9  # a loop would be easy to hit
    scarce = make_engine(checkpoint, kvcache_block_size=4, num_kvcache_blocks=MAX_LEN // 4 + 9)
    padded = make_engine(checkpoint)
    padded.runner.graphs = PaddedSteps(padded)
    chunked = [make_engine(checkpoint, max_num_seqs=3, max_num_batched_tokens=size) for size in (3, 7, 16)]
    for each in (engine, scarce, padded, *chunked):
        assert {id: answer.told for id, answer in run(each, requests).items()} == told
    assert engine.stats().prefix_hits > 0 and scarce.stats().num_preemptions > 0


@pytest.mark.parametrize("phase", ["inbox", "waiting", "prefill", "decode", "last token in flight", "ended"])
def test_an_abort_frees_everything_at_once(checkpoint, oracle, phase):
    engine = make_engine(checkpoint, max_num_seqs=2, max_num_batched_tokens=8, enable_prefix_caching=False)
    other = GenerateRequest("other", TEXTS[1][:3], GREEDY)
    victim = GenerateRequest("victim", TEXTS[0][:30], msgspec.structs.replace(GREEDY, max_tokens=3))
    answers: dict = {}
    engine.submit(other)
    if phase == "waiting":
        engine.submit(GenerateRequest("blocker", TEXTS[1][:40], GREEDY))
    engine.submit(victim)
    num_steps = {"inbox": 0, "waiting": 2, "prefill": 2, "decode": 6, "last token in flight": 7, "ended": 12}[phase]
    for _ in range(num_steps):
        take(answers, engine.step())
    engine.abort("victim")
    engine.abort("nobody")
    take(answers, engine.step())
    reason = "length" if phase == "ended" else "abort"
    assert answers["victim"].end.finish_reason == reason
    tokens = answers["victim"].tokens
    assert oracle.answer(victim, tokens)[0][0][: len(tokens)] == tokens
    assert not any(request.id == "victim" for request in engine.scheduler.running)
    while engine.busy():
        take(answers, engine.step())
    assert engine.stats().num_free_pages == engine.num_pages
    check(oracle, [other], {"other": answers["other"]})
    check(oracle, [victim], run(engine, [victim]))  # its id and its place are free again


@pytest.mark.parametrize(
    ("prompt", "params", "param", "code"),
    [
        ([], {}, "prompt", None),
        ([VOCAB], {}, "prompt", None),
        ([-1], {}, "prompt", None),
        ([2**70], {}, "prompt", None),
        ([1] * MAX_LEN, {}, "prompt", "context_length_exceeded"),
        ([1], {"temperature": float("nan")}, "temperature", None),
        ([1], {"max_tokens": 0}, "max_tokens", None),
        ([1], {"stop_token_ids": [VOCAB]}, "stop_token_ids", None),
        ([1], {"logit_bias": {VOCAB: 1.0}}, "logit_bias", None),
        ([1], {"logprobs": 21}, "logprobs", None),
        ([1], {"prompt_logprobs": 10**9}, "prompt_logprobs", None),
        ([1], {"min_tokens": 20, "max_tokens": 3}, "min_tokens", None),
        ([1], {"seed": 2**63}, "seed", None),
    ],
)
def test_a_bad_request_is_refused_and_hurts_nobody(checkpoint, oracle, prompt, params, param, code):
    engine = make_engine(checkpoint)
    good = GenerateRequest("good", TEXTS[0][:20], GREEDY)
    engine.submit(good)
    answers: dict = {}
    take(answers, engine.step())
    with pytest.raises(RequestError) as error:
        engine.submit(GenerateRequest("bad", prompt, SamplingParams(**params)))
    assert (error.value.param, error.value.code) == (param, code)
    with pytest.raises(RequestError):
        engine.submit(good)  # its id is in use
    while engine.busy():
        take(answers, engine.step())
    check(oracle, [good], answers)


def test_the_queue_is_bounded(checkpoint):
    engine = make_engine(checkpoint, max_num_seqs=2, max_num_waiting=3)
    for i in range(5):
        engine.submit(GenerateRequest(str(i), [1], GREEDY))
    with pytest.raises(QueueFullError, match="3 requests wait"):
        engine.submit(GenerateRequest("5", [1], GREEDY))
    while engine.busy():
        engine.step()
    engine.submit(GenerateRequest("5", [1], GREEDY))


def test_the_longest_prompt_gets_one_token(checkpoint, oracle):
    request = GenerateRequest("a", [1] * (MAX_LEN - 1), SamplingParams(temperature=0, max_tokens=None, ignore_eos=True))
    answers = run(make_engine(checkpoint), [request])
    assert len(answers["a"].tokens) == 1
    check(oracle, [request], answers)


def test_an_idle_engine_does_nothing(checkpoint):
    engine = make_engine(checkpoint)
    assert not engine.busy() and engine.step() == [] and engine.stats().num_steps == 0


def test_info_is_json_and_says_what_was_chosen(checkpoint):
    said: list[str] = []
    engine = Engine(Config(model=str(checkpoint), device="cpu", max_num_seqs=4, num_kvcache_blocks=1), said.append)
    info = json.loads(json.dumps(engine.info))
    assert info["config"]["dtype"] == "float32" and info["config"]["max_model_len"] == 64 == engine.max_model_len
    assert info["reasons"]["max_model_len"] == "cut to what the cache holds"
    assert info["kernels"]["prefill_attention"] == {"reference": "cpu"}
    assert all(seconds >= 0 for seconds in info["phases"].values()) and "loading weights" in info["phases"]
    assert any("64 tokens in 1 pages" in line for line in said)
    engine.close()


def test_a_closed_engine_holds_no_cache(checkpoint):
    """At once: a collector that comes later leaves the next engine without memory."""
    engine = make_engine(checkpoint)
    engine.runner.graphs = PaddedSteps(engine)  # knows the runner, as CUDA graphs do
    run(engine, [GenerateRequest("a", [1, 2, 3], GREEDY)])
    pages = weakref.ref(engine.runner.caches[0].pages)
    gc.disable()
    try:
        engine.close()
        assert pages() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_num_batched_tokens": 4}, "--max_num_seqs 4"),
        ({"max_model_len": MAX_LEN + 1}, f"2 to {MAX_LEN}"),
        ({"max_model_len": 1}, f"2 to {MAX_LEN}"),
        ({"max_model_len": 90, "num_kvcache_blocks": 5}, "--max_model_len 80 would fit"),
        ({"kernels": "rope=nothing"}, "rope has"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_work_is_said_before_weights_load(checkpoint, flags, words, monkeypatch):
    monkeypatch.setattr("nanodeploy.models.registry.build", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=words):
        make_engine(**{"directory": checkpoint, **flags} if "model" not in flags else {"directory": "/nowhere"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there(checkpoint):
    with pytest.raises(ConfigError, match="--device cpu"):
        make_engine(checkpoint, device="cuda")


def test_end_token_is_the_models(checkpoint):
    assert make_engine(checkpoint).eos_ids == {END}


def test_layers_compile_twice_whatever_the_steps(checkpoint, oracle):
    """Once for one token, once for more; not again for other batches, buffers or lengths."""
    engine = make_engine(checkpoint, max_num_batched_tokens=20)
    counter = CompileCounter()
    torch._dynamo.reset()
    engine.runner.model.compile_layers(backend=counter)
    requests = [GenerateRequest(str(i), TEXTS[i % 2][: 7 * i + 1], GREEDY) for i in range(8)]
    check(oracle, requests, run(engine, requests, arrivals=[0, 0, 1, 3, 5, 30, 30, 50]))
    assert counter.frame_count == 2
