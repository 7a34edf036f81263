"""The OpenAI surface, asked with OpenAI's own client; then everything that must be refused."""

import json
import re
import socket
import threading
import time
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import PATIENCE_S, ServerProcess, eventually

PROMPT = "hello world"
USER: list[Any] = [{"role": "user", "content": "hello 😀 world"}]


# ---------------------------------------------------------------- shapes


def test_completion(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="fake", prompt=PROMPT, max_tokens=7)
    assert reply.object == "text_completion" and reply.id.startswith("cmpl-") and reply.model == "fake"
    assert reply.choices[0].text == "hello worldhello worldhe" and reply.choices[0].finish_reason == "length"
    assert reply.choices[0].logprobs is None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (3, 7, 10)
    assert len(client.completions.create(model="fake", prompt=[[1, 4]], echo=True).choices[0].text) > 0


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=USER)
    assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "user\nhello 😀 world")
    assert choice.message.refusal is None and choice.message.tool_calls is None
    assert choice.finish_reason == "stop"
    raw = client.chat.completions.with_raw_response.create(model="fake", messages=USER)
    assert "system_fingerprint" not in json.loads(raw.text) and raw.headers["x-request-id"]


def test_chat_stream(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="fake", messages=USER, stream=True, n=2))
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        assert [c.delta.role for c in mine[1:]] == [None] * (len(mine) - 1)
        assert "".join(c.delta.content or "" for c in mine) == "user\nhello 😀 world"
        assert all("\ufffd" not in (c.delta.content or "") for c in mine)
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert {c.object for c in chunks} == {"chat.completion.chunk"} and len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_stream_on_the_wire(server: ServerProcess, path: str, include_usage: bool) -> None:
    body: dict[str, Any] = {"model": "fake", "stream": True, "max_tokens": 3}
    body |= {"messages": USER} if "chat" in path else {"prompt": PROMPT}
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    reply = server.post(path, body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    frames = reply.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]
    if not include_usage:
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)
        return
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3


def one(client: openai.OpenAI, stream: bool, chat: bool, **body: Any) -> list[dict]:
    """The choices of one request, whichever way it was asked, as plain objects."""
    create = client.chat.completions.create if chat else client.completions.create
    if not stream:
        return [choice.to_dict() for choice in create(model="fake", **body).choices]
    found: dict[int, dict] = {}
    for chunk in create(model="fake", stream=True, **body):
        for choice in chunk.choices:
            kept = found.setdefault(choice.index, {"text": "", "logprobs": {}, "token_ids": []})
            kept["text"] += (choice.delta.content or "") if chat else choice.text
            kept["token_ids"] += choice.to_dict().get("token_ids", [])
            kept["finish_reason"] = choice.finish_reason
            for key, values in (choice.logprobs.to_dict() if choice.logprobs else {}).items():
                kept["logprobs"].setdefault(key, []).extend(values or [])
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"stop": ["wor", "xyz"]},
        {"stop": "l"},
        {"stop": "wor", "extra_body": {"include_stop_str_in_output": True, "cache_salt": "burst=3"}},
        {"stop": "hel", "extra_body": {"min_tokens": 6}},
        {"n": 3, "stop": "world"},
        {"extra_body": {"cache_salt": "burst=4", "skip_special_tokens": False}},
        {"extra_body": {"stop_token_ids": [300]}},
    ],
    ids=str,
)
def test_a_stream_tells_what_the_whole_answer_tells(client: openai.OpenAI, chat: bool, extra: dict) -> None:
    body: dict[str, Any] = {"max_tokens": 9, "messages": USER} if chat else {"max_tokens": 9, "prompt": PROMPT}
    body |= {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2, "echo": True}
    body |= {**extra, "extra_body": {"return_token_ids": True, **extra.get("extra_body", {})}}
    streamed, whole = one(client, True, chat, **body), one(client, False, chat, **body)
    for ours, choice in zip(streamed, whole, strict=True):
        assert ours["text"] == (choice["message"]["content"] if chat else choice["text"])
        assert ours["token_ids"] == choice["token_ids"]
        assert ours["finish_reason"] == choice["finish_reason"]
        assert ours["logprobs"] == {k: v or [] for k, v in choice["logprobs"].items()}
        position = ours["logprobs"]["content" if chat else "tokens"]
        assert len(position) == len(ours["token_ids"]) + (0 if chat else 3)


def test_stop_strings(client: openai.OpenAI) -> None:
    def ask(**extra: Any) -> openai.types.CompletionChoice:
        return client.completions.create(model="fake", prompt=PROMPT, max_tokens=9, **extra).choices[0]

    cut = ask(stop=["lo wo"])
    assert (cut.text, cut.finish_reason) == ("hel", "stop")
    assert ask(stop="lo wo", extra_body={"include_stop_str_in_output": True}).text == "hello wo"
    assert ask(stop="hello", extra_body={"min_tokens": 3}).text == "hello world"
    assert ask(stop="zzz").finish_reason == "length"
    held = list(client.completions.create(model="fake", prompt=PROMPT, max_tokens=9, stop="worldx", stream=True))
    assert "".join(c.choices[0].text for c in held) == "hello world" * 3


def test_a_stop_string_ends_the_work(healthy: ServerProcess, client: openai.OpenAI) -> None:
    extra = {"cache_salt": "delay=0.005", "ignore_eos": True}
    client.completions.create(model="fake", prompt=PROMPT, max_tokens=250, stop="world", extra_body=extra)
    assert eventually(lambda: 'running{model_name="fake"} 0.0' in healthy.get("/metrics").text, 0.5)


def test_one_of_many_that_stops_frees_its_place(healthy: ServerProcess) -> None:
    body = {"prompt": [PROMPT, "llo"], "stop": "world", "max_tokens": 200, "cache_salt": "delay=0.01", "stream": True}
    with healthy.http.stream("POST", healthy.url + "/v1/completions", json=body) as reply:
        for line in reply.iter_lines():
            if '"stop"' in line:  # asked inside the loop: to leave it is to disconnect
                assert eventually(lambda: running(healthy) == 1, 1)
                return
    raise AssertionError("nothing stopped")


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "fake", "prompt": PROMPT, "logprobs": 2}
    first = client.completions.create(**body, max_tokens=2).choices[0].logprobs
    assert first.tokens == ["he", "llo"] and first.text_offset == [0, 2] and first.token_logprobs == [-0.5, -0.5]
    assert [len(top) for top in first.top_logprobs] == [2, 2] and first.top_logprobs[0]["he"] == -0.5
    echoed = client.completions.create(**body, max_tokens=2, echo=True).choices[0]
    assert echoed.text == "hello worldhello"
    assert echoed.logprobs.tokens == ["he", "llo", " world", "he", "llo"]
    assert echoed.logprobs.text_offset == [0, 2, 5, 11, 13]
    assert echoed.logprobs.token_logprobs[0] is None and echoed.logprobs.top_logprobs[0] is None
    scored = client.completions.create(**body, max_tokens=0, echo=True)
    assert scored.choices[0].text == PROMPT and scored.choices[0].logprobs.tokens == ["he", "llo", " world"]
    assert scored.usage.completion_tokens == 0 and scored.choices[0].finish_reason == "length"


def test_logprobs_of_a_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=3)
    content = reply.choices[0].logprobs.content
    assert b"".join(bytes(c.bytes) for c in content if c.token[0] != "<").decode() == "user\nhello 😀 world"
    assert all(len(c.top_logprobs) == 3 and c.top_logprobs[0].token == c.token for c in content)
    plain = client.chat.completions.create(model="fake", messages=USER, logprobs=True).choices[0].logprobs.content
    assert all(c.top_logprobs == [] for c in plain)


def test_many_prompts_and_choices(client: openai.OpenAI) -> None:
    for prompts, texts in ((["he", "llo"], ["he", "llo"]), ([[4], [5, 6]], None)):
        reply = client.completions.create(model="fake", prompt=prompts, n=2, max_tokens=2)
        assert [c.index for c in reply.choices] == [0, 1, 2, 3]
        if texts:
            assert [c.text for c in reply.choices] == ["hehe", "hehe", "llollo", "llollo"]
            assert reply.usage.prompt_tokens == 2 and reply.usage.completion_tokens == 8


def test_usage_counts_the_end_token_and_cached_tokens(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="fake", messages=USER * 3, extra_body={"cache_salt": "cached"}, n=2)
    assert reply.usage.prompt_tokens_details.cached_tokens == 16 * (reply.usage.prompt_tokens // 16) > 0
    one_answer = client.chat.completions.create(model="fake", messages=USER, extra_body={"return_token_ids": True})
    assert one_answer.usage.completion_tokens == len(one_answer.choices[0].token_ids) + 1
    assert len(one_answer.prompt_token_ids) == one_answer.usage.prompt_tokens


def test_models(client: openai.OpenAI, server: ServerProcess) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by, model.max_model_len) == ("fake", "model", "nanodeploy", 256)
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other/name")
    assert error.value.code == "model_not_found"


def test_server_info_and_health(server: ServerProcess) -> None:
    info = server.get("/server_info").json()
    assert info["state"] == "ready" and info["engine"]["device"] == "fake" and info["config"]["port"] == 0
    assert all(seconds >= 0 for seconds in info["engine"]["phases"].values())
    assert info["sampling_defaults"] == {"temperature": 0.5, "top_k": 20}
    health = server.get("/health")
    assert health.status_code == 200 and health.json()["status"] == "ready"


def test_metrics(client: openai.OpenAI, server: ServerProcess) -> None:
    def read() -> dict[str, float]:
        lines = [line for line in server.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name.replace('model_name="fake"', ""): float(v) for name, v in (line.rsplit(" ", 1) for line in lines)}

    before = read()
    client.completions.create(model="fake", prompt=PROMPT, max_tokens=5)
    after = read()
    moved = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert moved["nanodeploy:prompt_tokens_total{}"] == 3 and moved["nanodeploy:generation_tokens_total{}"] == 5
    assert moved['nanodeploy:request_success_total{finished_reason="length",}'] == 1
    assert moved["nanodeploy:time_to_first_token_seconds_count{}"] == 1
    assert moved["nanodeploy:inter_token_latency_seconds_count{}"] == 4
    assert moved["nanodeploy:e2e_request_latency_seconds_count{}"] == 1
    for name in ("num_requests_waiting", "kv_cache_usage_perc", "num_preemptions_total", "prefix_cache_hits_total"):
        assert f"nanodeploy:{name}{{}}" in after


# ---------------------------------------------------------------- refusals

GOOD: dict[str, Any] = {"model": "fake", "prompt": [5, 6], "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "fake", "messages": USER}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"best_of": 10**9}, "best_of"),
        ({"prompt": [[5]] * 512, "n": 3}, "n"),
        ({"max_tokens": 2**63 - 1}, "prompt"),
        ({"max_tokens": 2**63}, "max_tokens"),
        ({"max_tokens": 10**400}, "max_tokens"),
        ({"max_tokens": 10**4000}, "max_tokens"),
        ({"seed": -(10**4000)}, "seed"),
        ({"temperature": 10**4000}, "temperature"),
        ({"prompt": [10**4000]}, "prompt[0]"),
        ({"stop_token_ids": [10**4000]}, "stop_token_ids[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 255}, "prompt"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"min_tokens": 3}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"logprobs": 10**6}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**40}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 5000}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": [600]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [5] * 100000}, "stop_token_ids"),
        ({"logit_bias": {"600": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, None),
        ({"logit_bias": {str(i): 1 for i in range(5000)}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [5, "a"]}, "prompt"),
        ({"prompt": ["a", [5]]}, "prompt"),
        ({"prompt": [5, 600]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [5, True]}, "prompt[1]"),
        ({"prompt": [5.5]}, "prompt[0]"),
        ({"prompt": [2**63 - 1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 1_000_000}, "prompt"),
        ({"prompt": [5] * 1_000_000}, "prompt"),
        ({"prompt": [[[5]]]}, "prompt[0][0]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "x" * 300}, "cache_salt"),
        ({"cache_salt": "a\nb"}, "cache_salt"),
        ({"suffix": "x"}, "suffix"),
        ({"guided_regex": "(a+"}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_completions(server: ServerProcess, change: dict, param: str | None) -> None:
    refused(server.post("/v1/completions", {**GOOD, **change}), 400, param)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "alien", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 10**6}, "logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"max_completion_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 250}, "messages"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"n": 10**9}, "n"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_chats(server: ServerProcess, change: dict, param: str | None) -> None:
    refused(server.post("/v1/chat/completions", {**CHAT, **change}), 400, param)


def refused(reply: httpx.Response, status: int, param: str | None) -> None:
    assert reply.status_code == status, reply.text[:300]
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 2000 and "Traceback" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"5",
        b"\xef\xbb\xbf{}",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a\x00b"}',
        b'{"prompt": NaN}',
        b'{"prompt": [5], "temperature": 1e999}',
        b'{"prompt": [5], "temperature": Infinity}',
        b'{"prompt": [5],}',
        b'{"prompt": [' + b"9" * 10_000 + b"]}",
        b'{"prompt": [5], "logit_bias": {"' + b"9" * 10_000 + b'": 1}}',
        b'{"prompt": [5], "temperature": ' + b"9" * 10_000 + b"}",
        b'{"prompt": [5], "' + b"x" * 10_000 + b'": 1, "n": 0}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": [5]} trailing',
        b"\x1f\x8b\x08\x00",
    ],
    ids=lambda body: repr(body[:30]),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_bodies_that_are_no_requests(server: ServerProcess, path: str, body: bytes) -> None:
    reply = httpx.post(server.url + path, content=body, headers={"content-type": "application/json"}, timeout=30)
    assert reply.status_code == 400 and reply.json()["error"]["message"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8"), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
fields = ["model", "prompt", "messages", "n", "stop", "logprobs", "top_logprobs", "max_tokens", "echo", "tools", "seed"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    change=st.dictionaries(st.sampled_from(fields), json_values, max_size=3),
)
def test_any_json_is_answered(server: ServerProcess, http: httpx.Client, path: str, change: dict) -> None:
    base = CHAT if "chat" in path else GOOD
    content = json.dumps({**base, **change, "stream": False})  # NaN and Infinity included
    reply = http.post(server.url + path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400, 404), (content, reply.text)
    if reply.status_code != 200:
        assert reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def http():
    with httpx.Client(timeout=PATIENCE_S) as client:
        yield client


def test_after_all_that_it_still_works(healthy: ServerProcess) -> None:
    pass


def test_the_limits_are_not_off_by_one(server: ServerProcess) -> None:
    ok = server.post("/v1/completions", {**GOOD, "prompt": [5] * 255, "max_tokens": 1})
    assert ok.status_code == 200 and ok.json()["usage"]["total_tokens"] == 256
    reply = server.post("/v1/completions", {**GOOD, "prompt": [5] * 256, "max_tokens": 1})
    refused(reply, 400, "prompt")
    assert reply.json()["error"]["code"] == "context_length_exceeded"
    reply = server.post("/v1/completions", {"model": "fake", "prompt": [5] * 250})
    assert reply.json()["usage"]["completion_tokens"] == 6  # OpenAI's 16 are a default, not a demand
    assert server.post("/v1/completions", {**GOOD, "prompt": [599], "n": 128, "logprobs": 20}).status_code == 200


def test_other_routes_and_methods(server: ServerProcess) -> None:
    refused(server.get("/v1/nothing"), 404, None)
    refused(server.get("/v1/completions"), 405, None)
    refused(httpx.delete(server.url + "/v1/models"), 405, None)
    refused(server.post("/v1/completions/"), 404, None)
    reply = server.post("/v1/completions", {**GOOD, "model": "gpt-4"})
    refused(reply, 404, "model")
    assert reply.json()["error"]["code"] == "model_not_found"


def test_fields_of_other_clients_are_harmless(server: ServerProcess) -> None:
    extra = {
        "user": "u",
        "metadata": {"a": "b"},
        "store": True,
        "reasoning_effort": "low",
        "suffix": None,
        "unheard": 1,
    }
    assert server.post("/v1/completions", {**GOOD, **extra, "best_of": 1}).status_code == 200
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    reply = server.post(
        "/v1/chat/completions", {**CHAT, "tools": tools, "tool_choice": "auto", "return_token_ids": True}
    )
    bare = server.post(
        "/v1/chat/completions", {**CHAT, "tools": tools, "tool_choice": "none", "return_token_ids": True}
    )
    assert len(reply.json()["prompt_token_ids"]) > len(bare.json()["prompt_token_ids"])


def test_content_types(server: ServerProcess) -> None:
    def post(headers: dict[str, str]) -> int:
        request = httpx.Request("POST", server.url + "/v1/completions", content=json.dumps(GOOD), headers=headers)
        with httpx.Client(timeout=PATIENCE_S) as http:
            return http.send(request).status_code

    assert post({"content-type": "application/json; charset=utf-8"}) == 200
    assert post({}) == 200
    assert post({"content-type": "text/plain"}) == 415  # what a web page may send to localhost unasked
    assert post({"content-type": "application/json", "content-encoding": "gzip"}) == 415


def raw(server: ServerProcess) -> socket.socket:
    host, port = re.fullmatch(r"http://(.*):(\d+)", server.url).groups()
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_too_large_is_refused_before_it_is_kept(healthy: ServerProcess, chunked: bool) -> None:
    def rss() -> int:
        with open(f"/proc/{healthy.popen.pid}/statm") as file:
            return int(file.read().split()[1]) * 4096

    size, piece = 200 << 20, b"x" * (1 << 20)
    before = rss()
    with raw(healthy) as connection:
        head = "transfer-encoding: chunked" if chunked else f"content-length: {size}"
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\nhost: x\r\n{head}\r\n\r\n".encode())
        try:
            for _ in range(size // len(piece)):
                connection.sendall(b"100000\r\n" + piece + b"\r\n" if chunked else piece)
            connection.sendall(b"0\r\n\r\n" if chunked else b"")
        except (BrokenPipeError, ConnectionResetError):
            pass
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 413 ") and b"too large" in reply
    assert rss() - before < 64 << 20


def test_huge_headers_are_refused(healthy: ServerProcess) -> None:
    with raw(healthy) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")
        try:
            for _ in range(100):
                connection.sendall(b"y" * 65536)
        except (BrokenPipeError, ConnectionResetError):
            pass
        assert read_all(connection)[:13] in (b"HTTP/1.1 431 ", b"")


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n"]
)
def test_what_is_not_http_gets_one_answer(healthy: ServerProcess, garbage: bytes) -> None:
    with raw(healthy) as connection:
        connection.sendall(garbage)
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")


def test_a_request_that_the_engine_refuses_hurts_no_other(healthy: ServerProcess) -> None:
    for stream in (False, True):
        body = {**GOOD, "stream": stream, "cache_salt": "refuse"}
        refused(healthy.post("/v1/completions", body), 400, "prompt")
        full = healthy.post("/v1/completions", {**body, "cache_salt": "full"})
        assert full.status_code == 503 and full.headers["retry-after"] == "1"


# ---------------------------------------------------------------- clients that leave

SLOW: dict[str, Any] = {"model": "fake", "prompt": [5, 6], "max_tokens": 250, "cache_salt": "delay=0.02"}


def running(server: ServerProcess) -> float:
    return float(re.search(r"num_requests_running\{.*\} (\S+)", server.get("/metrics").text)[1])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False], ids=["shutdown", "close"])
def test_a_client_that_leaves_frees_its_place_at_once(healthy: ServerProcess, stream: bool, half: bool) -> None:
    body = json.dumps({**SLOW, "stream": stream, "n": 3, "cache_salt": "delay=0.2"}).encode()
    connection = raw(healthy)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert eventually(lambda: running(healthy) == 3)
    if stream:
        assert b"data: " in connection.recv(65536)
    if half:
        connection.shutdown(socket.SHUT_WR)
    else:
        connection.close()
    assert eventually(lambda: running(healthy) == 0, 5)  # it would run for a minute; a heartbeat is half a second old
    connection.close()


def test_a_storm_of_disconnects_leaves_nothing(healthy: ServerProcess) -> None:
    body = json.dumps({**SLOW, "stream": True, "cache_salt": "delay=0.002"}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    for i in range(60):
        with raw(healthy) as connection:
            connection.sendall((head + body)[: len(head + body) - (i % 3 == 0)])
            if i % 3 == 1:
                connection.recv(10)
    assert eventually(lambda: running(healthy) == 0, 5)


def aborted(server: ServerProcess) -> float:
    return float(re.search(r'finished_reason="abort",.*\} (\S+)', server.get("/metrics").text)[1])


def test_a_client_that_never_reads_holds_up_nobody(healthy: ServerProcess, client: openai.OpenAI) -> None:
    body = json.dumps({**SLOW, "stream": True, "n": 128, "cache_salt": "x", "logprobs": 20}).encode()
    before = aborted(healthy)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = re.fullmatch(r"http://(.*):(\d+)", healthy.url).groups()
    connection.connect((host, int(port)))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    time.sleep(0.3)
    began = time.monotonic()
    client.completions.create(model="fake", prompt=PROMPT, max_tokens=5)
    assert time.monotonic() - began < 5
    assert eventually(lambda: aborted(healthy) > before, 20), "its answers did not pile up for ever"
    assert eventually(lambda: running(healthy) == 0, 2)
    connection.close()


def test_a_full_queue_says_so_at_once(healthy: ServerProcess, client: openai.OpenAI) -> None:
    """--max_num_waiting 200 and --max_num_seqs 256: four times 128 are too many."""
    body = {**SLOW, "n": 128, "stream": True}
    streams = [httpx.Client(timeout=PATIENCE_S) for _ in range(3)]
    try:
        for http in streams:
            reply = http.send(http.build_request("POST", healthy.url + "/v1/completions", json=body), stream=True)
            assert reply.status_code == 200
        with pytest.raises(openai.InternalServerError) as error:
            client.completions.create(model="fake", prompt=PROMPT, n=128)
        assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "1"
    finally:
        for http in streams:
            http.close()
    assert eventually(lambda: running(healthy) == 0, 10)


def test_many_streams_at_once(healthy: ServerProcess) -> None:
    texts: list[str] = []

    def ask(i: int) -> None:
        body = {"model": "fake", "prompt": [10 + i, 20 + i], "max_tokens": 40, "stream": True, "return_token_ids": True}
        reply = healthy.post("/v1/completions", body)
        frames = [json.loads(f[6:]) for f in reply.text.split("\n\n")[:-2]]
        tokens = [t for frame in frames for t in frame["choices"][0]["token_ids"]]
        assert tokens == [10 + i, 20 + i] * 20
        texts.append(reply.text)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(48)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert len(texts) == 48 and all(text.endswith("data: [DONE]\n\n") for text in texts)
