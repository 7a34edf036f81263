"""LLM over an engine that copies its prompt, so that every answer is known; then over the real one."""

import json
import os
import signal
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nanodeploy import LLM, SamplingParams, wire
from nanodeploy import llm as llm_module
from nanodeploy.errors import ConfigError, NanoDeployError, QueueFullError, RequestError
from nanodeploy.wire import Logprobs, TokenEvent

VOCAB, END, MAX_LEN = 300, 0, 512
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": END,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny model whose tokens are bytes: token 1 + i is the i-th character of GPT-2's byte alphabet, 0 ends."""
    directory = tmp_path_factory.mktemp("model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<|end|>": END} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "generation_config.json").write_text(
        json.dumps({"temperature": 0.25, "top_k": 5, "eos_token_id": END})
    )
    return directory


@pytest.fixture(scope="session")
def bare_dir(model_dir, tmp_path_factory):
    """The same model without a tokenizer."""
    directory = tmp_path_factory.mktemp("bare")
    (directory / "config.json").write_text((model_dir / "config.json").read_text())
    return directory


class CopyEngine:
    """The engine's contract; each request gets its prompt back, over and over. `cuts` are the tokens of each event."""

    def __init__(self, config, progress=None):
        self.config, self.info = config, {"config": config.to_dict()}
        self.vocab_size, self.max_model_len, self.num_pages, self.page_size = VOCAB, MAX_LEN, 8, 64
        self.cuts = [1]
        self.running, self.events, self.seen, self.on_step = {}, [], [], lambda: None
        self.closed = self.num_steps = self.num_resets = 0

    def submit(self, request):
        request.params.check(vocab_size=VOCAB, max_logprobs=20)
        ids = request.prompt_token_ids
        if not ids:
            raise RequestError("The prompt is empty.", param="prompt")
        if len(ids) >= MAX_LEN:
            raise RequestError("The prompt is too long.", param="prompt", code="context_length_exceeded")
        if len(self.running) >= self.config.max_num_waiting:
            raise QueueFullError("full")
        assert request.id not in self.running and request.params.n == 1
        self.seen.append(request)
        self.running[request.id] = (request, [])

    def abort(self, id):
        if self.running.pop(id, None):
            self.events.append(TokenEvent(id=id, finish_reason="abort"))

    def busy(self):
        return bool(self.running or self.events)

    def step(self):
        self.num_steps += 1
        self.on_step()
        events, self.events = self.events, []
        for id, (request, done) in list(self.running.items()):
            events.append(self.event(id, request, done))
            if events[-1].finish_reason:
                del self.running[id]
        return events

    def event(self, id, request, done):
        params, first = request.params, not done
        new, reason, stopped_by = [], None, None
        for _ in range(self.cuts[self.num_steps % len(self.cuts)]):
            token = request.prompt_token_ids[len(done) % len(request.prompt_token_ids)]
            if token in params.stop_token_ids or (token == END and not params.ignore_eos):
                reason, stopped_by = "stop", token
                break
            done.append(token)
            new.append(token)
            if params.max_tokens == len(done) or len(done) + len(request.prompt_token_ids) == MAX_LEN:
                reason = "length"
                break
        scores = [Logprobs(t, -0.5, 2, [7, t], [-0.25, -0.5]) for t in new] if params.logprobs is not None else []
        prompt_scores = None
        if first and params.prompt_logprobs is not None:
            prompt_scores = [None] + [Logprobs(t, -1.0, 1, [], []) for t in request.prompt_token_ids[1:]]
        return TokenEvent(
            id=id,
            token_ids=new,
            logprobs=scores,
            prompt_logprobs=prompt_scores,
            finish_reason=reason,
            stop_token_id=stopped_by,
            num_cached_tokens=3 if first else 0,
        )

    def reset_prefix_cache(self):
        self.num_resets += 1

    def close(self):
        self.closed += 1


@pytest.fixture
def copier(monkeypatch, model_dir):
    monkeypatch.setattr(llm_module, "Engine", CopyEngine)
    with LLM(str(model_dir)) as llm:
        yield llm


@pytest.fixture
def bare_copier(monkeypatch, bare_dir):
    monkeypatch.setattr(llm_module, "Engine", CopyEngine)
    with LLM(str(bare_dir)) as llm:
        yield llm


def test_text_prompts(copier):
    first, second = copier.generate(["abc", "xy"], SamplingParams(max_tokens=5, temperature=0))
    assert (first.prompt, first.outputs[0].text, second.outputs[0].text) == ("abc", "abcab", "xyxyx")
    assert first.prompt_token_ids == copier.tokenizer.encode("abc", add_special_tokens=True)
    assert first.outputs[0].token_ids == (first.prompt_token_ids * 2)[:5]
    assert (first.outputs[0].finish_reason, first.outputs[0].stop_reason) == ("length", None)
    assert first.finished and first.num_cached_tokens == 3 and first.outputs[0].logprobs is None


@pytest.mark.parametrize(
    "prompt", [[5, 6, 7], {"prompt_token_ids": [5, 6, 7]}, (5, 6, 7)], ids=["list", "mapping", "tuple"]
)
def test_token_prompts(bare_copier, prompt):
    """A model directory without a tokenizer takes token ids, alone or in a list, and answers without text."""
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    for prompts in (prompt, [prompt]):
        (result,) = bare_copier.generate(prompts, params)
        assert result.prompt is None and result.prompt_token_ids == [5, 6, 7]
        assert result.outputs[0].token_ids == [5, 6, 7, 5] and result.outputs[0].text == ""


def test_one_prompt_and_none(copier):
    params = SamplingParams(max_tokens=2)
    assert [r.outputs[0].text for r in copier.generate("ab", params)] == ["ab"]
    assert [r.outputs[0].text for r in copier.generate({"prompt": "ab"}, params)] == ["ab"]
    assert copier.generate([], params) == []


def test_params_one_each_or_the_models_own(copier):
    each = [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3)]
    assert [len(r.outputs[0].token_ids) for r in copier.generate(["ab", "cd"], each)] == [1, 3]
    copier.generate("ab")
    assert (copier.engine.seen[-1].params.temperature, copier.engine.seen[-1].params.top_k) == (0.25, 5)
    assert copier.generate("ab")[0].outputs[0].finish_reason == "length"
    with pytest.raises(RequestError, match=r"1 sampling_params came for 2 prompts"):
        copier.generate(["a", "b"], [SamplingParams()])


def test_n(copier):
    (result,) = copier.generate("abc", SamplingParams(n=3, max_tokens=4, seed=2**63 - 1, prompt_logprobs=0))
    assert [(o.index, o.text) for o in result.outputs] == [(0, "abca"), (1, "abca"), (2, "abca")]
    sent = [request.params for request in copier.engine.seen]
    assert [p.seed for p in sent] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert [p.prompt_logprobs for p in sent] == [0, None, None]
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 3


def test_stops(copier):
    def answer(prompt, **params):
        output = copier.generate(prompt, SamplingParams(max_tokens=9, **params))[0].outputs[0]
        return output.text, output.finish_reason, output.stop_reason

    c = copier.tokenizer.encode("c", add_special_tokens=False)[0]
    assert answer("ab<|end|>") == ("ab", "stop", None)
    assert answer("ab<|end|>", ignore_eos=True, skip_special_tokens=False) == ("ab<|end|>" * 3, "length", None)
    assert answer("abc", stop_token_ids=[c]) == ("ab", "stop", c)
    assert answer("abcd", stop=["cd", "bcd"]) == ("a", "stop", "bcd")
    assert answer("abcd", stop="d", include_stop_str_in_output=True) == ("abcd", "stop", "d")
    assert answer("abcd", stop="b", min_tokens=3) == ("abcda", "stop", "b")
    assert answer("abcdefghi", stop="i") == ("abcdefgh", "stop", "i"), "the last token of max_tokens may complete it"
    assert not copier.engine.busy()


@given(
    text=st.text(st.sampled_from("ab¿é漢😀"), min_size=1, max_size=6),
    stops=st.lists(st.text(st.sampled_from("ab漢😀"), min_size=1, max_size=3), max_size=3),
    include=st.booleans(),
    max_tokens=st.integers(1, 24),
    cuts=st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_is_the_decoded_tokens_up_to_the_first_stop(copier, text, stops, include, max_tokens, cuts):
    copier.engine.cuts = cuts
    params = SamplingParams(max_tokens=max_tokens, stop=stops, include_stop_str_in_output=include)
    output = copier.generate(text, params)[0].outputs[0]
    whole = (text.encode() * 24)[:max_tokens].decode(errors="replace")
    ends = sorted((whole.find(s) + len(s), -len(s), s) for s in stops if s in whole)
    if ends:
        end, _, stop = ends[0]
        wanted = whole[:end] if include else whole[: end - len(stop)]
        assert (output.text, output.finish_reason, output.stop_reason) == (wanted, "stop", stop)
        assert len(output.token_ids) == len(whole[:end].encode())
    else:
        assert (output.text, output.finish_reason, output.stop_reason) == (whole, "length", None)
        assert len(output.token_ids) == max_tokens


def test_logprobs(copier):
    a, b = copier.tokenizer.encode("ab", add_special_tokens=False)
    output = copier.generate("ab", SamplingParams(max_tokens=2, logprobs=2))[0].outputs[0]
    assert [list(position) for position in output.logprobs] == [[a, 7], [b, 7]]
    assert output.logprobs[0][a] == llm_module.Logprob(-0.5, 2, "a")
    assert output.logprobs[1][7].rank == 1 and output.cumulative_logprob == -1.0


def test_a_bad_prompt_is_named_before_anything_runs(copier):
    for bad, why in [([], "empty"), ([1] * MAX_LEN, "too long"), (3.5, "wanted a string"), ({"text": "x"}, "keys")]:
        with pytest.raises(RequestError, match=rf"prompts\[2\].*{why}"):
            copier.generate(["fine", "fine", bad, "fine"], SamplingParams(max_tokens=3))
    assert not copier.engine.busy() and all(not done for _, done in copier.engine.running.values())
    assert copier.generate("ab", SamplingParams(max_tokens=2))[0].outputs[0].text == "ab"


def test_bad_params_are_named(copier, bare_copier):
    for params, why in [
        (SamplingParams(temperature=-1), "temperature is -1"),
        (SamplingParams(max_tokens="many"), "max_tokens"),
        (SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids"),
        ("hot", "wanted SamplingParams"),
    ]:
        with pytest.raises(RequestError, match=rf"sampling_params\[1\].*{why}"):
            copier.generate(["a", "b"], [SamplingParams(), params])
    with pytest.raises(RequestError, match="has no tokenizer"):
        bare_copier.generate([[1]], SamplingParams(stop="x"))
    with pytest.raises(RequestError, match=r"prompts\[0\] is text"):
        bare_copier.generate("x")


def test_chat(copier):
    talk = [{"role": "user", "content": "hi"}]
    (result,) = copier.chat(talk, SamplingParams(max_tokens=7))
    assert result.prompt == "u:hi;a:" and result.outputs[0].text == "u:hi;a:"
    both = copier.chat([talk, [*talk, {"role": "assistant", "content": "yo"}]], add_generation_prompt=False)
    assert [r.prompt for r in both] == ["u:hi;", "u:hi;a:yo;"]
    with pytest.raises(RequestError, match=r"messages\[1\].*role"):
        copier.chat([talk, [{"role": "cat", "content": "meow"}]])


def test_chat_tells_the_template_of_tools_and_options():
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    talk = [{"role": "user", "content": "What is the weather in Paris?"}]
    with LLM("demo:qwen3", device="cpu", num_kvcache_blocks=32, max_model_len=1024) as llm:
        params = SamplingParams(temperature=0, max_tokens=64)
        (plain,), (told,) = (llm.chat(talk, params, use_tqdm=False, tools=given) for given in (None, tools))
        assert "get_weather" in told.prompt and "get_weather" not in plain.prompt
        assert '"name": "get_weather"' in told.outputs[0].text and "<tool_call>" not in plain.outputs[0].text
        (quiet,) = llm.chat(talk, params, use_tqdm=False, chat_template_kwargs={"enable_thinking": False})
        assert quiet.prompt.endswith("</think>\n\n")


def test_chat_without_a_template(bare_copier):
    with pytest.raises(RequestError, match="no chat template"):
        bare_copier.chat([{"role": "user", "content": "hi"}])


def test_ctrl_c_ends_every_request_and_the_llm_goes_on(copier):
    def press():
        if copier.engine.num_steps == 3:
            os.kill(os.getpid(), signal.SIGINT)

    copier.engine.on_step = press
    with pytest.raises(KeyboardInterrupt):
        copier.generate(["ab"] * 5, SamplingParams(max_tokens=400))
    assert not copier.engine.busy() and copier.engine.num_steps < 10
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert copier.generate("ab", SamplingParams(max_tokens=2))[0].outputs[0].text == "ab"


def test_a_programs_own_handler_stays(copier):
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        copier.engine.on_step = lambda: copier.engine.num_steps == 1 and os.kill(os.getpid(), signal.SIGINT)
        assert copier.generate("ab", SamplingParams(max_tokens=3))[0].outputs[0].text == "aba"
    finally:
        signal.signal(signal.SIGINT, before)
    assert pressed == [1]


def test_an_engine_error_is_raised(copier, monkeypatch):
    broken = TokenEvent(id="1-1-0", finish_reason="error", error="out of luck", error_kind="engine")
    copier.engine.on_step = lambda: copier.engine.num_steps == 1 and copier.engine.events.append(broken)
    with pytest.raises(NanoDeployError, match="out of luck"):
        copier.generate(["ab", "cd"], SamplingParams(max_tokens=30))
    assert not copier.engine.busy()


def test_many_prompts_outlast_the_servers_queue(copier, monkeypatch, model_dir):
    assert len(copier.generate([[5]] * 5000, SamplingParams(max_tokens=1))) == 5000
    monkeypatch.setattr(llm_module, "Engine", CopyEngine)
    with LLM(str(model_dir), max_num_waiting=3) as small, pytest.raises(QueueFullError):
        small.generate([[5]] * 4)


def test_close(copier):
    copier.reset_prefix_cache()
    assert copier.engine.num_resets == 1
    copier.close()
    copier.close()
    assert copier.engine.closed == 1
    with pytest.raises(NanoDeployError, match="closed"):
        copier.generate("a")


def test_settings(monkeypatch, model_dir):
    monkeypatch.setattr(llm_module, "Engine", CopyEngine)
    with LLM(str(model_dir), block_size=16, trust_remote_code=False, tensor_parallel_size=1, seed=3) as llm:
        assert (llm.config.kvcache_block_size, llm.config.seed) == (16, 3)
    for wrong, why in [
        ({"gpu_memory_utilisation": 0.5}, "Did you mean gpu_memory_utilization"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size=2 is not supported"),
        ({"max_num_seqs": "many"}, "max_num_seqs"),
    ]:
        with pytest.raises(ConfigError, match=why):
            LLM(str(model_dir), **wrong)
    with pytest.raises(ConfigError, match="no directory"):
        LLM("no/such/model")


def test_no_bar_without_a_terminal(copier, capfd):
    copier.generate(["ab"] * 3, SamplingParams(max_tokens=3))
    assert "Processed" not in capfd.readouterr().err


def test_the_bar_tells_rates(copier, monkeypatch, capfd):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(llm_module, "BAR_PERIOD_S", 0.0)
    copier.generate(["abc"] * 3, SamplingParams(max_tokens=3))
    shown = capfd.readouterr().err
    assert "Processed prompts: 100%" in shown and "tok/s, output" in shown
    copier.generate("abc", SamplingParams(max_tokens=3), use_tqdm=False)
    assert "Processed" not in capfd.readouterr().err


# The real engine


@pytest.fixture(scope="module")
def tiny(model_dir):
    with LLM(
        str(model_dir), load_format="dummy", device="cpu", dtype="float32", max_num_seqs=8, num_kvcache_blocks=64
    ) as llm:
        yield llm


GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def test_alone_is_as_in_a_batch(tiny):
    prompts = [[3 + i, 5, 9 * i % 250 + 1, *range(1, 1 + 7 * i)] for i in range(5)]
    together = [r.outputs[0].token_ids for r in tiny.generate(prompts, GREEDY)]
    assert together == [tiny.generate([p], GREEDY)[0].outputs[0].token_ids for p in prompts]
    assert all(len(ids) == 12 for ids in together) and len(set(map(tuple, together))) > 1


def test_text_of_the_real_engine(tiny):
    (result,) = tiny.generate("hello", GREEDY)
    output = result.outputs[0]
    assert output.text == tiny.tokenizer.decode(output.token_ids)
    middle = tiny.tokenizer.decode(output.token_ids[4:5], skip_special_tokens=False)
    if middle.isprintable() and "\ufffd" not in middle:
        stopped = tiny.generate("hello", SamplingParams(temperature=0, max_tokens=12, stop=middle))[0].outputs[0]
        assert stopped.finish_reason == "stop" and stopped.text == output.text[: output.text.index(middle)]


def test_logprobs_of_the_real_engine(tiny):
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (result,) = tiny.generate([[5, 6, 7, 8]], params)
    output = result.outputs[0]
    assert [output.logprobs[i][t].rank for i, t in enumerate(output.token_ids)] == [1, 1, 1]
    assert output.cumulative_logprob == pytest.approx(
        sum(output.logprobs[i][t].logprob for i, t in enumerate(output.token_ids))
    )
    assert result.prompt_logprobs[0] is None and set(result.prompt_logprobs[1]) >= {6}
    # The same tokens scored as a prompt have the same log-probabilities.
    whole = [5, 6, 7, 8, *output.token_ids]
    scored = tiny.generate([whole], SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs
    for i, token in enumerate(output.token_ids):
        assert scored[4 + i][token].logprob == pytest.approx(output.logprobs[i][token].logprob, abs=1e-4)


def test_seeds(tiny):
    params = SamplingParams(n=3, seed=11, max_tokens=10, ignore_eos=True)
    first, again = (tiny.generate([[5, 6]], params)[0] for _ in range(2))
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in again.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3


def test_ctrl_c_on_the_real_engine(tiny, monkeypatch):
    before = tiny.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids
    step, num_steps = tiny.engine.step, 0

    def press():
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    monkeypatch.setattr(tiny.engine, "step", press)
    with pytest.raises(KeyboardInterrupt):
        tiny.generate([[7, 8]] * 20, SamplingParams(max_tokens=300, ignore_eos=True))
    stats = tiny.engine.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0) and stats.num_free_pages == stats.num_pages
    assert tiny.generate([[1, 2, 3]], GREEDY)[0].outputs[0].token_ids == before


def test_prefix_cache_and_its_reset(tiny):
    prompt = list(range(1, 200))
    tiny.generate([prompt], GREEDY)
    assert tiny.generate([prompt], GREEDY)[0].num_cached_tokens > 0
    tiny.reset_prefix_cache()
    assert tiny.generate([prompt], GREEDY)[0].num_cached_tokens == 0


def test_the_users_example():
    """The quick start prints the right answer."""
    command = [sys.executable, "examples/non_disagg.py", "--model", "demo:qwen3", "--prompt", "1+1=?"]
    done = subprocess.run([*command, "--max_tokens", "128"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1:] == ["2"], done.stdout


def test_importing_is_light():
    code = "import sys; from nanodeploy import SamplingParams, Config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_wire_requests_are_what_the_engine_reads(copier):
    """What LLM submits survives the wire, so the in-process and the HTTP engine see the same."""
    copier.generate("ab", SamplingParams(stop=["x"], logit_bias={3: 1.0}, n=2))
    for request in copier.engine.seen:
        assert wire.decode_to_engine(wire.encode(request)) == request
