"""DeepSeek V3.2 and V4, in their markup language:

<｜DSML｜function_calls>
<｜DSML｜invoke name="f">
<｜DSML｜parameter name="p" string="true">value</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜function_calls>

V4 calls the block tool_calls. string="false" is JSON. V3.2 at times writes one JSON object instead of parameters.
"""

import re
from collections.abc import Mapping
from typing import Any

from nanodeploy.serve.parsers import json_text
from nanodeploy.serve.parsers.parser import ToolFormat
from nanodeploy.serve.parsers.reader import Markers, Steps
from nanodeploy.serve.parsers.tool_grammar import End, ToolGrammar
from nanodeploy.serve.parsers.values import STRING, ObjectWriter

DSML = "｜DSML｜"
INVOKE, INVOKE_END = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAMETER, PARAMETER_END = f"<{DSML}parameter", f"</{DSML}parameter>"
ATTRIBUTES = re.compile(r"[^<>]*")
NAME = re.compile(r'\bname="([^"]*)"')
IS_STRING = re.compile(r'\bstring="true"')
TAGS = Markers(PARAMETER, INVOKE_END)
AFTER_VALUE = Markers(PARAMETER_END)


class DeepseekV32(ToolFormat):
    block_name = "function_calls"
    openers: tuple[str, ...] = (f"<{DSML}function_calls>", INVOKE)
    tokens = (DSML,)

    def block(self, opener: str) -> Steps[None]:
        read = self.read
        if opener != INVOKE:
            yield from read.space()
            if not (yield from read.literal(INVOKE)):
                return
        while True:
            name = NAME.search((yield from read.text(ATTRIBUTES)))
            if name is None or not name[1] or not (yield from read.literal(">")):
                return
            self.start(name[1])
            if not (yield from self._arguments(name[1])):
                return
            yield from read.space()
            read.keep()
            if not (yield from read.literal(INVOKE)):
                break
        if (yield from read.literal(f"</{DSML}{self.block_name}>")):
            read.commit()

    def _arguments(self, name: str) -> Steps[bool]:
        """Whether the call was closed."""
        read = self.read
        yield from read.space()
        if (yield from read.peek()) == "{":
            yield from json_text.arguments(read, self.calls.arguments, INVOKE_END)
            yield from read.space()
            return (yield from read.literal(INVOKE_END))
        arguments = ObjectWriter(self.calls.arguments)
        while (tag := (yield from read.until(TAGS, lambda _: None))) == PARAMETER:
            attributes = yield from read.text(ATTRIBUTES)
            yield from read.literal(">")
            key = NAME.search(attributes)
            is_string = IS_STRING.search(attributes) is not None
            kinds = STRING if is_string else self.tools.kinds(name, key[1] if key else "")
            yield from arguments.member(read, key[1] if key else "", kinds, AFTER_VALUE, quoted=not is_string)
        if tag is not None:
            arguments.close()
        return tag is not None

    @classmethod
    def grammar(cls, g: ToolGrammar) -> str:
        def member(name: str, key: str | None, schema: Mapping[str, Any]) -> str:
            written = g.values(name, schema, End("", PARAMETER_END, "\n"))
            others = written.words + written.nested
            values = [g.sequence(g.literal('true">'), g.one_of(written.strings))] if written.strings else []
            values += [g.sequence(g.literal('false">'), g.one_of(others))] if others else []
            key_text = '/[^"<>\\n]+/' if key is None else g.literal(key)
            return g.sequence(g.literal(PARAMETER + ' name="'), key_text, g.literal('" string="'), g.one_of(values))

        def call(name: str) -> str:
            head = g.literal(f'{INVOKE} name="{name}">\n')
            return g.sequence(head, g.members(name, member), g.literal(INVOKE_END + "\n"))

        block_end = g.literal(f"</{DSML}{cls.block_name}>")
        return g.sequence(g.literal("\n"), g.several(g.each(call)), block_end)


class DeepseekV4(DeepseekV32):
    block_name = "tool_calls"
    openers = (f"<{DSML}tool_calls>", INVOKE)
