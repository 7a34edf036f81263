"""Answers held to grammars by the engine: valid whatever the model prefers, whatever shares its steps."""

import functools
import json
import re
import threading

import jsonschema
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import PaddedSteps, make_engine, run, take

from nanodeploy import catalog, ops
from nanodeploy.errors import RequestError
from nanodeploy.matcher import Grammar, Matcher, Vocabulary
from nanodeploy.runtime import grammars as grammars_module
from nanodeploy.runtime.engine import Engine
from nanodeploy.runtime.grammars import forbid
from nanodeploy.sampling import SamplingParams
from nanodeploy.serve.grammar import grammar_of
from nanodeploy.serve.lark import special_tokens
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import GenerateRequest

DEMO = catalog.locate("demo:qwen3")
assert DEMO.tokenizer_dir is not None
TOKENIZER = Tokenizer(DEMO.tokenizer_dir)
VOCAB, (END,) = DEMO.config["vocab_size"], DEMO.eos_token_ids[:1]
SPACES = {id: -100.0 for id in range(VOCAB) if (raw := TOKENIZER.token_bytes(id)) and not raw.strip()}
PROMPT = TOKENIZER.encode("hello world, what is 1+1? " * 2, add_special_tokens=False)
GOLDEN = GenerateRequest("golden", PROMPT, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog", "ünicorn"]}, "maxItems": 3},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "pets", "alive"],
    "additionalProperties": False,
}


def text_of(**structured) -> str:
    source = catalog.read_json(DEMO.tokenizer_dir / "tokenizer.json")
    grammar = grammar_of(special_tokens(source), structured=structured)
    assert grammar is not None
    return grammar.text


JSON, CHOICE, DIGITS = text_of(json=PERSON), text_of(choice=["yes", "no, never"]), text_of(regex=r"[0-9]{4,60}")


@functools.cache
def vocabulary() -> Vocabulary:
    return Vocabulary((DEMO.tokenizer_dir / "tokenizer.json").read_text(), VOCAB, DEMO.eos_token_ids)


@functools.cache
def compiled(text: str) -> Grammar:
    return Grammar(vocabulary(), text)


def engine_of(**flags) -> Engine:
    """Random weights: what comes out is the grammar's merit alone."""
    flags = {"max_model_len": 256, "num_kvcache_blocks": 128, "max_logprobs": VOCAB, **flags}
    return make_engine("demo:qwen3", load_format="dummy", **flags)


@pytest.fixture(scope="module")
def engine():
    return engine_of()


@pytest.fixture
def golden(engine):
    """Whatever a test does, a greedy request is answered as before, and nothing is left behind."""
    before = run(engine, [GOLDEN])["golden"].told
    yield before
    assert run(engine, [GOLDEN])["golden"].told == before
    assert not engine.grammars.matchers and not engine.grammars.are_compiling and not engine.open


def ask(id: str, text: str | None, **params) -> GenerateRequest:
    params = {"max_tokens": 200, "logit_bias": SPACES, **params}
    return GenerateRequest(id, PROMPT, SamplingParams(grammar=text, **params))


def decoded(answer) -> str:
    assert answer.end.finish_reason == "stop" and answer.end.stop_token_id in DEMO.eos_token_ids
    return TOKENIZER.decode(answer.tokens, skip_special_tokens=False)


def without_overlap(engine: Engine):
    """Every step is over before the next one is planned."""
    events = engine.step()
    waited = engine.settle(engine.in_flight)
    engine.in_flight = None
    return events + waited


@settings(max_examples=5)
@given(seeds=st.lists(st.integers(0, 2**31), min_size=1, max_size=4), temperature=st.sampled_from([0.0, 0.7, 3.0]))
def test_json_is_valid_every_time(engine, seeds, temperature):
    requests = [ask(str(i), JSON, temperature=temperature, seed=seed) for i, seed in enumerate(seeds)]
    for answer in run(engine, requests).values():
        jsonschema.validate(json.loads(decoded(answer)), PERSON)


def test_the_likeliest_of_the_allowed_tokens_is_taken(engine, golden):
    request = GenerateRequest("a", PROMPT, SamplingParams(temperature=0, grammar=DIGITS, max_tokens=60, logprobs=VOCAB))
    answer = run(engine, [request])["a"]
    assert re.fullmatch(r"[0-9]{4,60}", TOKENIZER.decode(answer.tokens))
    matcher = compiled(DIGITS).matcher()
    for token, scores in zip(answer.tokens, answer.logprobs, strict=True):
        bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
        assert token == next(id for id in scores.top_ids if bits[id])
        assert sum(map(np.exp, scores.top_logprobs)) == pytest.approx(1, abs=1e-4), "raw, as without a grammar"
        assert matcher.accept(token)


sampling = st.builds(
    dict,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 1, 5]),
    top_p=st.sampled_from([1.0, 0.5]),
    min_p=st.sampled_from([0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    logit_bias=st.sampled_from([SPACES, None, {65: 100.0, 66: 100.0}]),
    seed=st.integers(-5, 5),
    stop_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=2),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 6]),
    max_tokens=st.sampled_from([6, 90, None]),
    logprobs=st.sampled_from([None, 2]),
    prompt_logprobs=st.sampled_from([None, 0]),
)


@settings(max_examples=5)
@given(
    asked=st.lists(
        st.tuples(st.sampled_from([JSON, CHOICE, DIGITS, None]), sampling, st.integers(0, 6)), min_size=1, max_size=6
    )
)
def test_with_every_sampling_option(engine, asked):
    requests = [ask(str(i), text, **params) for i, (text, params, _) in enumerate(asked)]
    answers = run(engine, requests, [arrival for _, _, arrival in asked])
    for request in requests:
        answer, params = answers[request.id], request.params
        assert len(answer.logprobs) == (0 if params.logprobs is None else len(answer.tokens))
        if params.grammar is None:
            continue
        matcher = compiled(params.grammar).matcher()
        assert all(map(matcher.accept, answer.tokens)), TOKENIZER.decode(answer.tokens)
        assert answer.end.finish_reason in ("stop", "length") and answer.end.error is None
        if (stop := answer.end.stop_token_id) is not None:
            assert matcher.is_done or len(answer.tokens) >= params.min_tokens
            assert matcher.accept(stop)


def test_the_grammar_has_the_last_word_on_the_end(engine, golden):
    requests = [
        ask("short", CHOICE, min_tokens=50),
        ask("endless", CHOICE, ignore_eos=True),
        ask("stopped", DIGITS, stop_token_ids=TOKENIZER.encode("7", add_special_tokens=False)),
        ask("long", DIGITS, min_tokens=9),
        ask("cut", DIGITS, max_tokens=3),
    ]
    answers = run(engine, requests)
    assert decoded(answers["short"]) in ("yes", "no, never") and decoded(answers["endless"]) in ("yes", "no, never")
    assert "7" not in TOKENIZER.decode(answers["stopped"].tokens) and answers["stopped"].end.finish_reason == "stop"
    assert len(answers["long"].tokens) >= 9
    assert answers["cut"].end.finish_reason == "length" and len(answers["cut"].tokens) == 3


def test_what_shares_the_steps_changes_nothing():
    """Alone, in a batch, in padded steps, from cached prefixes, cut into chunks, preempted, without overlap."""
    texts = [JSON, None, DIGITS, CHOICE, JSON, None]
    requests = [
        ask(str(i), text, seed=i, temperature=0.8, ignore_eos=True, max_tokens=40) for i, text in enumerate(texts)
    ]
    alone: dict = {}
    engine = engine_of()
    for request in requests:
        alone |= run(engine, [request])
    told = {id: answer.told for id, answer in alone.items()}
    padded = engine_of()
    padded.runner.graphs = PaddedSteps(padded)
    scarce = engine_of(num_kvcache_blocks=9, max_model_len=128)
    cold = engine_of(enable_prefix_caching=False, max_num_batched_tokens=8)
    for each in (engine, padded, scarce, cold):
        assert {id: answer.told for id, answer in run(each, requests, [0, 0, 1, 2, 5, 9]).items()} == told
    assert {id: a.told for id, a in run(engine, requests, step=without_overlap).items()} == told
    assert scarce.stats().num_preemptions > 0 and engine.stats().prefix_hits > 0
    assert {decoded(alone["3"])} <= {"yes", "no, never"}


def test_steps_without_constrained_sequences_are_launched_whole(engine, golden, monkeypatch):
    launched = []
    launch = engine.runner.launch
    monkeypatch.setattr(
        engine.runner, "launch", lambda plan, masked=False: launched.append(masked) or launch(plan, masked)
    )
    with monkeypatch.context() as patch:
        patch.setattr(ops, "mask_logits", lambda *args: pytest.fail("nobody asked for a mask"))
        run(engine, [ask("free", None, max_tokens=5, ignore_eos=True)])
    assert launched and not any(launched)
    launched.clear()
    run(engine, [ask("free", None, max_tokens=40, ignore_eos=True), ask("held", CHOICE)])
    assert 0 < sum(launched) < len(launched) / 2


def test_an_engine_does_not_wait_for_a_grammar_that_compiles(engine, golden, monkeypatch):
    """Others get their tokens meanwhile; so does the second request with the same grammar, which is compiled once."""
    go_on, compile, count = threading.Event(), engine.grammars._compile, []

    def slowly(text):
        count.append(text)
        assert go_on.wait(30)
        return compile(text)

    monkeypatch.setattr(engine.grammars, "_compile", slowly)
    text = text_of(choice=["slow", "slower"])
    answers: dict = {}
    for id in ("slow", "same"):
        engine.submit(ask(id, text))
    assert engine.stats().num_waiting == 2 and engine.busy()
    assert engine.step() == []
    engine.submit(msgspec.structs.replace(GOLDEN, id="other"))
    while "other" not in answers or not answers["other"].events[-1].finish_reason:
        take(answers, engine.step())
    assert answers["other"].told == golden and answers.keys() == {"other"}
    go_on.set()
    while engine.busy():
        take(answers, engine.step())
    assert decoded(answers["slow"]) in ("slow", "slower") and decoded(answers["same"]) in ("slow", "slower")
    assert len(count) == 1
    assert decoded(run(engine, [ask("again", text)])["again"]) in ("slow", "slower") and len(count) == 1


@pytest.mark.parametrize("phase", ["compiling", "compiled", "running"])
def test_an_abort_wherever_it_stands(engine, golden, phase, monkeypatch):
    go_on, compile = threading.Event(), engine.grammars._compile
    monkeypatch.setattr(engine.grammars, "_compile", lambda text: go_on.wait(30) and compile(text))
    answers: dict = {}
    engine.submit(ask("victim", text_of(regex=f"{phase} [0-9]{{30,}}")))
    other = ask("other", CHOICE, seed=1)
    engine.submit(other)
    if phase != "compiling":
        go_on.set()
        for _, future in list(engine.grammars._waiting.values()):
            future.result()
    if phase == "running":
        for _ in range(5):
            take(answers, engine.step())
        assert engine.stats().num_running
    engine.abort("victim")
    engine.abort("victim")
    take(answers, engine.step())
    assert answers["victim"].end.finish_reason == "abort"
    go_on.set()
    while engine.busy():
        take(answers, engine.step())
    assert decoded(answers["other"]) == decoded(run(engine, [other])["other"])


def test_a_grammar_that_does_not_compile_ends_its_request_alone(engine, golden):
    good = ask("good", CHOICE)
    answers = run(engine, [ask("bad", "start: ("), good, ask("also", '{"grammars": 5}')])
    for id in ("bad", "also"):
        end = answers[id].end
        assert (end.finish_reason, end.error_kind, end.error_param) == ("error", "request", "grammar")
        assert end.error.startswith("The grammar cannot be used: ") and end.num_prompt_tokens == len(PROMPT)
    assert decoded(answers["good"]) in ("yes", "no, never")


@pytest.mark.parametrize("fault", ["accept refuses", "accept raises", "mask"])
def test_a_failed_matcher_ends_its_request_alone(engine, golden, fault, monkeypatch):
    others = [ask("other", CHOICE, seed=3), ask("free", None, seed=3, max_tokens=30)]
    before = {id: answer.told for id, answer in run(engine, others).items()}
    victim = ask("victim", DIGITS, ignore_eos=True)
    accept, failed, count = Matcher.accept, grammars_module.failed, []

    def broken(matcher, token):
        if matcher is engine.grammars.matchers.get("victim"):
            count.append(token)
            if len(count) == 3 and fault == "accept raises":
                raise RequestError("too large")
            if len(count) == 3 and fault == "accept refuses":
                return False
        return accept(matcher, token)

    def failing(matcher):
        mine = matcher is engine.grammars.matchers.get("victim")
        return "too large" if mine and len(count) == 3 and fault == "mask" else failed(matcher)

    monkeypatch.setattr(Matcher, "accept", broken)
    monkeypatch.setattr(grammars_module, "failed", failing)
    answers = run(engine, [victim, *others])
    end = answers["victim"].end
    assert (end.finish_reason, end.error_kind, end.token_ids) == ("error", "request", [])
    assert ("No token was left" if fault == "accept refuses" else "too large") in end.error
    assert len(answers["victim"].tokens) == 3
    assert {id: answer.told for id, answer in answers.items() if id != "victim"} == before


def test_what_is_refused_at_the_door(engine, golden):
    for text in ("", "x" * (1 << 20) + "x"):
        with pytest.raises(RequestError, match="grammar: wanted"):
            engine.submit(ask("a", text))


def test_a_model_without_a_tokenizer_or_an_end_refuses():
    path = DEMO.tokenizer_dir / "tokenizer.json"
    for made, message in (((None, VOCAB, [END]), "no tokenizer"), ((path, VOCAB, []), "no end token")):
        grammars = grammars_module.Grammars(*made)
        grammars.prepare()
        with pytest.raises(RequestError, match=message):
            grammars.check()


def test_idle_moments_read_the_vocabulary():
    engine = engine_of()
    assert engine.grammars._vocabulary is None
    while engine.idle():
        pass
    assert engine.grammars._vocabulary is not None


def test_forbidden_tokens_leave_a_mask_unless_it_would_be_empty():
    mask = np.zeros(3, np.int32)
    mask[0], mask[2] = -(2**31), 5  # tokens 31, 64 and 66
    forbid(mask, [31, 3, 64])
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == [66]
    forbid(mask, [66, 0])
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == [66]


def test_masks_reach_the_logits_they_are_for():
    sampler = engine_of().runner.sampler
    masks = sampler.masks_to_fill()
    assert masks.shape == (8, -(-VOCAB // 32)) and sampler.masks_to_fill() is not None
    masks[:2] = 0
    masks[0, 1], masks[1, 0] = 2, 1  # token 33, token 0
    assert sampler.masks is not None
    logits = torch.randn(4, VOCAB)
    ops.mask_logits(logits, sampler.masks.send(2), torch.tensor([3, 1]))
    assert logits.isfinite().sum(dim=1).tolist() == [VOCAB, 1, VOCAB, 1]
    assert logits[3].argmax() == 33 and logits[1].argmax() == 0


@pytest.mark.gpu
def test_on_a_gpu_masks_come_in_time():
    """Behind graphs, with overlapping steps: a mask that came a step late would let a wrong token through."""
    engine = engine_of(device="cuda", max_num_seqs=64, num_kvcache_blocks=1024)
    texts = [JSON, DIGITS, None, CHOICE]
    requests = [ask(str(i), texts[i % 4], seed=i, min_tokens=i % 3, logprobs=i % 2) for i in range(64)]
    answers = run(engine, requests, [i // 8 for i in range(64)])
    for request in requests:
        if text := request.params.grammar:
            answer, matcher = answers[request.id], compiled(text).matcher()
            assert all(map(matcher.accept, answer.tokens)) and answer.end.error is None
            if text is JSON:
                jsonschema.validate(json.loads(decoded(answer)), PERSON)
