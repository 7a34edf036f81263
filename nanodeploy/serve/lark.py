"""Grammars as text, in llguidance's dialect of Lark. Nothing is compiled here, so the front end needs no llguidance."""

import json
import re
from collections.abc import Mapping
from typing import Any

# White space between JSON's tokens: a space, or a line break with its indentation. Where all is allowed that JSON
# allows, a model that is held to a form it would not have chosen fills its answer with blanks.
JSON_SPACE = r"\x20|\x0A[\x20\x09]{0,32}"
PRELUDE = ("TEXT: /(.|\\n)*/", "SPACE: /[ \\n]{1,4}/")


def special_tokens(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """tokenizer.json's tokens that no text can spell for llguidance: the special ones, and any added <...>."""
    return {
        token["content"]: token["id"]
        for token in tokenizer.get("added_tokens") or ()
        if token.get("special") or (token["content"].startswith("<") and token["content"].endswith(">"))
    }


def quoted(text: str) -> str:
    """A literal. It is matched as text: no special token inside."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class Lark:
    """Rules, as they are added; expressions are text. Literal markers become the tokens they are."""

    def __init__(self, special: Mapping[str, int]):
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if special else "(?!)")
        self._lines: dict[str, str] = {}  # right side -> name

    def literal(self, text: str) -> str:
        """A text that the format prescribes, its special tokens as tokens."""
        parts = [part for part in self._split.split(text) if part]
        return " ".join(f"<[{self._special[p]}]>" if p in self._special else quoted(p) for p in parts)

    def upto(self, end: str) -> str:
        """Any text, up to the first place where `end` stands, which is included."""
        found = self._split.search(end)
        if found is None:
            return self._add("rule", f"TEXT {quoted(end)}", "[lazy]")
        text = self._add("TERMINAL", f"TEXT {quoted(end[: found.start()])}") if found.start() else "TEXT"
        return f"{text} {self.literal(end[found.start() :])}"

    def rule(self, body: str) -> str:
        return self._add("rule", body)

    def one_of(self, options: list[str]) -> str:
        return self.rule(" | ".join(options))

    def json(self, schema: Mapping[str, Any], lenient: bool) -> str:
        """A JSON value. `lenient` ignores what llguidance has not implemented, instead of refusing the schema."""
        options = {"whitespace_pattern": JSON_SPACE, "lenient": lenient}
        return self.rule("%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False))

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *PRELUDE, *(f"{name}: {body}" for body, name in self._lines.items())])

    def _add(self, kind: str, body: str, options: str = "") -> str:
        prefix = "T" if kind == "TERMINAL" else "r"
        name = self._lines.setdefault(body, f"{prefix}{len(self._lines)}{options}")
        return name.removesuffix(options)
