"""Constrained answers over HTTP: whatever random weights prefer, the form is kept. Bombs hurt nobody."""

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from serving import PATIENCE_S, ServerProcess, eventually
from test_demo import FLAGS, gauge

from nanodeploy import catalog
from nanodeploy.cli import ENGINE
from nanodeploy.serve.tokenizer import Tokenizer

DEMO = catalog.locate("demo:qwen3")
assert DEMO.tokenizer_dir is not None
TOKENIZER = Tokenizer(DEMO.tokenizer_dir)
# White space is allowed between JSON's tokens, and random weights would make much of it.
SPACES = {str(id): -100 for id in range(TOKENIZER.vocab_size) if not (raw := TOKENIZER.token_bytes(id)).strip() and raw}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "get_time", "description": "the time"}},
]
USER: list[Any] = [{"role": "user", "content": "what is the weather in rome?"}]
CHAT: dict[str, Any] = {
    "model": "demo:qwen3",
    "messages": USER,
    "max_tokens": 300,
    "logit_bias": SPACES,
    "temperature": 1.0,
    "chat_template_kwargs": {"enable_thinking": False},
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "w", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    server = ServerProcess("demo:qwen3", "--load_format", "dummy", *FLAGS, engine=ENGINE)
    try:
        yield server.started()
    finally:
        server.kill()


@pytest.fixture
def golden(demo: ServerProcess) -> Iterator[None]:
    """Whatever a test does: afterwards nothing runs, nothing is kept, and a greedy request is answered as before."""

    def ask() -> dict[str, Any]:
        body = {"prompt": "hello world", "max_tokens": 16, "temperature": 0, "ignore_eos": True, "logprobs": 2}
        return demo.post("/v1/completions", body).json()["choices"][0]

    before = ask()
    yield
    assert eventually(lambda: gauge(demo, "num_requests_running") == 0 and gauge(demo, "kv_cache_usage_perc") == 0)
    assert ask() == before
    assert demo.get("/health").status_code == 200


def ask(demo: ServerProcess, **body: Any) -> dict[str, Any]:
    reply = demo.post("/v1/chat/completions", {**CHAT, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_json_is_valid_every_time(demo: ServerProcess, golden: None, stream: bool) -> None:
    client = openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)
    body = {**CHAT, "response_format": FORMAT, "n": 4, "seed": 5, "stream": stream, "logprobs": True}
    extra = {"chat_template_kwargs": body.pop("chat_template_kwargs")}
    answer = client.chat.completions.create(**body, extra_body=extra)
    texts = [""] * 4
    if stream:
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}
        texts = [choice.message.content for choice in answer.choices]
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("asked", "pattern"),
    [
        ({"response_format": {"type": "json_object"}, "max_tokens": 5}, r"\{.*"),
        ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, r"[a-c]{3}-\d{2}"),
        ({"guided_regex": "[a-c]{3}-[0-9]{2}"}, r"[a-c]{3}-\d{2}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"structured_outputs": {"choice": ["yes", "no"]}, "n": 3}, "yes|no"),
        ({"guided_json": json.dumps({"enum": ["é", 3]})}, '"é"|3'),
        ({"guided_grammar": 'root ::= "a" | "b" root'}, "b*a?"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}, r"x\d"),
    ],
    ids=str,
)
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "completion"])
def test_every_form(demo: ServerProcess, golden: None, chat: bool, asked: dict, pattern: str) -> None:
    if chat:
        reply = demo.post("/v1/chat/completions", {**CHAT, **asked})
    else:
        reply = demo.post("/v1/completions", {"prompt": "hello", "max_tokens": 200, "logit_bias": SPACES, **asked})
    assert reply.status_code == 200, reply.text
    for choice in reply.json()["choices"]:
        assert re.fullmatch(pattern, choice["message"]["content"] if chat else choice["text"], re.DOTALL)


def called(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in choice["message"]["tool_calls"]]
    for name, arguments in calls:
        jsonschema.validate(arguments, SCHEMA if name == "get_weather" else {"maxProperties": 0})
    return calls


def test_required_and_named_tools_are_called(demo: ServerProcess, golden: None) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    for seed in range(4):
        assert called(ask(demo, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed))
        ((name, _),) = called(ask(demo, tools=TOOLS, tool_choice=named, seed=seed, temperature=0.5))
        assert name == "get_weather"
    choice = ask(demo, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=9)
    assert len(called(choice)) == 1
    several = ask(demo, tools=TOOLS, tool_choice="required", seed=1, max_tokens=500)
    assert several["finish_reason"] == "length" or len(called(several)) >= 1


def test_a_streamed_call(demo: ServerProcess, golden: None) -> None:
    body = {**CHAT, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 3}
    whole = ask(demo, **body)
    reply = demo.post("/v1/chat/completions", {**body, "stream": True, "stream_options": {"include_usage": True}})
    frames = [json.loads(f.removeprefix("data: ")) for f in reply.text.split("\n\n") if f.startswith("data: {")]
    deltas = [
        f["choices"][0]["delta"]["tool_calls"][0]
        for f in frames
        if "tool_calls" in str(f["choices"][:1])[:200] and "tool_calls" in f["choices"][0]["delta"]
    ]
    assert deltas[0]["function"]["name"] == whole["message"]["tool_calls"][0]["function"]["name"]
    text = "".join(delta["function"]["arguments"] for delta in deltas)
    assert text == whole["message"]["tool_calls"][0]["function"]["arguments"]
    assert [f["choices"][0]["finish_reason"] for f in frames if f["choices"]][-1] == "tool_calls"
    assert frames[-1]["usage"]["completion_tokens"] > len(deltas) / 2


def test_a_conversation_with_tools_goes_on(demo: ServerProcess, golden: None) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    talk = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "it is noon"},
    ]
    reply = demo.post(
        "/v1/chat/completions",
        {**CHAT, "messages": talk, "tools": TOOLS, "return_token_ids": True, "max_tokens": 2, "tool_choice": "none"},
    )
    prompt = TOKENIZER.decode(reply.json()["prompt_token_ids"], skip_special_tokens=False)
    assert "it is noon" in prompt and '{"name": "get_time", "arguments": {}}' in prompt
    assert '"get_weather"' not in prompt, "tool_choice none: the model is not told of tools"
    told = demo.post("/v1/chat/completions", {**CHAT, "tools": TOOLS, "return_token_ids": True, "max_tokens": 2})
    assert "get_weather" in TOKENIZER.decode(told.json()["prompt_token_ids"], skip_special_tokens=False)


def test_limits_beat_the_grammar(demo: ServerProcess, golden: None) -> None:
    cut = ask(demo, response_format=FORMAT, max_tokens=3)
    assert cut["finish_reason"] == "length" and cut["message"]["content"].startswith("{")
    stopped = ask(demo, structured_outputs={"regex": "abcdef"}, stop=["cd"])
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("ab", "stop")
    kept = ask(demo, structured_outputs={"choice": ["yes"]}, min_tokens=40, ignore_eos=True)
    assert (kept["message"]["content"], kept["finish_reason"]) == ("yes", "stop")


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


BOMBS: list[tuple[dict[str, Any], str | None]] = [  # None: compiled lazily, it may as well be served
    ({"structured_outputs": {"regex": "(" * 30_000 + "a" + ")" * 30_000}}, "structured_outputs.regex"),
    ({"guided_regex": "((a{1,1000}){1,1000}){1,1000}b"}, None),
    ({"guided_regex": "(.*a){1,30}.{5000}[^a]{9000}" * 3}, None),
    ({"guided_json": nested(300)}, "structured_outputs.json"),
    ({"guided_json": {"type": "integer", "multipleOf": 982451653}}, "structured_outputs.json"),
    ({"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, "structured_outputs.json"),
    ({"guided_json": {"enum": ["x" * 1000 + str(i) for i in range(1000)]}}, "structured_outputs.json"),
    ({"guided_grammar": "start: (" * 1000}, "structured_outputs.grammar"),
    ({"guided_choice": ["x"] * 5000}, "structured_outputs.choice"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}, "strict": True}}},
        "response_format.json_schema",
    ),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": [1]}}]}, "tools[0].function.parameters"),
    ({"tools": [{"type": "custom"}]}, "tools[0]"),
    ({"response_format": FORMAT, "guided_choice": ["a"]}, "structured_outputs"),
]


@pytest.mark.parametrize(("bomb", "param"), BOMBS, ids=lambda value: str(value)[:50])
def test_bombs_are_refused_in_bounded_time_and_hurt_nobody(
    demo: ServerProcess, golden: None, bomb: dict[str, Any], param: str | None
) -> None:
    slowest, over = [0.0], threading.Event()

    def others() -> None:
        while not over.is_set():
            began = time.monotonic()
            reply = demo.post("/v1/completions", {"prompt": [5, 6], "max_tokens": 2})
            assert reply.status_code == 200
            slowest[0] = max(slowest[0], time.monotonic() - began)

    other = threading.Thread(target=others)
    other.start()
    began = time.monotonic()
    reply = demo.post("/v1/chat/completions", {**CHAT, "max_tokens": 30, **bomb})
    took = time.monotonic() - began
    over.set()
    other.join()
    if param is not None or reply.status_code != 200:
        assert reply.status_code == 400, reply.text[:300]
        assert reply.json()["error"]["param"] == (param or "structured_outputs.regex")
    assert took < 15 and slowest[0] < 5, (took, slowest)
