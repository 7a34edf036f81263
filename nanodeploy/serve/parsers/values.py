"""Arguments that come as text between tags, as JSON: the tool's schema says which of them are strings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from nanodeploy.serve.parsers.reader import Markers, Reader, Sink, Steps

Kinds = frozenset[str]  # JSON Schema's names of types; empty: anything
STRING: Kinds = frozenset({"string"})
ANYTHING: Kinds = frozenset()
MAX_DEPTH = 8  # of references and alternatives that are followed to find a type
# As Python prints them, and Jinja templates with it: models learn both.
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class Tools:
    """The tools of one request: name -> JSON Schema of the arguments."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()):
        self.parameters: dict[str, Mapping[str, Any]] = {}
        self.strict: set[str] = set()
        for tool in tools:
            function = tool.get("function")
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                schema = function.get("parameters")
                self.parameters[function["name"]] = schema if isinstance(schema, Mapping) else {}
                if function.get("strict"):
                    self.strict.add(function["name"])

    def kinds(self, tool: str, parameter: str) -> Kinds:
        """What types the schema allows a parameter; ANYTHING if it does not say."""
        root = self.parameters.get(tool, {})
        properties = root.get("properties")
        return kinds(properties.get(parameter), root) if isinstance(properties, Mapping) else ANYTHING


def kinds(schema: Any, root: Mapping[str, Any], depth: int = 0) -> Kinds:
    """The types that a schema allows; `root` is where its references begin."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return ANYTHING
    said = schema.get("type")
    if isinstance(said, str):
        return frozenset({said})
    if isinstance(said, list):
        return frozenset(filter(lambda kind: isinstance(kind, str), said))
    if "const" in schema:
        return frozenset({_kind(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(map(_kind, schema["enum"]))
    for word in ("anyOf", "oneOf"):
        if isinstance(schema.get(word), list):
            each = [kinds(option, root, depth + 1) for option in schema[word]]
            return frozenset().union(*each) if all(each) else ANYTHING
    return ANYTHING


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """The schema that references lead to; None if they lead nowhere."""
    for _ in range(MAX_DEPTH):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        path = schema["$ref"].removeprefix("#").strip("/").split("/")
        schema = root
        for part in path:
            schema = schema.get(part) if isinstance(schema, Mapping) else None
    return None


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names[type(value)]


def to_json(text: str, allowed: Kinds, quoted: bool = False) -> str:
    """One value as JSON text: a string, unless it is JSON of an allowed type. `quoted`: JSON strings count, too."""
    word = text.strip()
    word = PYTHON_WORDS.get(word, word)
    if allowed != STRING or quoted:
        try:
            kind = _kind(msgspec.json.decode(word))
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            pass
        else:
            fits = not allowed or kind in allowed or (kind == "integer" and "number" in allowed)
            if fits and (quoted or kind != "string"):
                return word
    return json.dumps(text, ensure_ascii=False)


class ObjectWriter:
    """Writes a JSON object as its members become known; what went to the sink adds up to valid JSON at close()."""

    def __init__(self, sink: Sink):
        self._sink = sink
        self._empty = True

    def member(self, read: Reader, key: str, allowed: Kinds, end: Markers, quoted: bool = False) -> Steps[str | None]:
        """Read a value up to the marker that ends it, which is returned. A string goes out as it comes in."""
        self._sink(("{" if self._empty else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._empty = False
        if allowed == STRING and not quoted:
            self._sink('"')
            marker = yield from read.until(end, lambda text: self._sink(json.dumps(text, ensure_ascii=False)[1:-1]))
            if marker is not None:
                self._sink('"')
        else:
            pieces: list[str] = []
            marker = yield from read.until(end, pieces.append)
            if marker is not None:
                self._sink(to_json("".join(pieces), allowed, quoted))
        return marker

    def close(self) -> None:
        self._sink("{}" if self._empty else "}")
