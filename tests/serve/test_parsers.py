"""Tool calls and reasoning: each format read as its model writes it, at every split of the text, in linear time."""

import codecs
import itertools
import json
import time
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodeploy.errors import ConfigError
from nanodeploy.serve import parsers
from nanodeploy.serve.parsers import Content, Event, Parser, Reasoning, ToolArguments, ToolStart
from nanodeploy.serve.parsers.events import joined
from nanodeploy.serve.parsers.values import ANYTHING, STRING, Tools, kinds, to_json

FORMATS = {name: form for name, form in parsers.TOOL_PARSERS.items() if form is not None}
SCHEMA = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "i": {"type": "integer"},
        "n": {"type": "number"},
        "b": {"type": "boolean"},
        "a": {"type": "array", "items": {}},
        "o": {"type": "object"},
        "m": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "e": {"$ref": "#/$defs/colour"},
    },
    "$defs": {"colour": {"enum": ["red", "7"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "ns.f-2", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
Call = tuple[str, dict[str, Any]]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def plain(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def dsml(calls: list[Call], block: str) -> str:
    text = f"\n\n<｜DSML｜{block}>\n"
    for name, arguments in calls:
        text += f'<｜DSML｜invoke name="{name}">\n'
        for key, value in arguments.items():
            flag = "true" if isinstance(value, str) else "false"
            text += f'<｜DSML｜parameter name="{key}" string="{flag}">{plain(value)}</｜DSML｜parameter>\n'
        text += "</｜DSML｜invoke>\n"
    return text + f"</｜DSML｜{block}>"


def written(form: str, calls: list[Call]) -> str:
    """Calls as a model of this format writes them."""
    if form == "hermes":
        each = (f'<tool_call>\n{{"name": "{n}", "arguments": {dumps(a)}}}\n</tool_call>' for n, a in calls)
        return "\n" + "\n".join(each)
    if form == "qwen3_coder":
        text = ""
        for name, arguments in calls:
            values = "".join(f"<parameter={k}>\n{plain(v)}\n</parameter>\n" for k, v in arguments.items())
            text += f"\n<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"
        return text
    if form == "glm47":
        text = ""
        for name, arguments in calls:
            pairs = (f"<arg_key>{k}</arg_key><arg_value>{plain(v)}</arg_value>" for k, v in arguments.items())
            text += f"<tool_call>{name}{''.join(pairs)}</tool_call>"
        return text
    if form in ("deepseek_v32", "deepseek_v4"):
        return dsml(calls, "function_calls" if form == "deepseek_v32" else "tool_calls")
    if form == "kimi_k2":
        text = "<|tool_calls_section_begin|>"
        for i, (name, arguments) in enumerate(calls):
            text += f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{dumps(arguments)}"
            text += "<|tool_call_end|>"
        return text + "<|tool_calls_section_end|>"
    fenced = form == "deepseek_v3"
    each = (
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{n}\n```json\n{dumps(a)}\n```<｜tool▁call▁end｜>"
        if fenced
        else f"<｜tool▁call▁begin｜>{n}<｜tool▁sep｜>{dumps(a)}<｜tool▁call▁end｜>"
        for n, a in calls
    )
    return "<｜tool▁calls▁begin｜>" + ("\n" if fenced else "").join(each) + "<｜tool▁calls▁end｜>"


def parser(form: str | None, reasoning: str = "none", opened: bool = False, parallel: bool = True) -> Parser:
    numbers = itertools.count()
    return Parser(
        FORMATS[form] if form else None,
        parsers.REASONING_PARSERS[reasoning],
        Tools(TOOLS),
        prompt_opens_thinking=opened,
        parallel=parallel,
        new_id=lambda: f"id{next(numbers)}",
    )


def read(machine: Parser, pieces: Iterable[str]) -> list[Event]:
    events: list[Event] = []
    for piece in pieces:
        events += machine.feed(piece)
    return joined(events + machine.finish())


def calls_of(events: list[Event]) -> list[tuple[str, str]]:
    """(name, arguments as text) of each call."""
    arguments = {e.index: e.delta for e in events if isinstance(e, ToolArguments)}
    return [(e.name, arguments.get(e.index, "")) for e in events if isinstance(e, ToolStart)]


def content_of(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Content))


def reasoning_of(events: list[Event]) -> str:
    return "".join(e.text for e in events if isinstance(e, Reasoning))


# Text that is likely to hit something: pieces of every format, whole and cut.
FRAGMENTS = [
    *("<think>", "</think>", "</thi", " ", "\n", "\n\n", "<", ">", '"', "\\", "{", "}", "[", "]", ",", ":", "a", "é😀"),
    *("true", "null", "1.5", "True", '"name"', '"arguments"', '{"name": "f", "arguments": {"x": "</tool_call>"}}'),
    *('{"name": "f"', '"arguments": {"a": [1, "}"]}', "```json", "```", "function", "f", 'name="p" string="true"'),
    *("<tool_call>", "</tool_call>", "<tool_", "<function=f>", "</function>", "<parameter=s>\n", "<parameter=i>"),
    *("\n</parameter>", "</parameter>", "<arg_key>i</arg_key>", "<arg_value>", "</arg_value>", "<arg_key>"),
    *("<｜DSML｜function_calls>\n", "<｜DSML｜tool_calls>\n", '<｜DSML｜invoke name="f">\n', "</｜DSML｜invoke>\n"),
    *('<｜DSML｜parameter name="p" string="true">', '<｜DSML｜parameter name="i" string="false">', "<｜DSML｜"),
    *("</｜DSML｜parameter>", "</｜DSML｜function_calls>", "</｜DSML｜tool_calls>"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
        "<｜tool▁calls▁end｜>",
    ),
    *("<|tool_calls_section_begin|>", "<|tool_call_begin|>functions.f:0", "<|tool_call_argument_begin|>"),
    *("<|tool_call_end|>", "<|tool_calls_section_end|>"),
    *(written(form, [("get_weather", {"s": "x", "i": 1}), ("now", {})]) for form in FORMATS),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)
some_format = st.sampled_from([*FORMATS, None])
some_reasoning = st.sampled_from(list(parsers.REASONING_PARSERS))


@settings(max_examples=500)
@given(some_format, some_reasoning, st.booleans(), st.booleans(), texts, st.data())
def test_every_split_gives_the_same(
    form: str | None, reasoning: str, opened: bool, parallel: bool, text: str, data: st.DataObject
) -> None:
    """Cut between any two bytes, as tokens do: the detokenizer's decoder is in between."""
    options = (form, reasoning, opened, parallel)
    whole = read(parser(*options), [text])
    assert read(parser(*options), text) == whole
    raw = text.encode()
    places = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    decode = codecs.getincrementaldecoder("utf-8")().decode
    pieces = [decode(raw[a:b]) for a, b in zip([0, *places], [*places, len(raw)], strict=True)]
    assert read(parser(*options), pieces) == whole


@settings(max_examples=300)
@given(some_format, texts)
def test_without_a_call_every_character_is_content(form: str | None, text: str) -> None:
    machine = parser(form)
    events = read(machine, [text])
    if machine.num_calls == 0:
        assert content_of(events) == text and reasoning_of(events) == ""


@settings(max_examples=300)
@given(some_format, some_reasoning, texts)
def test_calls_come_in_order_and_whole_xml_arguments_are_json(form: str | None, reasoning: str, text: str) -> None:
    events = read(parser(form, reasoning), [text])
    starts = [e.index for e in events if isinstance(e, ToolStart)]
    assert starts == list(range(len(starts)))
    begun = -1
    for event in events:
        if isinstance(event, ToolStart):
            begun = event.index
        elif isinstance(event, ToolArguments):
            assert event.index == begun
    if form in ("qwen3_coder", "glm47"):
        closed = [arguments for _, arguments in calls_of(events)[:-1]]  # the last may be cut off
        for arguments in closed:
            if arguments.endswith("}"):
                json.loads(arguments)


# Round trips. Text in tags cannot be escaped, so values that contain the closing tag are left out.
letters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=12)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | letters,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(letters, inner, max_size=3),
    max_leaves=6,
)
members = {
    "s": letters.filter(lambda s: "</" not in s),
    "i": st.integers(-(2**40), 2**40),
    "n": st.floats(-1e6, 1e6).filter(lambda x: x != int(x)) | st.integers(-5, 5),
    "b": st.booleans(),
    "a": st.lists(json_values, max_size=3),
    "o": st.dictionaries(letters, json_values, max_size=3),
    "m": st.integers(0, 9) | st.none(),
    "e": st.sampled_from(["red", "7"]),
}
some_arguments = st.fixed_dictionaries({}, optional=members).filter(
    lambda a: "</" not in dumps(a) and "<｜" not in dumps(a)
)
some_calls = st.lists(
    st.tuples(st.sampled_from(["get_weather", "ns.f-2"]), some_arguments) | st.just(("now", {})), min_size=1, max_size=3
)


@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=100)
@given(calls=some_calls, words=st.sampled_from(["", "I look it up.", "a < b, <tool and <"]), think=st.booleans())
def test_calls_are_read_as_they_were_written(form: str, calls: list[Call], words: str, think: bool) -> None:
    text = ("<think>\nhm, <tool_\n</think>\n\n" if think else "") + words + written(form, calls)
    events = read(parser(form, "think"), [text])
    assert [(name, json.loads(arguments)) for name, arguments in calls_of(events)] == calls
    assert content_of(events) == words
    assert reasoning_of(events) == ("hm, <tool_" if think else "")
    ids = [e.id for e in events if isinstance(e, ToolStart)]
    expected = [f"functions.{name}:{i}" if form == "kimi_k2" else f"id{i}" for i, (name, _) in enumerate(calls)]
    assert ids == expected
    assert read(parser(form, "think"), text) == events
    first = read(parser(form, "think", parallel=False), [text])
    assert calls_of(first) == calls_of(events)[:1] and content_of(first) == words


def test_arguments_stream() -> None:
    machine = parser("qwen3_coder")
    assert machine.feed("<tool_call>\n<function=get_weather>\n<parameter=s>\nKö") == [
        ToolStart(0, "id0", "get_weather"),
        ToolArguments(0, '{"s": "Kö'),
    ]
    assert machine.feed('ln "Süd"\n</para') == [ToolArguments(0, 'ln \\"Süd\\"')]
    assert machine.feed("meter>\n<parameter=i>\n4") == [ToolArguments(0, '", "i": ')]
    assert machine.feed("2\n</parameter>\n</function>") == [ToolArguments(0, "42}")]
    assert machine.feed("\n</tool_call>\nDone.") == [Content("Done.")]
    hermes = parser("hermes")
    assert hermes.feed('Hi <tool_call>{"name": "f", "arg') == [Content("Hi")]
    assert hermes.feed('uments": {"a": "b') == [ToolStart(0, "id0", "f"), ToolArguments(0, '{"a": "b')]


@pytest.mark.parametrize(
    ("reasoning", "opened", "text", "thought", "said"),
    [
        ("think", False, "<think>\na\n</think>\n\nb", "a", "b"),
        ("think", False, "\n<think>a</think>b", "a", "b"),
        ("think", True, "a</think>\nb", "a", "b"),
        ("think", True, "<think>a</think>b", "a", "b"),
        ("think", False, "no thought", "", "no thought"),
        ("think", False, "say <think>a</think>", "", "say <think>a</think>"),
        ("think", True, "never closed </thin", "never closed </thin", ""),
        ("deepseek_r1", False, "a\n\n</think>\nb", "a", "b"),
        ("deepseek_r1", False, "<think>\na</think> b </think>", "a", "b </think>"),
        ("none", True, "<think>a</think>b", "", "<think>a</think>b"),
    ],
)
def test_reasoning(reasoning: str, opened: bool, text: str, thought: str, said: str) -> None:
    for pieces in ([text], text):
        events = read(parser(None, reasoning, opened), pieces)
        assert (reasoning_of(events), content_of(events)) == (thought, said)


@pytest.mark.parametrize("form", FORMATS)
def test_a_call_ends_reasoning_that_was_never_closed(form: str) -> None:
    call = written(form, [("get_weather", {"i": 3})])
    events = read(parser(form, "think", opened=True), ["I call <tool_call> now. " + call + "\n</think>\nafter"])
    assert calls_of(events) == [("get_weather", '{"i": 3}')]
    assert reasoning_of(events) == "I call <tool_call> now." and content_of(events) == "after"


@pytest.mark.parametrize(
    ("form", "text", "calls"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": null, "id": [1]}</tool_call>', [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}}</tool_call>', [("f", '{"a": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": oops, <b>}</tool_call>', [("f", '{"a": oops, <b>}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call>', [("f", '{"a": 1')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut', [("f", '{"a": "cut')]),
        ("qwen3_coder", "<function=f>\n<parameter=q>\n1\n</parameter>\n</function>\n</tool_call>", [("f", '{"q": 1}')]),
        ("qwen3_coder", "<tool_call><function=f></tool_call>", [("f", "{}")]),
        ("qwen3_coder", "<tool_call>\n<function=f>\njunk\n</function>\n</tool_call>", [("f", "{}")]),
        ("glm47", "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>x</arg_value>\n</tool_call>", [("f", '{"k": "x"}')]),
        ("glm47", "<tool_call>now</tool_call>", [("now", "{}")]),
        ("kimi_k2", "<|tool_call_begin|>f:7<|tool_call_argument_begin|><|tool_call_end|>", [("f", "{}")]),
        ("deepseek_v31", "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜>", [("f", "{}")]),
        ("deepseek_v32", '<｜DSML｜invoke name="f">\n{"a": "b"}\n</｜DSML｜invoke>', [("f", '{"a": "b"}')]),
        (
            "deepseek_v32",
            '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="p" string="true">5'
            "</｜DSML｜parameter>\n</｜DSML｜invoke>",
            [("f", '{"p": "5"}')],
        ),
        (
            "deepseek_v4",
            '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="p" string="false">"x"'
            "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
            [("f", '{"p": "x"}')],
        ),
    ],
)
def test_calls_as_models_also_write_them(form: str, text: str, calls: list[tuple[str, str]]) -> None:
    events = read(parser(form), [text])
    assert calls_of(events) == calls and content_of(events) == ""


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "<tool_call> is what I write"),
        ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>[{"name": "f"}]</tool_call>'),
        ("qwen3_coder", "<tool_call>\n<parameter=x>1</parameter>"),
        ("glm47", "<tool_call>no call</tool_call>"),
        ("kimi_k2", "<|tool_calls_section_begin|><|tool_calls_section_end|>"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}"),
        ("deepseek_v32", "<｜DSML｜function_calls>\n</｜DSML｜function_calls>"),
    ],
)
def test_what_only_looks_like_a_call_is_content(form: str, text: str) -> None:
    events = read(parser(form), [text])
    assert calls_of(events) == [] and content_of(events) == text


@pytest.mark.parametrize("form", ["deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "kimi_k2"])
def test_a_broken_call_behind_a_good_one_is_content(form: str) -> None:
    ends = {"deepseek_v32": "</｜DSML｜function_calls>", "deepseek_v4": "</｜DSML｜tool_calls>"}
    end = ends.get(form) or FORMATS[form].tokens[1]
    broken = FORMATS[form].openers[1] + "{ oops"
    events = read(parser(form), [written(form, [("now", {})]).removesuffix(end) + broken])
    assert calls_of(events) == [("now", "{}")] and content_of(events) == broken


def test_a_second_call_after_a_broken_one() -> None:
    text = '<tool_call>{"nam <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert calls_of(read(parser("hermes"), [text])) == []  # the string swallowed it: no text is read twice
    text = '<tool_call>{nam <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    events = read(parser("hermes"), [text])
    assert calls_of(events) == [("f", "{}")] and content_of(events) == "<tool_call>{nam"


@pytest.mark.parametrize(
    ("text", "allowed", "expected"),
    [
        ("5", STRING, '"5"'),
        (" 5 ", frozenset({"integer"}), "5"),
        ("5", frozenset({"number"}), "5"),
        ("5.5", frozenset({"integer"}), '"5.5"'),
        ("True", frozenset({"boolean"}), "true"),
        ("None", frozenset({"string", "null"}), "null"),
        ("none", frozenset({"string", "null"}), '"none"'),
        ("NaN", frozenset({"number"}), '"NaN"'),
        ("[1, 2", frozenset({"array"}), '"[1, 2"'),
        ('{"a": 1}', frozenset({"array"}), '"{\\"a\\": 1}"'),
        ('{"a": 1}', ANYTHING, '{"a": 1}'),
        ("hello", ANYTHING, '"hello"'),
        ('"x"', ANYTHING, '"\\"x\\""'),
        ("[" * 100_000, ANYTHING, json.dumps("[" * 100_000)),
        ("9" * 400, frozenset({"integer"}), "9" * 400),
        ("", frozenset({"integer"}), '""'),
    ],
)
def test_values_get_the_schemas_type(text: str, allowed: frozenset[str], expected: str) -> None:
    assert to_json(text, allowed) == expected


def test_types_of_a_schema() -> None:
    root = {"$defs": {"x": {"type": ["string", "null"]}, "loop": {"$ref": "#/$defs/loop"}}}
    assert kinds({"$ref": "#/$defs/x"}, root) == {"string", "null"}
    assert kinds({"anyOf": [{"const": 1}, {"enum": ["a", None]}]}, root) == {"integer", "string", "null"}
    assert kinds({"oneOf": [{"type": "string"}, {}]}, root) == ANYTHING
    for strange in ({"$ref": "#/$defs/loop"}, {"$ref": "#/none"}, {"$ref": "http://x/"}, {}, None, 5, {"type": 5}):
        assert kinds(strange, root) == ANYTHING
    assert Tools([{"function": {"name": "f", "parameters": {"properties": []}}}, {}]).kinds("f", "x") == ANYTHING


PATHOLOGICAL = [
    *("<", "<tool_call>", "<tool_call>{", '<tool_call>{"name": "', '<tool_call>{"arguments": [', " ", "<tool_call>\n "),
    *("<function=f>", "<function=f><parameter=", "<function=f><parameter=s>\n\n</paramete", "<tool_call>f<arg_key>"),
    *("<｜DSML｜invoke", '<｜DSML｜invoke name="f">', "<｜DSML｜tool_calls>\n", "<|tool_call_begin|>f:0"),
    *(
        "<|tool_call_begin|>f:0<|tool_call_argument_begin|>{",
        "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{",
        "</thin",
        "\\",
        "\\u",
    ),
    *('<tool_call>{"name": "f", "arguments": {"a": "', '{"a":[1,"x"],'),
]


@pytest.mark.parametrize("form", FORMATS)
def test_a_megabyte_takes_linear_time(form: str) -> None:
    """Whole, and in pieces of a token's size."""
    began = time.process_time()
    for text in PATHOLOGICAL:
        once = text * (30_000 // len(text))
        read(parser(form, "think", opened=True), [once])
        read(parser(form), [once[i : i + 5] for i in range(0, 15_000, 5)])
    megabyte = "<tool_call>{" * 90_000
    read(parser(form), [megabyte])
    read(parser(form), [written(form, [("f", {"s": "<" * 1_000_000})])])
    assert time.process_time() - began < 20  # some 2 s; anything quadratic takes many minutes


@pytest.mark.parametrize(
    "text", ['<tool_call>{"', "<function=f><parameter=s>\n", "<tool_call>{", "<tool_call>a<arg_key>"]
)
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "glm47"])
def test_twice_the_text_takes_twice_the_time(form: str, text: str) -> None:
    def seconds(count: int) -> float:
        pieces = [text] * count
        began = time.process_time()
        read(parser(form), pieces)
        return time.process_time() - began

    ratio = min(seconds(8_000) / max(seconds(2_000), 1e-3) for _ in range(3))
    assert ratio < 4 * 2.5


@pytest.mark.parametrize(
    ("model_type", "template", "names"),
    [
        ("qwen3", '<tool_call>\n{"name": <function-name>} ... </think>', ("hermes", "think")),
        ("qwen3_moe", '<tool_call>\n{"name": ...', ("hermes", "none")),
        ("qwen3_5", "<tool_call>\n<function=example>\n</think>", ("qwen3_coder", "think")),
        ("glm_moe_dsa", "<tool_call>{name}<arg_key>k</arg_key></think>", ("glm47", "think")),
        ("glm_moe_dsa", None, ("glm47", "think")),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> ```json", ("deepseek_v3", "none")),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> ```json split('</think>')", ("deepseek_v3", "deepseek_r1")),
        ("deepseek_v3", "<｜tool▁calls▁begin｜> thinking </think>", ("deepseek_v31", "think")),
        ("deepseek_v32", None, ("deepseek_v32", "think")),
        ("deepseek_v4", None, ("deepseek_v4", "think")),
        ("kimi_k2", "<|tool_calls_section_begin|>", ("kimi_k2", "none")),
        ("kimi_k2", "<|tool_calls_section_begin|></think>", ("kimi_k2", "think")),
        ("llama", "plain", ("none", "none")),
        (None, None, ("none", "none")),
    ],
)
def test_the_parsers_are_chosen_from_the_model(model_type: str | None, template: str | None, names: tuple) -> None:
    assert parsers.choose(model_type, template) == names


def test_flags_choose_the_parsers() -> None:
    assert parsers.choose("qwen3", None, "qwen3", "deepseek_v31") == ("hermes", "think")
    assert parsers.choose("deepseek_v4", None, "none", "none") == ("none", "none")
    with pytest.raises(ConfigError, match=r"--tool-call-parser is 'hermez'.*Did you mean hermes"):
        parsers.choose("qwen3", None, "hermez")
    with pytest.raises(ConfigError, match="--reasoning-parser"):
        parsers.choose("qwen3", None, "auto", "x")


def test_make_and_shown_tokens() -> None:
    text = '<think>a</think>b<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    events = read(parsers.make("hermes", "think", None, "<|im_start|>assistant\n"), [text])
    assert calls_of(events) == [] and content_of(events).startswith("b<tool_call>")  # no tools: no calls
    events = read(parsers.make("hermes", "think", TOOLS, "<|im_start|>assistant\n<think>\n"), [text[7:]])
    assert calls_of(events) == [("f", "{}")] and reasoning_of(events) == "a"
    assert next(e.id for e in events if isinstance(e, ToolStart)).startswith("call_")
    assert {"<tool_call>", "</think>"} <= parsers.shown_tokens("hermes", "think")
    assert parsers.shown_tokens("none", "none") == frozenset()
