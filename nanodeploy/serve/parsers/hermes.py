"""Qwen3, Qwen3-VL, Hermes: <tool_call>\\n{"name": "f", "arguments": {..}}\\n</tool_call>, one block a call."""

import json
import re

from nanodeploy.serve.parsers import json_text
from nanodeploy.serve.parsers.parser import ToolFormat
from nanodeploy.serve.parsers.reader import Steps
from nanodeploy.serve.parsers.tool_grammar import ToolGrammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
TRAIL = re.compile(r"[\s}]*")  # some models close one brace too many


class Hermes(ToolFormat):
    openers = (OPEN,)
    tokens = (OPEN, CLOSE)

    def block(self, opener: str) -> Steps[None]:
        """An object with a name and, usually behind it, arguments."""
        read = self.read
        yield from read.space()
        if not (yield from read.literal("{")):
            return
        name: str | None = None
        early: list[str] = []  # arguments that came before the name
        started = False
        while True:
            yield from read.space()
            key = yield from json_text.string(read)
            yield from read.space()
            if key is None or not (yield from read.literal(":")):
                break
            yield from read.space()
            if key == "name" and not started:
                name = yield from json_text.string(read)
                if not name:
                    break
            elif key in ("arguments", "parameters") and not started:
                if name is not None:
                    self.start(name)
                    started = True
                yield from json_text.arguments(read, self.calls.arguments if started else early.append, CLOSE)
            else:
                yield from json_text.value(read, lambda _: None, CLOSE)
            yield from read.space()
            if not (yield from read.literal(",")):
                break
        whole = yield from read.literal("}")
        if not started:
            if not name or not whole:
                return
            self.start(name)
            self.calls.arguments("".join(early) or "{}")
        yield from read.text(TRAIL)
        yield from read.literal(CLOSE)

    @classmethod
    def grammar(cls, g: ToolGrammar) -> str:
        def call(name: str) -> str:
            head = f'\n{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": '
            return g.sequence(g.literal(head), g.json(name), g.literal("}\n" + CLOSE))

        return g.several(g.each(call), between=g.literal("\n" + OPEN))
