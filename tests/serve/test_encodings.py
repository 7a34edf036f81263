"""Prompts without templates: DeepSeek V3.2 and V4, as their reference code writes them, and read back by parsers."""

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_parsers import TOOLS, calls_of, content_of, parser, read, reasoning_of, some_calls

from nanodeploy.errors import RequestError
from nanodeploy.serve.encodings import ENCODERS, deepseek_v4, deepseek_v32

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello"}


def call(name: str, arguments: Any, id: str = "c0") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def result(id: str, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


AGENT = [
    SYSTEM,
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "reasoning_content": "two cities",
        "tool_calls": [call("f", {"city": "Köln", "days": 2}, "c0"), call("f", {}, "c1")],
    },
    result("c1", "rain"),
    result("c0", "sun"),
]


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (deepseek_v32.TOOLS, "060fa1453d864691"),
        (deepseek_v4.TOOLS, "9cbfe9f32cfaa3d4"),
        (deepseek_v4.MAX_EFFORT, "f7a24f3b3050d4a8"),
    ],
    ids=["v32", "v4", "effort"],
)
def test_the_words_the_models_were_trained_on(text: str, digest: str) -> None:
    """Compared once with the golden outputs of both releases; a changed letter is a worse model."""
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_v32_agent() -> None:
    calls = (
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls><｜end▁of▁sentence｜>'
    )
    results = "\n\n<function_results>\n<result>sun</result>\n<result>rain</result>\n</function_results>\n\n"
    head = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Weather?<｜Assistant｜>"
    thinking = head + "<think>two cities</think>I look." + calls + results + "<think>"
    assert deepseek_v32.encode(AGENT, thinking=True) == thinking
    assert deepseek_v32.encode(AGENT, thinking=False) == head + "</think>I look." + calls + results + "</think>"
    later = [*AGENT, {"role": "assistant", "content": "Sun.", "reasoning_content": "done"}, HELLO]
    end = "</think>Sun.<｜end▁of▁sentence｜><｜User｜>Hello<｜Assistant｜><think>"
    assert deepseek_v32.encode(later, thinking=True) == head + "</think>I look." + calls + results + end


def test_v4_agent() -> None:
    calls = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="city" string="true">Köln</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls><｜end▁of▁sentence｜>'
    )
    results = "<｜User｜><tool_result>sun</tool_result>\n\n<tool_result>rain</tool_result>\n\nHello<｜Assistant｜>"
    head = "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Weather?<｜Assistant｜>"
    said = [*AGENT, HELLO]  # what the user says beside the results is part of their turn
    without = head + "</think>I look." + calls + results
    assert deepseek_v4.encode(said, thinking=False) == without + "</think>"
    assert deepseek_v4.encode(said, thinking=True) == without + "<think>"
    kept = deepseek_v4.encode(said, TOOLS, thinking=True)  # with tools reasoning is kept
    assert kept.endswith(
        "<｜User｜>Weather?<｜Assistant｜><think>two cities</think>I look." + calls + results + "<think>"
    )


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=list(ENCODERS))
def test_system_tools_and_format(encoder: Any) -> None:
    bos = "<｜begin▁of▁sentence｜>"
    assert encoder.encode([HELLO], thinking=False) == bos + "<｜User｜>Hello<｜Assistant｜></think>"
    schemas = "\n".join(json.dumps(tool["function"]) for tool in TOOLS)
    tools = encoder.TOOLS.replace("{schemas}", schemas)
    assert schemas in tools and "{schemas}" not in tools
    assert encoder.encode([HELLO], TOOLS).startswith(f"{bos}\n\n{tools}<｜User｜>Hello")
    developer = {"role": "developer", "content": "Be brief."}
    for first in (SYSTEM, developer):
        assert encoder.encode([first, HELLO], TOOLS).startswith(f"{bos}Be brief.\n\n{tools}<｜User｜>Hello")
    text = encoder.encode([SYSTEM, HELLO], response_format={"type": "object"})
    assert (
        "Be brief.\n\n## Response Format:\n\nYou MUST strictly adhere" in text
        and '{"type": "object"}<｜User｜>' in text
    )
    assert encoder.encode([SYSTEM]).startswith(bos + "Be brief.<｜Assistant｜>")
    again = [HELLO, {"role": "assistant", "content": "Hi", "reasoning": "hm"}]
    assert encoder.encode(again, thinking=False).endswith("</think>Hi<｜end▁of▁sentence｜><｜Assistant｜></think>")
    assert encoder.encode(again, thinking=True, add_generation_prompt=False).endswith(
        "<think>hm</think>Hi<｜end▁of▁sentence｜>"
    )


def test_v4_extras() -> None:
    reminder = {"role": "latest_reminder", "content": "today"}
    text = deepseek_v4.encode([SYSTEM, reminder, HELLO], thinking=True, effort="max")
    assert text == (
        f"<｜begin▁of▁sentence｜>{deepseek_v4.MAX_EFFORT}Be brief.<｜latest_reminder｜>today"
        "<｜User｜>Hello<｜Assistant｜><think>"
    )
    for quiet in ({"thinking": False, "effort": "max"}, {"thinking": True, "effort": "high"}):
        assert "Reasoning Effort" not in deepseek_v4.encode([HELLO], **quiet)


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=list(ENCODERS))
def test_results_without_calls_are_refused(encoder: Any) -> None:
    with pytest.raises(RequestError) as error:
        encoder.encode([HELLO, result("c0", "x")])
    assert error.value.param == "messages[1]"
    with pytest.raises(RequestError, match="not a JSON object"):
        encoder.encode([HELLO, {"role": "assistant", "content": "", "tool_calls": [call("f", [1])]}])


def test_v32_wants_a_result_for_each_call() -> None:
    with pytest.raises(RequestError, match="1 tool results follow 2 tool calls"):
        deepseek_v32.encode(AGENT[:-1])


@pytest.mark.parametrize("model_type", ENCODERS)
@settings(max_examples=100)
@given(calls=some_calls, words=st.sampled_from(["", "I look."]), thought=st.sampled_from(["", "hm\nhm"]))
def test_what_is_encoded_is_read_back(model_type: str, calls: list, words: str, thought: str) -> None:
    """The assistant's message behind the prompt that asks for it."""
    encode = ENCODERS[model_type].encode
    prompt = encode([HELLO], TOOLS, thinking=True)
    message = {
        "role": "assistant",
        "content": words,
        "reasoning_content": thought,
        "tool_calls": [call(name, arguments, str(i)) for i, (name, arguments) in enumerate(calls)],
    }
    whole = encode([HELLO, message], TOOLS, thinking=True, add_generation_prompt=False)
    assert whole.startswith(prompt)
    answer = whole.removeprefix(prompt).removesuffix("<｜end▁of▁sentence｜>")
    events = read(parser(model_type, "think", opened=True), [answer])
    assert [(name, json.loads(arguments)) for name, arguments in calls_of(events)] == calls
    assert (content_of(events), reasoning_of(events)) == (words, thought)
