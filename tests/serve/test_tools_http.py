"""Tools and reasoning over HTTP, with a fake engine that says whatever the last message told it to say."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import PATIENCE_S, ServerProcess, children, eventually, is_alive, make_tokenizer
from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFace

from nanodeploy import flags
from nanodeploy.serve import parsers
from nanodeploy.serve.chat import Encoding
from nanodeploy.serve.encodings import ENCODERS
from nanodeploy.serve.tokenizer import Tokenizer

# The prompt begins with what is to be answered, and the fake engine answers with its prompt up to the end token.
TEMPLATE = """\
{{- messages[-1].content }}<|im_end|>{# its marks: <tool_call> </think> #}
{%- for message in messages %}{{- message.role + message.tool_calls | default([]) | string }}{% endfor -%}
{{- tools | default([], true) | tojson }}"""
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"properties": {"city": {}}}}},
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
SAID = "<think>\nWhich city?\n</think>\n\nLet me see.\n" + CALL + '\n<tool_call>\n{"name": "now"}\n</tool_call>'


def make_model(directory: Path, template: str | None, **config: Any) -> Path:
    make_tokenizer(directory)
    made = HuggingFace.from_file(str(directory / "tokenizer.json"))
    made.add_tokens([AddedToken(text, special=True) for text in ("<tool_call>", "</tool_call>", "</think>")])
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    (directory / "config.json").write_text(
        json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 600, **config})
    )
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tools")
    make_tokenizer(directory)
    end = HuggingFace.from_file(str(directory / "tokenizer.json")).token_to_id("<|im_end|>")
    return make_model(directory, TEMPLATE, eos_token_id=end)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerProcess]:
    running = ServerProcess(str(model), "--served-model-name", "fake", "--max_model_len", "2000")
    try:
        yield running.started()
    finally:
        running.kill()


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def say(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_whole_answer(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="fake", messages=say(SAID), tools=TOOLS).choices[0]
    message = choice.message.to_dict()
    assert (message["reasoning_content"], message["content"]) == ("Which city?", "Let me see.")
    (first, second) = choice.message.tool_calls
    assert (first.function.name, json.loads(first.function.arguments)) == ("get_weather", {"city": "Köln"})
    assert (second.function.name, second.function.arguments, second.type) == ("now", "{}", "function")
    assert first.id != second.id and choice.finish_reason == "tool_calls"
    only = client.chat.completions.create(model="fake", messages=say(CALL), tools=TOOLS).choices[0]
    assert only.message.content is None and len(only.message.tool_calls) == 1


@pytest.mark.parametrize("burst", [1, 3, 50])
def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI, burst: int) -> None:
    stream = client.chat.completions.create(
        model="fake",
        messages=say(SAID),
        tools=TOOLS,
        stream=True,
        n=2,
        extra_body={"cache_salt": f"burst={burst}"},
    )
    found: dict[int, dict[str, Any]] = {i: {"": "", "reasoning": "", "calls": {}, "ends": []} for i in (0, 1)}
    for chunk in stream:
        choice = chunk.choices[0]
        mine, delta = found[choice.index], choice.delta.to_dict()
        mine[""] += delta.get("content") or ""
        mine["reasoning"] += delta.get("reasoning_content", "")
        for call in delta.get("tool_calls", ()):
            kept = mine["calls"].setdefault(call["index"], {"name": call["function"].get("name"), "arguments": ""})
            kept["arguments"] += call["function"]["arguments"]
        mine["ends"] += [choice.finish_reason] * (choice.finish_reason is not None)
    for mine in found.values():
        assert (mine[""], mine["reasoning"], mine["ends"]) == ("Let me see.", "Which city?", ["tool_calls"])
        assert mine["calls"] == {
            0: {"name": "get_weather", "arguments": '{"city": "Köln"}'},
            1: {"name": "now", "arguments": "{}"},
        }


def test_what_a_request_may_say_of_tools(client: openai.OpenAI) -> None:
    def ask(text: str = SAID, **options: Any) -> Any:
        return client.chat.completions.create(model="fake", messages=say(text), **options).choices[0]

    one = ask(tools=TOOLS, parallel_tool_calls=False)
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"
    for options in ({"tools": TOOLS, "tool_choice": "none"}, {}):
        bare = ask(**options)
        assert bare.message.tool_calls is None and bare.finish_reason == "stop"
        assert bare.message.content.startswith('Let me see.\n\n{"name": "get_weather"')  # special tokens are skipped
    cut = ask(tools=TOOLS, max_tokens=40)
    assert cut.finish_reason == "length"
    stopped = ask(tools=TOOLS, stop=["see"])
    assert (stopped.message.content, stopped.message.tool_calls, stopped.finish_reason) == ("Let me ", None, "stop")
    raw = ask(tools=TOOLS, logprobs=True)
    spoken = "".join(position.token for position in raw.logprobs.content)
    assert "<tool_call>" in spoken and len(raw.message.tool_calls) == 2


def test_a_conversation_with_calls_reaches_the_template(server: ServerProcess, model: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "CET"}'}}
    talk = [
        *say("what time is it?"),
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    body = {"messages": talk, "tools": TOOLS, "return_token_ids": True}
    reply = server.post("/v1/chat/completions", body).json()
    prompt = Tokenizer(model).decode(reply["prompt_token_ids"], skip_special_tokens=False)
    assert prompt.startswith("noon<|im_end|>") and "'arguments': {'zone': 'CET'}" in prompt and "get_weather" in prompt
    talk[1]["tool_calls"] = [{**call, "function": {"name": "now", "arguments": "{"}}]
    refused = server.post("/v1/chat/completions", body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages[1].tool_calls"


def test_the_parsers_are_told(server: ServerProcess) -> None:
    info = server.get("/server_info").json()
    assert (info["tool_call_parser"], info["reasoning_parser"]) == ("hermes", "think")


Start = Callable[..., ServerProcess]


def test_no_parsers_leave_everything_content(start: Start, model: Path) -> None:
    server = start(str(model), "--tool-call-parser", "none", "--reasoning-parser", "none", "--max_model_len", "2000")
    body = {"messages": say(SAID), "tools": TOOLS, "skip_special_tokens": False}
    choice = server.started().post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": SAID, "refusal": None}
    assert choice["finish_reason"] == "stop"
    reply = server.post("/v1/chat/completions", {**body, "tool_choice": "required"})
    assert reply.status_code == 400 and "--tool-call-parser" in reply.json()["error"]["message"]


@pytest.mark.parametrize("flag", ["--tool-call-parser", "--reasoning-parser"])
def test_a_parser_that_there_is_not_is_said_at_once(start: Start, model: Path, flag: str) -> None:
    server = start(str(model), flag, "deepseek_v33")
    assert server.wait() == 1
    assert len(server.errors) == 1 and "there are: auto" in server.errors[0] and "Did you mean" in server.errors[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_processes_that_try_grammars_end_with_the_server(start: Start, model: Path, number: int) -> None:
    server = start(str(model)).started()
    before = set(children(server.popen.pid))
    reply = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 2, "guided_choice": ["a", "b"]})
    assert reply.status_code == 200, reply.text
    (worker,) = set(children(server.popen.pid)) - before
    server.popen.send_signal(number)
    server.wait()
    assert eventually(lambda: not is_alive(worker))


def test_help_names_every_parser() -> None:
    with pytest.raises(flags.Help) as text:
        flags.parse(["--help"], "x")
    words = set("".join(c if c.isalnum() or c == "_" else " " for c in str(text.value)).split())
    assert {*parsers.TOOL_PARSERS, *parsers.TOOL_ALIASES, *parsers.REASONING_PARSERS} <= words


def test_a_model_without_a_template_is_encoded(start: Start, tmp_path: Path) -> None:
    directory = tmp_path / "dsml"
    make_model(directory, None, model_type="deepseek_v32")
    tokenizer = Tokenizer(directory)
    server = start(str(directory), "--max_model_len", "2000").started()
    info = server.get("/server_info").json()
    assert (info["tool_call_parser"], info["reasoning_parser"]) == ("deepseek_v32", "think")

    def prompt(**body: Any) -> str:
        body = {"messages": say("hi"), "return_token_ids": True, "max_tokens": 1, **body}
        reply = server.post("/v1/chat/completions", body)
        assert reply.status_code == 200, reply.text
        return tokenizer.decode(reply.json()["prompt_token_ids"], skip_special_tokens=False)

    encode = ENCODERS["deepseek_v32"].encode
    assert prompt() == encode(say("hi")) and prompt().endswith("</think>")
    thinking = {"chat_template_kwargs": {"thinking": True}}
    assert prompt(**thinking) == encode(say("hi"), thinking=True) and prompt(**thinking).endswith("<think>")
    assert prompt(chat_template_kwargs={"enable_thinking": True}) == prompt(**thinking)
    assert prompt(tools=TOOLS) == encode(say("hi"), TOOLS)
    refused = server.post("/v1/chat/completions", {"messages": say("hi"), "chat_template_kwargs": {"effort": "max"}})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "chat_template_kwargs"
    assert Encoding(ENCODERS["deepseek_v4"]).render(say("hi"), kwargs={"effort": "max"}) == ENCODERS[
        "deepseek_v4"
    ].encode(say("hi"), effort="max")
    schema = {"type": "object"}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert Encoding(ENCODERS["deepseek_v32"]).render(say("hi"), response_format=schema) == encode(
        say("hi"), response_format=schema
    )
    reply = server.post("/v1/chat/completions", {"messages": say("hi"), "response_format": form})
    assert reply.status_code == 400, "a model that names no end token cannot be held to a grammar"
