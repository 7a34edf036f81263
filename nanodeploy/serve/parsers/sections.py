"""Calls as JSON between special tokens, in one section: DeepSeek V3, V3.1 and Kimi-K2.

V3:   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\\n```json\\n{..}\\n```<｜tool▁call▁end｜>
      <｜tool▁calls▁end｜>
V3.1: the same tokens, with f<｜tool▁sep｜>{..} for a call.
K2:   <|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{..}<|tool_call_end|>
      <|tool_calls_section_end|>; its functions.f:0 is the call's id, and comes back with the result.
"""

import re
from typing import ClassVar

from nanodeploy.serve.parsers import json_text
from nanodeploy.serve.parsers.parser import ToolFormat
from nanodeploy.serve.parsers.reader import Steps
from nanodeploy.serve.parsers.tool_grammar import ToolGrammar

NAME = re.compile(r"[^\s<]*")
TO_MARKER = re.compile(r"[^<{}]*")


class Sections(ToolFormat):
    begin: ClassVar[str]
    call: ClassVar[str]
    separator: ClassVar[str]
    call_end: ClassVar[str]
    end: ClassVar[str]
    between: ClassVar[str] = ""  # calls

    def block(self, opener: str) -> Steps[None]:
        read = self.read
        if opener == self.begin:
            yield from read.space()
            if not (yield from read.literal(self.call)):
                return
        while (yield from self.header()):
            yield from json_text.arguments(read, self.calls.arguments, self.call_end)
            yield from read.space()
            if (yield from read.literal("```")):
                yield from read.space()
            yield from read.literal(self.call_end)
            yield from read.space()
            read.keep()
            if not (yield from read.literal(self.call)):
                if (yield from read.literal(self.end)):
                    read.commit()
                return

    def header(self) -> Steps[bool]:
        """Read a call up to its arguments, and start it. False: this is no call."""
        raise NotImplementedError

    @classmethod
    def written(cls, g: ToolGrammar, name: str) -> str:
        """One call as a grammar, between its begin and end tokens."""
        return g.sequence(g.literal(name + cls.separator), g.json(name))

    @classmethod
    def grammar(cls, g: ToolGrammar) -> str:
        one = g.each(lambda name: g.sequence(g.literal(cls.call), cls.written(g, name), g.literal(cls.call_end)))
        return g.sequence(g.several(one, between=g.literal(cls.between)), g.literal(cls.end))


class DeepseekV31(Sections):
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    separator = "<｜tool▁sep｜>"
    openers = (begin, call)
    tokens = (begin, end, call, call_end, separator)

    def header(self) -> Steps[bool]:
        name = (yield from self.read.text(TO_MARKER)).strip()
        if not name or not (yield from self.read.literal(self.separator)):
            return False
        self.start(name)
        return True


class DeepseekV3(DeepseekV31):
    between = "\n"

    def header(self) -> Steps[bool]:
        read = self.read
        if not (yield from read.literal("function" + self.separator)):
            return False
        name = yield from read.text(NAME)
        yield from read.space()
        if not name or not (yield from read.literal("```json")):
            return False
        self.start(name)
        return True

    @classmethod
    def written(cls, g: ToolGrammar, name: str) -> str:
        return g.sequence(g.literal(f"function{cls.separator}{name}\n```json\n"), g.json(name), g.literal("\n```"))


class KimiK2(Sections):
    begin, end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    call, call_end = "<|tool_call_begin|>", "<|tool_call_end|>"
    separator = "<|tool_call_argument_begin|>"
    openers = (begin, call)
    tokens = (begin, end, call, call_end, separator)

    def header(self) -> Steps[bool]:
        id = (yield from self.read.text(TO_MARKER)).strip()
        name = id.removeprefix("functions.").rpartition(":")[0] or id.removeprefix("functions.")
        if not name or not (yield from self.read.literal(self.separator)):
            return False
        self.start(name, id)
        return True

    @classmethod
    def written(cls, g: ToolGrammar, name: str) -> str:
        return g.sequence(g.literal(f"functions.{name}:"), "/[0-9]{1,4}/", g.literal(cls.separator), g.json(name))
