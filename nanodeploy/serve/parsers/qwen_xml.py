"""Qwen3.5, Qwen3-Coder: <tool_call>\\n<function=f>\\n<parameter=p>\\nvalue\\n</parameter>\\n</function>\\n</tool_call>.

Values are typed by the tool's schema. Qwen3-Coder sometimes leaves out <tool_call>.
"""

import re
from collections.abc import Mapping
from typing import Any

from nanodeploy.serve.parsers.parser import ToolFormat
from nanodeploy.serve.parsers.reader import Markers, Steps
from nanodeploy.serve.parsers.tool_grammar import End, ToolGrammar
from nanodeploy.serve.parsers.values import ObjectWriter

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
NAME = re.compile(r"[^\s<>]*")
KEY = re.compile(r"[^<>\n]*")
TAGS = Markers(PARAMETER, FUNCTION_END, CLOSE)
VALUE_END = Markers("\n" + PARAMETER_END, PARAMETER_END)  # the line break belongs to the tag


class QwenXml(ToolFormat):
    openers = (OPEN, FUNCTION)
    tokens = (OPEN, CLOSE)

    def block(self, opener: str) -> Steps[None]:
        read = self.read
        if opener == OPEN:
            yield from read.space()
            if not (yield from read.literal(FUNCTION)):
                return
        name = yield from read.text(NAME)
        if not name or not (yield from read.literal(">")):
            return
        self.start(name)
        arguments = ObjectWriter(self.calls.arguments)
        while (tag := (yield from read.until(TAGS, lambda _: None))) == PARAMETER:
            key = (yield from read.text(KEY)).strip()
            yield from read.literal(">")
            yield from read.literal("\n")
            yield from arguments.member(read, key, self.tools.kinds(name, key), VALUE_END)
        if tag is None:  # cut off
            return
        arguments.close()
        if tag == FUNCTION_END:
            yield from read.space()
            yield from read.literal(CLOSE)

    @classmethod
    def grammar(cls, g: ToolGrammar) -> str:
        def member(name: str, key: str | None, schema: Mapping[str, Any]) -> str:
            value = g.value(name, schema, End("\n", PARAMETER_END, "\n"))
            key_text = "/[^<>\\n]+/" if key is None else g.literal(key)
            return g.sequence(g.literal(PARAMETER), key_text, g.literal(">\n"), value)

        def call(name: str) -> str:
            head, tail = f"\n{FUNCTION}{name}>\n", f"{FUNCTION_END}\n{CLOSE}"
            return g.sequence(g.literal(head), g.members(name, member), g.literal(tail))

        return g.several(g.each(call), between=g.literal("\n" + OPEN))
