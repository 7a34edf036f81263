"""GLM-4.5 to GLM-5: <tool_call>f<arg_key>p</arg_key><arg_value>value</arg_value></tool_call>; 4.5 adds line breaks.

Values are typed by the tool's schema; strings stand as they are, all else is JSON.
"""

import re
from collections.abc import Mapping
from typing import Any

from nanodeploy.serve.parsers.parser import ToolFormat
from nanodeploy.serve.parsers.reader import Markers, Steps
from nanodeploy.serve.parsers.tool_grammar import End, ToolGrammar
from nanodeploy.serve.parsers.values import ObjectWriter

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"
NAME = re.compile(r"[^\s<>{}]*")
TAGS = Markers(KEY, CLOSE)
AFTER_KEY = Markers(KEY_END)
AFTER_VALUE = Markers(VALUE_END)


class Glm(ToolFormat):
    openers = (OPEN,)
    tokens = (OPEN, CLOSE, KEY, KEY_END, VALUE, VALUE_END)

    def block(self, opener: str) -> Steps[None]:
        read = self.read
        yield from read.space()
        name = yield from read.text(NAME)
        yield from read.space()
        if not name or not ((yield from read.at(KEY)) or (yield from read.at(CLOSE))):
            return
        self.start(name)
        arguments = ObjectWriter(self.calls.arguments)
        while (tag := (yield from read.until(TAGS, lambda _: None))) == KEY:
            pieces: list[str] = []
            yield from read.until(AFTER_KEY, pieces.append)
            key = "".join(pieces).strip()
            yield from read.space()
            yield from read.literal(VALUE)
            yield from arguments.member(read, key, self.tools.kinds(name, key), AFTER_VALUE)
        if tag == CLOSE:
            arguments.close()

    @classmethod
    def grammar(cls, g: ToolGrammar) -> str:
        def member(name: str, key: str | None, schema: Mapping[str, Any]) -> str:
            value = g.value(name, schema, End("", VALUE_END, ""))
            key_text = "/[^<>\\n]+/" if key is None else g.literal(key)
            return g.sequence(g.literal(KEY), key_text, g.literal(KEY_END + VALUE), value)

        def call(name: str) -> str:
            return g.sequence(g.literal(name), g.members(name, member), g.literal(CLOSE))

        return g.several(g.each(call), between=g.literal(OPEN))
