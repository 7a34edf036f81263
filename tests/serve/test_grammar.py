"""Answers held to a grammar: whatever a model prefers, what comes out is valid; and no grammar hurts the server."""

import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import ROOT, make_tokenizer
from test_parsers import FORMATS, calls_of, content_of, read
from tokenizers import AddedToken
from tokenizers import Tokenizer as HuggingFace

from nanodeploy.catalog import read_json
from nanodeploy.errors import ConfigError, RequestError
from nanodeploy.matcher import Grammar, MaskFiller, Matcher, Vocabulary, failed
from nanodeploy.serve.grammar import GrammarText, Thinks, grammar_of, thinks_of
from nanodeploy.serve.grammar_check import GrammarChecker
from nanodeploy.serve.lark import special_tokens
from nanodeploy.serve.parsers import REASONING_PARSERS, Parser
from nanodeploy.serve.parsers.values import Tools
from nanodeploy.serve.tokenizer import Tokenizer

DEMO = ROOT / "nanodeploy" / "demo" / "qwen3"
MAX_STEPS = 2000


class Model:
    """A tokenizer, and what generates with it at random."""

    def __init__(self, directory: Path, end: str):
        source = (directory / "tokenizer.json").read_text()
        self.path = directory / "tokenizer.json"
        self.tokenizer = Tokenizer(directory)
        self.special = special_tokens(read_json(self.path))
        self.end = self.special[end]
        self.vocab_size = (self.tokenizer.vocab_size + 100) // 64 * 64  # logits are padded
        self.vocabulary = Vocabulary(source, self.vocab_size, [self.end])

    def matcher(self, **request: Any) -> Matcher:
        grammar = grammar_of(self.special, **request)
        assert grammar is not None and grammar.user is None
        return Grammar(self.vocabulary, grammar.text).matcher()

    def allowed(self, matcher: Matcher) -> list[int]:
        bits = np.unpackbits(np.frombuffer(matcher.mask(), np.uint8), bitorder="little")
        return np.flatnonzero(bits).tolist()

    def say(self, matcher: Matcher, text: str) -> bool:
        """Whether all of a text may follow; if so, it does."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if matcher.accepted(ids) < len(ids):
            return False
        assert all(map(matcher.accept, ids))
        return True

    def walk(self, matcher: Matcher, rng: random.Random, closers: tuple[str, ...] = ()) -> str:
        """An answer drawn from the masks. `closers` end what the grammar leaves open for ever."""
        answer: list[int] = []
        for _ in range(MAX_STEPS):
            allowed = self.allowed(matcher)
            assert allowed and max(allowed) < self.vocab_size
            if self.end in allowed:
                if matcher.is_done or rng.random() < 0.3:
                    assert matcher.may_end and matcher.accept(self.end)
                    return self.tokenizer.decode(answer, skip_special_tokens=False)
                allowed.remove(self.end)
            closer = self.tokenizer.encode(rng.choice(closers), add_special_tokens=False) if closers else []
            if closer and rng.random() < 0.4 and matcher.accepted(closer) == len(closer):
                assert all(map(matcher.accept, closer))
                answer += closer
                continue
            solid = [id for id in allowed if self.tokenizer.token_bytes(id).strip()]
            answer.append(rng.choice(solid if solid and rng.random() < 0.9 else allowed))
            assert matcher.accept(answer[-1])
        raise AssertionError("it never ends")


@functools.cache
def demo() -> Model:
    return Model(DEMO, "<|im_end|>")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Model]:
    """Tokenizers by tool format: with its markers as tokens of their own, or spelled as any text."""

    @functools.cache
    def make(form: str, own_tokens: bool) -> Model:
        directory = tmp_path_factory.mktemp(form)
        make_tokenizer(directory)
        path = str(directory / "tokenizer.json")
        tokenizer = HuggingFace.from_file(path)
        if own_tokens:
            markers = FORMATS[form].tokens
            tokenizer.add_tokens([AddedToken(text, special=form.startswith("kimi")) for text in markers])
        tokenizer.add_tokens([AddedToken("</think>", special=False)])
        tokenizer.save(path)
        return Model(directory, "<|im_end|>")

    return make


# Schemas that bound every length, so that any answer ends.
names = st.sampled_from(["a", "b", "name", "é"])
leaves: st.SearchStrategy[dict[str, Any]] = (
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4))
    | st.builds(
        lambda v: {"enum": v}, st.lists(st.sampled_from(["x", "y z", 3, None, "ü"]), min_size=1, unique_by=repr)
    )
    | st.builds(lambda v: {"const": v}, st.sampled_from(["k", 0, True, [1, {"a": None}]]))
    | st.builds(
        lambda a, b: {"type": "integer", "minimum": a, "maximum": a + b}, st.integers(-9, 9), st.integers(0, 200)
    )
    | st.just({"type": "string", "pattern": "^[ab]{1,3}$"})
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}])
)


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    @st.composite
    def build(draw: st.DrawFn) -> dict[str, Any]:
        properties = draw(st.dictionaries(names, inner, max_size=3))
        required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return build()


schemas = st.recursive(
    leaves,
    lambda inner: (
        objects(inner)
        | st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3))
        | st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=2))
    ),
    max_leaves=5,
)
randoms = st.integers(0, 2**32).map(random.Random)


@settings(max_examples=60)
@given(schema=schemas, rng=randoms, wrapped=st.booleans())
def test_every_walk_is_valid_under_the_schema(schema: dict[str, Any], rng: random.Random, wrapped: bool) -> None:
    asked: dict[str, Any] = {"structured": {"json": schema}}
    if wrapped:
        described = {"name": "x", "strict": True, "schema": schema}
        asked = {"response_format": {"type": "json_schema", "json_schema": described}}
    jsonschema.validate(json.loads(demo().walk(demo().matcher(**asked), rng)), schema)


@settings(max_examples=10)
@given(rng=randoms)
def test_a_json_object_is_one(rng: random.Random) -> None:
    matcher = demo().matcher(response_format={"type": "json_object"})
    assert isinstance(json.loads(demo().walk(matcher, rng, closers=('"', "}", "]", "1"))), dict)


STRICT_SCHEMA = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "colour": {"enum": ["red", "blue"]},
        "i": {"type": "integer", "minimum": 0, "maximum": 99},
        "flag": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/small"}, "maxItems": 2},
    },
    "$defs": {"small": {"enum": [1, 2, "three"]}},
    "required": ["colour", "i"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": STRICT_SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "get_time"}},
]
CLOSERS = {
    "qwen3_coder": ("\n</parameter>\n", "x</parameter>\n", "</parameter> y", "</par"),
    "glm47": ("</arg_value>",),
    "deepseek_v32": ("</｜DSML｜parameter>\n",),
    "deepseek_v4": ("</｜DSML｜parameter>\n",),
}


def calls_in(text: str, form: str, think: bool = False) -> list[tuple[str, Any]]:
    """The calls that the parser reads, each valid for its tool; nothing else may stand beside them."""
    machine = Parser(FORMATS[form], None, Tools(TOOLS))
    if think:
        machine = Parser(FORMATS[form], REASONING_PARSERS["think"], Tools(TOOLS), prompt_opens_thinking=True)
    events = read(machine, [text])
    calls = [(name, json.loads(arguments)) for name, arguments in calls_of(events)]
    for name, arguments in calls:
        jsonschema.validate(arguments, STRICT_SCHEMA if name == "get_weather" else {"maxProperties": 0})
    assert content_of(events) == ""
    return calls


@pytest.mark.parametrize("own_tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("form", FORMATS)
@settings(max_examples=8)
@given(rng=randoms, choice=st.sampled_from(["required", "one", "named"]))
def test_required_calls_are_read_by_the_parser(
    models: Callable[[str, bool], Model], form: str, own_tokens: bool, rng: random.Random, choice: str
) -> None:
    model = models(form, own_tokens)
    named = {"type": "function", "function": {"name": "get_weather"}}
    matcher = model.matcher(
        tool_format=FORMATS[form],
        tools=TOOLS,
        tool_choice=named if choice == "named" else "required",
        parallel=choice != "one",
    )
    calls = calls_in(model.walk(matcher, rng, (*CLOSERS.get(form, ()), '"')), form)
    assert len(calls) >= 1
    if choice != "required":
        assert len(calls) == 1
    if choice == "named":
        assert calls[0][0] == "get_weather"


@pytest.mark.parametrize("own_tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("form", FORMATS)
def test_auto_leaves_text_free_and_forces_what_a_call_begins(
    models: Callable[[str, bool], Model], form: str, own_tokens: bool
) -> None:
    model = models(form, own_tokens)
    matcher = model.matcher(tool_format=FORMATS[form], tools=TOOLS, tool_choice="auto")
    assert matcher.may_end and model.say(matcher, "Hello, the quick brown fox. ") and matcher.may_end
    assert model.say(matcher, FORMATS[form].openers[0])
    assert not matcher.may_end and not model.say(matcher, "Hello")
    rest = model.walk(matcher, random.Random(1), (*CLOSERS.get(form, ()), '"'))
    assert calls_in(FORMATS[form].openers[0] + rest, form)
    unrestricted = [{"type": "function", "function": {"name": "f"}}]
    assert grammar_of(model.special, tool_format=FORMATS[form], tools=unrestricted, tool_choice="auto") is None


@pytest.mark.parametrize("form", FORMATS)
def test_reasoning_stands_before_a_call(models: Callable[[str, bool], Model], form: str) -> None:
    model = models(form, True)
    asked = {"tool_format": FORMATS[form], "tools": TOOLS, "tool_choice": "required"}
    matcher = model.matcher(thinks=Thinks.ALREADY, **asked)
    thought = "The user wants, I think, a fox.\n</think>\n\n"
    assert model.say(matcher, thought)
    assert not model.say(matcher, "Hello")
    text = thought + model.walk(matcher, random.Random(2), (*CLOSERS.get(form, ()), '"'))
    assert calls_in(text, form, think=True)
    maybe = model.matcher(thinks=Thinks.MAYBE, **asked)
    assert not model.say(maybe, "Hello")
    assert model.say(maybe, "<think>\nhm") and not maybe.may_end and model.say(maybe, "</think>")
    without = model.matcher(thinks=Thinks.MAYBE, **asked)
    assert model.say(without, FORMATS[form].openers[0])


def test_reasoning_stands_before_a_form() -> None:
    matcher = demo().matcher(thinks=Thinks.MAYBE, structured={"choice": ["yes", "no"]})
    assert demo().say(matcher, "<think>\nhm {</think>\n\nyes") and matcher.is_done
    assert demo().say(demo().matcher(thinks=Thinks.MAYBE, structured={"choice": ["yes", "no"]}), "no")


def test_who_thinks() -> None:
    think, always = REASONING_PARSERS["think"], REASONING_PARSERS["deepseek_r1"]
    opened, closed, bare = "<|im_start|>assistant\n<think>\n", "assistant\n<think>\n\n</think>\n\n", "assistant\n"
    assert [thinks_of(think, prompt) for prompt in (opened, closed, bare)] == [
        Thinks.ALREADY,
        Thinks.NEVER,
        Thinks.MAYBE,
    ]
    assert thinks_of(always, bare) is Thinks.ALREADY and thinks_of(None, opened) is Thinks.NEVER
    matcher = demo().matcher(thinks=Thinks.ALREADY, structured={"choice": ["yes"]})
    assert demo().say(matcher, "<think>\nhm</think>yes")
    asked = {"tool_format": FORMATS["hermes"], "tools": TOOLS, "tool_choice": "auto"}
    for text in ("<think>hm</think>\n\nHello", "Hello"):
        free = demo().matcher(thinks=Thinks.MAYBE, **asked)
        assert demo().say(free, text) and free.may_end


def test_a_form_or_a_call() -> None:
    asked = {
        "tool_format": FORMATS["hermes"],
        "tools": TOOLS,
        "tool_choice": "auto",
        "response_format": {"type": "json_object"},
    }
    call = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'
    for text in ('{"a": 1}', call, "\n\n" + call):
        matcher = demo().matcher(**asked)
        assert demo().say(matcher, text) and matcher.may_end
    assert not demo().say(demo().matcher(**asked), "Hello")


@pytest.mark.parametrize(
    ("structured", "right", "wrong"),
    [
        ({"regex": r"\d{3}-[a/b]+"}, ["123-a", "000-/b"], ["12-a", "123-c", "123-"]),
        ({"regex": r"a\/b|c/d"}, ["a/b", "c/d"], ["a"]),
        ({"choice": ['é😀\n"\\', "b", "bc", "\x7f<tool_call>"]}, ['é😀\n"\\', "b", "bc"], ["c", "x"]),
        ({"json": '{"type": "integer"}'}, ["12"], ["a", '"']),
        ({"json": True}, ["null", '{"a": [1]}'], ["x"]),
        ({"json_object": True}, ["{}"], ["[]"]),
    ],
)
def test_structured_outputs(structured: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    for text in right:
        matcher = demo().matcher(structured=structured)
        assert demo().say(matcher, text) and matcher.may_end, text
    for text in wrong:
        matcher = demo().matcher(structured=structured)
        assert not (demo().say(matcher, text) and matcher.may_end), text


def test_what_asks_for_nothing_is_free() -> None:
    assert grammar_of({}) is None
    assert grammar_of({}, response_format={"type": "text"}, structured={"regex": None, "json_object": False}) is None
    assert grammar_of({}, tools=TOOLS, tool_choice="none", tool_format=FORMATS["hermes"]) is None
    assert grammar_of({}, tools=TOOLS, tool_choice="auto") is None  # no format, nothing to force


def strict(parameter: dict[str, Any]) -> dict[str, Any]:
    """A call in tags, with one parameter that its format cannot be held to."""
    function = {"name": "f", "strict": True, "parameters": {"properties": {"s": parameter}}}
    return {"tool_choice": "required", "tools": [{"function": function}], "tool_format": FORMATS["glm47"]}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object"}, "structured": {"regex": "a"}}, "structured_outputs"),
        ({"structured": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured": {"yaml": "a"}}, "structured_outputs"),
        ({"structured": {"json": "{"}}, "structured_outputs.json"),
        ({"structured": {"json": 5}}, "structured_outputs.json"),
        ({"structured": {"json": deep(70)}}, "structured_outputs.json"),
        ({"structured": {"json": "[" * 100_000}}, "structured_outputs.json"),
        ({"structured": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured": {"regex": "a\\"}}, "structured_outputs.regex"),
        ({"structured": {"regex": "(" * 70 + "a" + ")" * 70}}, "structured_outputs.regex"),
        ({"structured": {"regex": "a" * 300_000}}, "structured_outputs.regex"),
        ({"structured": {"choice": []}}, "structured_outputs.choice"),
        ({"structured": {"choice": ["a", 5]}}, "structured_outputs.choice"),
        ({"structured": {"choice": ["a", ""]}}, "structured_outputs.choice"),
        ({"structured": {"choice": ["\ud800"]}}, "structured_outputs.choice"),
        ({"structured": {"choice": [str(i) for i in range(5000)]}}, "structured_outputs.choice"),
        ({"structured": {"grammar": " "}}, "structured_outputs.grammar"),
        ({"tool_choice": "required", "tool_format": FORMATS["hermes"]}, "tool_choice"),
        ({"tool_choice": "required", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": "always", "tools": TOOLS, "tool_format": FORMATS["hermes"]}, "tool_choice"),
        (
            {
                "tool_choice": {"type": "function", "function": {"name": "g"}},
                "tools": TOOLS,
                "tool_format": FORMATS["hermes"],
            },
            "tool_choice",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [{"function": {"name": "f", "parameters": deep(70)}}],
                "tool_format": FORMATS["hermes"],
            },
            "tools",
        ),
        (strict({"type": "string", "pattern": "a"}), "tools"),
        (strict({"anyOf": [{"enum": ["a"]}, {"type": "integer"}]}), "tools"),
    ],
)
def test_requests_that_make_no_grammar(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as error:
        grammar_of({}, **asked)
    assert error.value.param == param


def test_masks_rollback_and_batches() -> None:
    model = demo()
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    grammar = grammar_of(model.special, structured={"json": schema})
    assert grammar is not None
    compiled = Grammar(model.vocabulary, grammar.text)
    first, second = compiled.matcher(), compiled.matcher()
    start = first.mask()
    assert len(start) == model.vocabulary.num_words * 4
    ids = model.tokenizer.encode('{"a": "x"}', add_special_tokens=False)
    masks = np.zeros((len(ids) + 3, model.vocabulary.num_words), np.int32)
    filler = MaskFiller(2)
    filler.fill_drafts([(first, 1, ids)], masks)
    for row, id in enumerate(ids, 1):
        assert masks[row].tobytes() == first.mask() and first.accept(id)
    assert first.is_done and model.allowed(first) == [model.end]
    assert first.accept(model.end) and first.is_done
    first.rollback(3)
    assert first.mask() == masks[len(ids) - 1].tobytes()
    first.rollback(len(ids) - 2)
    assert first.mask() == start == second.mask()
    assert not second.accept(model.end) and failed(second) == "" and second.mask() == start
    assert second.accepted([*ids[:2], model.end]) == 2
    filler.fill([(first, 0), (second, 2)], masks)
    assert masks[0].tobytes() == masks[2].tobytes() == start
    filler.fill([], masks)


def test_a_vocabulary_needs_ends_and_a_decoder_of_bytes(tmp_path: Path) -> None:
    source = (DEMO / "tokenizer.json").read_text()
    with pytest.raises(ConfigError, match="end token"):
        Vocabulary(source, 1024, [5000])
    with pytest.raises(ConfigError, match="vocab size too small"):
        Vocabulary(source, 100, [5])
    with pytest.raises(ConfigError, match="decoder"):
        Vocabulary(json.dumps(json.loads(source) | {"decoder": None}), 1024, [5])


# The process that compiles.


@pytest.fixture(scope="module")
def checker() -> Iterator[GrammarChecker]:
    made = GrammarChecker(DEMO / "tokenizer.json", 1024, [763], timeout_s=3.0, num_processes=1)
    yield made
    made.close()


def structured(value: dict[str, Any]) -> GrammarText:
    grammar = grammar_of(demo().special, structured=value)
    assert grammar is not None
    return grammar


def test_grammars_of_the_users_own(checker: GrammarChecker) -> None:
    lark = 'start: "a" NUMBER\nNUMBER: /[0-9]+/'
    ebnf = 'root ::= "a" number\nnumber ::= [0-9]+'
    for own in (lark, ebnf):
        for thinks, begin in ((Thinks.NEVER, ""), (Thinks.ALREADY, "hm</think>")):
            grammar = grammar_of(demo().special, thinks, structured={"grammar": own})
            assert grammar is not None
            matcher = Grammar(demo().vocabulary, checker.check(grammar)).matcher()
            assert demo().say(matcher, begin + "a12") and matcher.may_end
            assert not demo().say(matcher, "a")


BOMBS: dict[str, dict[str, Any]] = {
    "multiple": {"json": {"type": "integer", "multipleOf": 999_983}},
    "chain": {"grammar": "start: r0\n" + "\n".join(f'r{i}: "a" r{i + 1}' for i in range(9999)) + '\nr9999: "a"'},
    "doubling": {"grammar": "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(40)) + '\nR40: "a"'},
    "nested": {"grammar": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000},
    "wide": {"json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}},
    "self": {"json": {"$ref": "#"}},
    "remote": {"json": {"$ref": "http://127.0.0.1:1/x"}},
    "no_grammar": {"grammar": "::= ::="},
    "lookahead": {"regex": "(?=a)b"},
    "unknown": {"json": {"type": "string", "not": {"const": "a"}}},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_time(checker: GrammarChecker, name: str) -> None:
    checker.check(structured({"regex": "a+"}))  # the process runs
    began = time.monotonic()
    with pytest.raises(RequestError) as error:
        checker.check(structured(BOMBS[name]))
    assert time.monotonic() - began < 6
    assert error.value.param == f"structured_outputs.{next(iter(BOMBS[name]))}"
    assert len(str(error.value)) < 600
    checker.check(structured({"regex": "b+"}))  # and the next one is served


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", "a{1,100000}", "((a{1,1000}){1,1000}){1,1000}", ".*a.{200}b", r"\p{L}{500}"]
)
def test_regexes_that_explode_elsewhere_are_harmless(checker: GrammarChecker, pattern: str) -> None:
    began = time.monotonic()
    checker.check(structured({"regex": pattern}))
    assert time.monotonic() - began < 3


def test_many_at_once_and_a_killed_process() -> None:
    checker = GrammarChecker(DEMO / "tokenizer.json", 1024, [763], timeout_s=10.0)
    grammars = [structured({"regex": f"a{{{i}}}"}) for i in range(1, 20)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(checker.check, grammars)) == [grammar.text for grammar in grammars]
    for process in checker._all:
        if process._popen is not None:
            process._popen.kill()
            process._popen.wait()
    assert checker.check(structured({"regex": "again"}))
    pids = [process._popen.pid for process in checker._all if process._popen is not None]
    checker.close()
    assert pids and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_answers_are_remembered(checker: GrammarChecker) -> None:
    good, bad = structured({"regex": "remembered"}), structured(BOMBS["doubling"])
    checker.check(good)
    with pytest.raises(RequestError):
        checker.check(bad)
    began = time.monotonic()
    for _ in range(200):
        checker.check(good)
        with pytest.raises(RequestError):
            checker.check(bad)
    assert time.monotonic() - began < 1


def test_a_tokenizer_that_cannot_be_used_is_the_operators_error(tmp_path: Path) -> None:
    source = json.loads((DEMO / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(source | {"decoder": None}))
    checker = GrammarChecker(tmp_path / "tokenizer.json", 1024, [763])
    with pytest.raises(ConfigError, match="decoder"):
        checker.check(structured({"regex": "a"}))
    checker.close()


def test_the_front_end_does_not_load_llguidance() -> None:
    code = "import sys, nanodeploy.serve.grammar_check, nanodeploy.serve.grammar; print('llguidance' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.strip() == "False"
