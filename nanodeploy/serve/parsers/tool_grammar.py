"""The parts that grammars of tool calls are made of; each format puts them together as it writes calls."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from nanodeploy.errors import RequestError
from nanodeploy.serve.lark import Lark
from nanodeploy.serve.parsers.values import MAX_DEPTH, STRING, Tools, kinds, resolved

NO_MEMBERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
DEFINITIONS = ("$defs", "definitions")
# What a string between tags cannot be held to: the tag ends it, not a pattern.
STRING_LIMITS = ("pattern", "format", "minLength", "maxLength")
WORDS = {"boolean": ("true", "false"), "null": ("null",)}
Member = Callable[[str, str | None, Mapping[str, Any]], str]


class End(NamedTuple):
    """What stands behind a value between tags."""

    line: str  # a line break that belongs to the tag, where the model writes one
    tag: str
    after: str


class Values(NamedTuple):
    """Ways to write a value between tags, the end behind each: strings as they stand, JSON's words, other JSON."""

    strings: list[str]
    words: list[str]
    nested: list[str]


class ToolGrammar:
    """One request's tools, those in `names` to be called. Expressions are Lark; see serve/lark.py."""

    def __init__(self, lark: Lark, tools: Tools, names: Sequence[str], parallel: bool):
        self._lark = lark
        self._tools = tools
        self._names = names
        self._parallel = parallel
        self.literal = lark.literal

    def sequence(self, *parts: str) -> str:
        return " ".join(filter(None, parts))

    def one_of(self, options: list[str]) -> str:
        return self._lark.rule(" | ".join(options))

    def each(self, call: Callable[[str], str]) -> str:
        """A call of any of the tools."""
        return self.one_of([call(name) for name in self._names])

    def several(self, call: str, between: str = "") -> str:
        """One call, or with parallel calls at least one."""
        return f"{call} ({self.sequence(between, call)})*" if self._parallel else call

    def json(self, name: str) -> str:
        """The arguments as one JSON object."""
        schema = self._tools.parameters[name] or NO_MEMBERS
        return self._lark.json({"type": "object", **schema}, lenient=name not in self._tools.strict)

    def members(self, name: str, member: Member) -> str:
        """The arguments one by one, in the schema's order: what is required stands there, all else may.

        `member(name, key, schema)` writes one; a key of None is any, for a schema that lists none.
        """
        schema = self._tools.parameters[name] or NO_MEMBERS
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            return f"({member(name, None, {})})*" if schema.get("additionalProperties") is not False else ""
        shared = {word: schema[word] for word in DEFINITIONS if word in schema}  # what references name
        required = schema.get("required")
        each = []
        for key, value in properties.items():
            text = member(name, key, {**shared, **value} if isinstance(value, Mapping) else shared)
            each.append(text if isinstance(required, list) and key in required else f"({text})?")
        return " ".join(each)

    def value(self, name: str, schema: Mapping[str, Any], end: End) -> str:
        """A value between tags that do not say whether it is a string, with its end."""
        written = self.values(name, schema, end)
        if written.strings and written.nested:  # the lexer cannot wait to see which it becomes: any text
            text = self._text(end)
            if text not in written.strings and name in self._tools.strict:
                message = f"tools: {name} is strict, and this model's calls cannot mix listed strings with other types."
                raise RequestError(message, param="tools")
            return text
        return self.one_of(written.strings + written.words + written.nested)

    def _text(self, end: End) -> str:
        return self.sequence(self._lark.upto(end.tag), self.literal(end.after))

    def values(self, name: str, schema: Mapping[str, Any], end: End, depth: int = 0) -> Values:
        """How a value between tags may be written."""
        closing = "".join(end)
        shared = {word: schema[word] for word in DEFINITIONS if word in schema}
        schema = {**shared, **(resolved(schema, schema) or {})}
        listed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(listed, list):
            words = [json.dumps(value, ensure_ascii=False) for value in listed if not isinstance(value, str)]
            strings = [value for value in listed if isinstance(value, str)]
            return Values([self.literal(s + closing) for s in strings], [self.literal(w + closing) for w in words], [])
        for word in ("anyOf", "oneOf"):
            if isinstance(schema.get(word), list) and depth < MAX_DEPTH:
                options = [option for option in schema[word] if isinstance(option, Mapping)]
                each = [self.values(name, {**shared, **option}, end, depth + 1) for option in options]
                return Values(*([text for written in each for text in written[i]] for i in range(3)))
        allowed = kinds(schema, schema)
        strings = []
        if not allowed or "string" in allowed:
            if name in self._tools.strict and any(word in schema for word in STRING_LIMITS):
                message = f"tools: {name} is strict, and strings in this model's calls cannot be held to"
                raise RequestError(f"{message} {', '.join(STRING_LIMITS)}.", param="tools")
            strings.append(self._text(end))
        words = [self.literal(word + closing) for kind in sorted(allowed) for word in WORDS.get(kind, ())]
        others = sorted(allowed - STRING - WORDS.keys())
        if allowed and not others:
            return Values(strings, words, [])
        plain = {**schema, "type": others} if others else schema
        text = self._lark.json(plain, lenient=name not in self._tools.strict)
        return Values(strings, words, [self.sequence(text, self.literal(closing))])
