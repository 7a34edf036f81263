"""From a request to the grammar its answer must follow: response_format, structured outputs, and tool calls.

Text in, text out: a grammar in llguidance's Lark (serve/lark.py). Whether it compiles, and fast enough, another process
finds out (serve/grammar_check.py) before the engine sees it.

An answer may begin with reasoning, which is free. Then comes the form that was asked for; or with tools: calls only
(tool_choice required or a name), or free text that a well-formed call may end (auto, when a tool is strict).
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from nanodeploy.errors import RequestError
from nanodeploy.serve.lark import Lark, quoted
from nanodeploy.serve.parsers.parser import THINK, THINK_END, Thinking, ToolFormat
from nanodeploy.serve.parsers.tool_grammar import ToolGrammar
from nanodeploy.serve.parsers.values import Tools

MAX_CHARS = 256 << 10  # of a whole grammar
MAX_DEPTH = 64  # of a schema, and of brackets in a regex
MAX_CHOICES = 4096
ANY_OBJECT = {"type": "object"}
USER_GRAMMAR = "user"
STRUCTURED = ("json", "regex", "choice", "grammar", "json_object")


class Thinks(Enum):
    """Whether reasoning stands before the answer."""

    NEVER = "never"
    MAYBE = "maybe"  # if the model opens it
    ALREADY = "already"  # the prompt opened it


def thinks_of(thinking: Thinking | None, prompt: str) -> Thinks:
    """What a rendered prompt leaves to a model that reasons in this way (parsers.REASONING_PARSERS)."""
    end = prompt[-64:].rstrip()
    if thinking is None or end.endswith(THINK_END):
        return Thinks.NEVER
    return Thinks.ALREADY if thinking.always or end.endswith(THINK) else Thinks.MAYBE


@dataclass(frozen=True)
class GrammarText:
    """A grammar that was not compiled yet."""

    text: str  # Lark; @user is what the user wrote
    user: str | None  # a grammar of the user's own: Lark, or EBNF as llama.cpp has it
    param: str  # of the request, to name it in an error


def grammar_of(
    special: Mapping[str, int],
    thinks: Thinks = Thinks.NEVER,
    *,
    response_format: Mapping[str, Any] | None = None,
    structured: Mapping[str, Any] | None = None,
    tool_format: type[ToolFormat] | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel: bool = True,
) -> GrammarText | None:
    """The grammar of an answer; None if it is free. Raises RequestError with `param`.

    `special` is lark.special_tokens(), `structured` has one of json, regex, choice, grammar, json_object: true.
    """
    lark = Lark(special)
    form, user, param = _form(lark, response_format, structured)
    names = _called(tool_format, tools, tool_choice)
    known = Tools(tools or ())
    free_calls = tool_choice in (None, "auto") and bool(known.strict) and tool_format is not None
    if names or free_calls:
        assert tool_format is not None
        for schema in known.parameters.values():
            _schema(schema, "tools")
        one_only = isinstance(tool_choice, Mapping)
        parts = ToolGrammar(lark, known, names or list(known.parameters), parallel and not one_only)
        calls = tool_format.grammar(parts)
        opener = tool_format.openers[0]
        if names:
            body, param = f"(SPACE)? {lark.literal(opener)} {calls}", "tool_choice"
        elif form is None:
            body, param = f"TEXT | {lark.upto(opener)} {calls}", "tools"
        else:
            body = f"{form} | (SPACE)? {lark.literal(opener)} {calls}"
    elif form is None:
        return None
    else:
        body = form
    text = lark.text(_behind_reasoning(lark, thinks, lark.rule(body)))
    if len(text) + len(user or "") > MAX_CHARS:
        raise RequestError(f"{param}: the grammar has over {MAX_CHARS} characters.", param=param)
    try:
        (text + (user or "")).encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{param}: half a surrogate pair is not text.", param=param) from error
    return GrammarText(text, user, param)


def _form(
    lark: Lark, response_format: Mapping[str, Any] | None, structured: Mapping[str, Any] | None
) -> tuple[str | None, str | None, str]:
    """What the answer must look like as an expression, the user's own grammar, and the parameter that said so."""
    kind = (response_format or {}).get("type", "text")
    given = {key: value for key, value in (structured or {}).items() if value is not None and value is not False}
    if kind != "text" and given:
        raise RequestError("response_format and structured_outputs exclude each other.", param="structured_outputs")
    if kind == "json_object":
        return lark.json(ANY_OBJECT, lenient=False), None, "response_format"
    if kind == "json_schema":
        param = "response_format.json_schema"
        described = (response_format or {}).get("json_schema")
        schema = described.get("schema") if isinstance(described, Mapping) else None
        strict = isinstance(described, Mapping) and described.get("strict") is True
        return lark.json(_schema(schema, param + ".schema"), lenient=not strict), None, param
    if kind != "text":
        message = f"response_format.type is {str(kind)[:40]!r}; wanted text, json_object or json_schema."
        raise RequestError(message, param="response_format")
    if not given:
        return None, None, ""
    if len(given) != 1 or not given.keys() <= set(STRUCTURED):
        message = f"structured_outputs has {', '.join(map(str, given))[:80]}; wanted one of {', '.join(STRUCTURED)}."
        raise RequestError(message, param="structured_outputs")
    (what, value), param = next(iter(given.items())), f"structured_outputs.{next(iter(given))}"
    if what == "json_object":
        return lark.json(ANY_OBJECT, lenient=False), None, param
    if what == "json":
        return lark.json(_schema(value, param), lenient=False), None, param
    if what == "regex":
        return _regex(value, param), None, param
    if what == "choice":
        return _choice(value, param), None, param
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{param}: wanted a grammar, as text.", param=param)
    return "@" + USER_GRAMMAR, value, param


def _called(
    tool_format: type[ToolFormat] | None,
    tools: Sequence[Mapping[str, Any]] | None,
    choice: str | Mapping[str, Any] | None,
) -> list[str]:
    """The tools of which one must be called; none if that is left to the model."""
    if choice in (None, "auto", "none"):
        return []
    there = list(Tools(tools or ()).parameters)
    if choice == "required":
        names = there
    elif isinstance(choice, Mapping):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if choice.get("type") != "function" or name not in there:
            message = f"tool_choice names {str(name)[:80]!r}; the tools are: {', '.join(there)[:400] or 'none'}."
            raise RequestError(message, param="tool_choice")
        names = [str(name)]
    else:
        message = "tool_choice: wanted none, auto, required, or an object that names a function."
        raise RequestError(message, param="tool_choice")
    if not names:
        raise RequestError("tool_choice is required, but there are no tools.", param="tool_choice")
    if tool_format is None:
        raise RequestError("This model's tool calls cannot be enforced: no --tool-call-parser.", param="tool_choice")
    return names


def _behind_reasoning(lark: Lark, thinks: Thinks, body: str) -> str:
    if thinks is Thinks.NEVER:
        return body
    reasoning = f"{lark.upto(THINK_END)} (SPACE)?"
    if thinks is Thinks.ALREADY:  # R1 may still write the tag that its prompt should have
        return f"({lark.literal(THINK)})? {reasoning} {body}"
    return f"({lark.literal(THINK)} {reasoning})? {body}"


def _schema(schema: Any, param: str) -> Mapping[str, Any]:
    """A JSON Schema, checked for what costs nothing to check."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param} is not JSON: {str(error)[:200]}.", param=param) from error
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{param}: wanted a JSON Schema, as an object.", param=param)
    level: list[Any] = [schema]
    for _ in range(MAX_DEPTH):
        level = [item for node in level for item in _items(node)]
    if level:
        raise RequestError(f"{param} is nested over {MAX_DEPTH} deep.", param=param)
    return schema


def _items(node: Any) -> list[Any]:
    return list(node.values()) if isinstance(node, Mapping) else node if isinstance(node, list) else []


def _regex(pattern: Any, param: str) -> str:
    if not isinstance(pattern, str) or not pattern:
        raise RequestError(f"{param}: wanted a regular expression.", param=param)
    depth = deepest = 0
    for char in re.sub(r"\\.", "", pattern, flags=re.DOTALL):
        depth += (char in "([") - (char in ")]")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        raise RequestError(f"{param} is nested over {MAX_DEPTH} deep.", param=param)
    escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    if re.sub(r"\\.", "", pattern, flags=re.DOTALL).endswith("\\"):
        raise RequestError(f"{param} ends in a backslash that escapes nothing.", param=param)
    return f"/{escaped}/"


def _choice(options: Any, param: str) -> str:
    texts = [option for option in options if isinstance(option, str)] if isinstance(options, list) else []
    if not texts or len(texts) != len(options) or len(texts) > MAX_CHOICES or "" in texts:
        raise RequestError(f"{param}: wanted 1 to {MAX_CHOICES} strings, none of them empty.", param=param)
    return "(" + " | ".join(map(quoted, dict.fromkeys(texts))) + ")"
