"""One answer of a model, read as it streams: reasoning, content and tool calls told apart.

The same events, joined, come out however the text was cut. Text that only looks like a marker or a call is content.
Once a call's name is known it is a call: arguments that are not JSON go out as they were written, and the client, which
decodes them, sees what the model said. White space between content and a marker is dropped, as chat templates write it
anew.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from nanodeploy.serve.parsers.events import Content, Event, Reasoning, ToolArguments, ToolStart, joined
from nanodeploy.serve.parsers.reader import Markers, Reader, Sink, Steps
from nanodeploy.serve.parsers.tool_grammar import ToolGrammar
from nanodeploy.serve.parsers.values import Tools

THINK, THINK_END = "<think>", "</think>"


class Calls:
    """The tool calls of one answer on their way out. Of calls in parallel that are not wanted the first is kept."""

    def __init__(self, emit: Callable[[Event], None], parallel: bool, new_id: Callable[[], str]):
        self._emit = emit
        self._parallel = parallel
        self._new_id = new_id
        self.count = 0

    def start(self, name: str, id: str | None = None) -> None:
        self.count += 1
        if self._shown:
            self._emit(ToolStart(self.count - 1, self._new_id() if id is None else id, name))

    def arguments(self, delta: str) -> None:
        if self._shown and delta:
            self._emit(ToolArguments(self.count - 1, delta))

    @property
    def _shown(self) -> bool:
        return self._parallel or self.count == 1


class ToolFormat:
    """How one family of models writes tool calls."""

    openers: tuple[str, ...] = ()  # each may begin a block of calls
    tokens: tuple[str, ...] = ()  # its markers that are tokens of their own; a detokenizer must not skip them

    def __init__(self, read: Reader, calls: Calls, tools: Tools):
        self.read = read
        self.calls = calls
        self.tools = tools

    def block(self, opener: str) -> Steps[None]:
        """Read a block behind its opener. What is kept by the reader at the end was no call, and goes out as text."""
        raise NotImplementedError

    @classmethod
    def grammar(cls, g: ToolGrammar) -> str:
        """What must follow the first opener: a call, or several. Raises RequestError on what it cannot enforce."""
        raise NotImplementedError

    def start(self, name: str, id: str | None = None) -> None:
        """A call is certain: tell its name."""
        self.read.commit()
        self.calls.start(name, id)


@dataclass(frozen=True)
class Thinking:
    """How a family of models writes its reasoning."""

    always: bool = False  # the answer begins with it, whatever the prompt ends with


class Parser:
    """Feeds on the text of one answer."""

    def __init__(
        self,
        tool_format: type[ToolFormat] | None,
        thinking: Thinking | None,
        tools: Tools | None = None,
        *,
        prompt_opens_thinking: bool = False,
        parallel: bool = True,
        new_id: Callable[[], str] = lambda: "call_" + secrets.token_hex(12),
    ):
        """`prompt_opens_thinking`: the prompt ends with <think>. `parallel` false keeps the first call only."""
        self._read = Reader()
        self._events: list[Event] = []
        self._calls = Calls(self._events.append, parallel, new_id)
        self._format = tool_format(self._read, self._calls, tools or Tools()) if tool_format else None
        openers = tool_format.openers if tool_format else ()
        self._openers = Markers(*openers)
        self._think_ends = Markers(THINK_END, *openers)
        self._content = _Channel(lambda text: self._events.append(Content(text)), trims=bool(openers))
        self._reasoning = _Channel(lambda text: self._events.append(Reasoning(text)), trims=True)
        self._opened = prompt_opens_thinking
        self._steps = self._run(thinking)
        next(self._steps)

    @property
    def num_calls(self) -> int:
        """Tool calls so far, those that were not wanted included."""
        return self._calls.count

    def feed(self, text: str) -> list[Event]:
        """What more text makes certain."""
        if text:
            self._read.add(text)
            next(self._steps)
        return self._take()

    def finish(self) -> list[Event]:
        """What was held back, once no more text will come. A call that was cut off stays unfinished JSON."""
        self._read.ended = True
        next(self._steps, None)
        self._reasoning.flush()
        self._content.flush()
        return self._take()

    def _take(self) -> list[Event]:
        events = joined(self._events)
        self._events.clear()
        return events

    def _run(self, thinking: Thinking | None) -> Steps[None]:
        if thinking is not None:
            yield from self._think(thinking)
        while (opener := (yield from self._read.until(self._openers, self._content.add))) is not None:
            yield from self._block(opener, self._content)

    def _think(self, thinking: Thinking) -> Steps[None]:
        """<think> counts at the very beginning only: later the model may just be talking about it."""
        read = self._read
        read.keep()
        yield from read.space()
        opened = (yield from read.literal(THINK)) or self._opened or thinking.always
        if not opened:
            self._content.add(read.rejected())
            return
        read.commit()
        self._reasoning.edge()
        while (marker := (yield from read.until(self._think_ends, self._reasoning.add))) != THINK_END:
            if marker is None:
                return
            if (yield from self._block(marker, self._reasoning)):  # a call ends the reasoning, too
                yield from read.space()
                yield from read.literal(THINK_END)
                break
        self._reasoning.edge()
        self._content.edge()

    def _block(self, opener: str, channel: "_Channel") -> Steps[bool]:
        """Whether the opener was followed by a call; if not, what was read is text of the channel it stood in."""
        assert self._format is not None
        before = self._calls.count
        self._read.keep(opener)
        yield from self._format.block(opener)
        rejected = self._read.rejected()
        called = self._calls.count > before
        if called:
            channel.edge()
        if rejected:
            channel.add(rejected)
        return called


class _Channel:
    """Text on its way out, without the white space beside markers."""

    def __init__(self, emit: Sink, trims: bool):
        self._emit = emit
        self._trims = trims
        self._at_edge = False
        self._held: list[str] = []  # white space that a marker may follow

    def add(self, text: str) -> None:
        if self._at_edge:
            text = text.lstrip()
            self._at_edge = not text
        body = text.rstrip() if self._trims else text
        if body:
            self.flush()
            self._emit(body)
        if len(body) < len(text):
            self._held.append(text[len(body) :])

    def edge(self) -> None:
        """A marker stands here."""
        self._held.clear()
        self._at_edge = True

    def flush(self) -> None:
        if self._held:
            self._emit("".join(self._held))
            self._held.clear()


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt leaves the model inside its reasoning."""
    return prompt[-64:].rstrip().endswith(THINK)
