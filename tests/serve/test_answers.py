"""Chat answers told apart into reasoning, content and tool calls: whole and streamed alike, in OpenAI's shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import make_tokenizer
from test_parsers import FORMATS, TOOLS, texts, written
from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFace

from nanodeploy.sampling import SamplingParams
from nanodeploy.serve import openai, parsers
from nanodeploy.serve.answers import ChatAnswer, Reading
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import Logprobs, TokenEvent

MARKERS = sorted({token for form in FORMATS.values() for token in form.tokens} | {"</think>"})


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """All formats' markers are special tokens, which a detokenizer skips unless it is told otherwise."""
    directory = tmp_path_factory.mktemp("markers")
    make_tokenizer(directory)
    path = str(directory / "tokenizer.json")
    made = HuggingFace.from_file(path)
    made.add_tokens([AddedToken(text, special=True) for text in MARKERS])
    made.save(path)
    return Tokenizer(Path(directory))


def asked(**fields: Any) -> openai.ChatRequest:
    return openai.ChatRequest(messages=[{"role": "user", "content": "x"}], **fields)


def answer_of(
    tokenizer: Tokenizer, reading: Reading | None, params: SamplingParams, events: list[TokenEvent], stream: bool
) -> list[dict[str, Any]]:
    """One answer, as its choice or as the choices of its chunks."""
    answer = ChatAnswer(asked(return_token_ids=True), "m", tokenizer, params, [1], reading)
    chunks = b""
    for event in events:
        delta = answer.feed(0, event)
        if delta is None:
            continue
        if stream:
            chunks += answer.chunk(0, delta)
        else:
            answer.add(0, delta)
    if not stream:
        return [json.loads(openai.to_json(answer.whole()))["choices"][0]]
    frames = chunks.decode().removesuffix("\n\n").split("\n\n")
    return [json.loads(frame.removeprefix("data: "))["choices"][0] for frame in frames]


def joined(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """The choice that a stream's chunks add up to, each checked for its shape."""
    first, last = choices[0], choices[-1]
    assert first["delta"] == {"role": "assistant", "content": ""} and last["delta"] == {}
    assert [choice["finish_reason"] is None for choice in choices] == [True] * (len(choices) - 1) + [False]
    message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
    logprobs: list = []
    ids: list[int] = []
    for choice in choices[1:-1]:
        delta = choice["delta"]
        assert len(delta) == 1, "one thing a chunk"
        message["content"] += delta.get("content", "")
        if "reasoning_content" in delta:
            message["reasoning_content"] = message.get("reasoning_content", "") + delta["reasoning_content"]
        for call in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in call:
                assert call.keys() == {"index", "id", "type", "function"} and call["index"] == len(calls)
                assert call["function"].keys() == {"name", "arguments"} and call["function"]["arguments"] == ""
                calls.append({"id": call["id"], "type": call["type"], "function": dict(call["function"])})
            else:
                assert call.keys() == {"index", "function"} and call["function"].keys() == {"arguments"}
                assert call["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += call["function"]["arguments"]
        logprobs += (choice["logprobs"] or {"content": []})["content"]
        ids += choice.get("token_ids", [])
    if "tool_calls" in message and not message["content"]:
        message["content"] = None
    return {"message": message, "logprobs": logprobs, "token_ids": ids, "finish_reason": last["finish_reason"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    """Ids of calls are drawn anew for each answer, unless the model wrote them."""
    calls = [{**call, "id": ""} for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls} if calls else message


@settings(max_examples=150)
@given(
    form=st.sampled_from([*FORMATS, "none"]),
    reasoning=st.sampled_from(list(parsers.REASONING_PARSERS)),
    text=texts,
    tools=st.sampled_from([[], TOOLS]),
    prompt=st.sampled_from(["assistant\n", "assistant\n<think>\n"]),
    parallel=st.booleans(),
    stop=st.sampled_from([[], ["}"], ["get", "</"]]),
    ends=st.sampled_from(["stop", "length"]),
    num_top=st.sampled_from([None, 0]),
    data=st.data(),
)
def test_a_stream_tells_what_the_whole_answer_tells(
    tokenizer, form, reasoning, text, tools, prompt, parallel, stop, ends, num_top, data
) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    pieces = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    events = [
        TokenEvent(
            id="1",
            token_ids=piece,
            logprobs=[] if num_top is None else [Logprobs(id, -0.5, 1, [], []) for id in piece],
            finish_reason=ends if i == len(pieces) - 1 else None,
        )
        for i, piece in enumerate(pieces)
    ]
    params = SamplingParams(stop=stop, logprobs=num_top)
    reading = Reading(form, reasoning, tools, prompt, parallel)
    streamed = joined(answer_of(tokenizer, reading, params, events, stream=True))
    (whole,) = answer_of(tokenizer, reading, params, events, stream=False)
    one = TokenEvent(id="1", token_ids=ids, finish_reason=ends)
    (at_once,) = answer_of(tokenizer, reading, SamplingParams(stop=stop), [one], stream=False)
    assert without_ids(streamed["message"]) == without_ids(whole["message"]) == without_ids(at_once["message"])
    assert streamed["finish_reason"] == whole["finish_reason"] == at_once["finish_reason"]
    assert streamed["token_ids"] == whole["token_ids"]
    assert streamed["logprobs"] == (whole["logprobs"] or {"content": []})["content"]
    assert len(streamed["logprobs"]) == (0 if num_top is None else len(whole["token_ids"]))
    called = "tool_calls" in whole["message"]
    assert (whole["finish_reason"] == "tool_calls") <= called and (not tools) <= (not called)


@pytest.mark.parametrize("form", FORMATS)
def test_calls_are_told_though_their_markers_are_special_tokens(tokenizer: Tokenizer, form: str) -> None:
    wanted = [("get_weather", {"s": "Köln €", "i": 3}), ("now", {})]
    text = "<think>\nhm\n</think>\n\nLet me see." + written(form, wanted)
    event = TokenEvent(id="1", token_ids=tokenizer.encode(text, add_special_tokens=False), finish_reason="stop")
    reading = Reading(form, "think", TOOLS, "assistant\n", True)
    (choice,) = answer_of(tokenizer, reading, SamplingParams(), [event], stream=False)
    message = choice["message"]
    calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message["tool_calls"]]
    assert (message["reasoning_content"], message["content"], calls) == ("hm", "Let me see.", wanted)
    assert choice["finish_reason"] == "tool_calls" and {c["type"] for c in message["tool_calls"]} == {"function"}
    assert len({c["id"] for c in message["tool_calls"]}) == 2
    one = Reading(form, "think", TOOLS, "assistant\n", False)
    (choice,) = answer_of(tokenizer, one, SamplingParams(), [event], stream=False)
    assert [c["function"]["name"] for c in choice["message"]["tool_calls"]] == ["get_weather"]


def test_without_parsers_nothing_changes(tokenizer: Tokenizer) -> None:
    text = "<think>hm</think>" + written("hermes", [("now", {})])
    event = TokenEvent(id="1", token_ids=tokenizer.encode(text, add_special_tokens=False), finish_reason="stop")
    (choice,) = answer_of(tokenizer, None, SamplingParams(skip_special_tokens=False), [event], stream=False)
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    (bare,) = answer_of(tokenizer, Reading("hermes", "none", [], "", True), SamplingParams(), [event], stream=False)
    assert "<tool_call>" not in bare["message"]["content"], "special tokens are skipped where nobody reads them"
