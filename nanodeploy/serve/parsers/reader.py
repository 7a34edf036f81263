"""Text that arrives in pieces, read as if it were whole.

A format is written as a generator: straight-line code that calls these primitives with `yield from`, and that is
suspended wherever the text so far ends. No primitive decides before it has seen enough, so the answer does not depend
on the pieces; each consumes what it has seen but for a bounded look-ahead, so the time is linear.
"""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
Sink = Callable[[str], object]
SPACE = re.compile(r"\s*")


class Markers:
    """Literal texts to look for. None may stand inside another, unless at its end: then two could compete."""

    def __init__(self, *texts: str):
        self.texts = tuple(dict.fromkeys(texts))
        assert not any(a in b[: len(b) - 1] for a in self.texts for b in self.texts if a != b), texts
        self.pattern = re.compile("|".join(map(re.escape, self.texts)) or "(?!)")
        self._longest = max(map(len, self.texts), default=1)
        self._firsts = {text[0] for text in self.texts}

    def held(self, text: str, start: int) -> int:
        """How many characters at the end of text[start:] could still become a marker."""
        start = max(start, len(text) - self._longest + 1)
        if self._firsts.isdisjoint(text[start:]):
            return 0
        for i in range(start, len(text)):
            if text[i] in self._firsts and any(marker.startswith(text[i:]) for marker in self.texts):
                return len(text) - i
        return 0


class Reader:
    """The text so far, from the first character that was not read yet."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._kept: list[str] | None = None
        self.ended = False  # nothing more will come

    def add(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    # What is read on trial can be handed back as text.

    def keep(self, text: str = "") -> None:
        """Keep what is read from here on; `text` was read just before."""
        self._kept = [text]

    def commit(self) -> None:
        """What was kept is understood."""
        self._kept = None

    def rejected(self) -> str:
        """What was kept and never understood."""
        text, self._kept = "".join(self._kept or ()), None
        return text

    def take(self, count: int = 1) -> str:
        """Read `count` characters that are there."""
        piece = self._text[self._at : self._at + count]
        self._at += count
        if self._kept is not None:
            self._kept.append(piece)
        return piece

    # Primitives: each waits until it can tell.

    def peek(self) -> Steps[str]:
        """The next character; "" at the end of all text."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def at(self, text: str) -> Steps[bool]:
        """Whether `text` comes next. Reads nothing."""
        while not self.ended:
            there = self._text[self._at : self._at + len(text)]
            if len(there) == len(text) or not text.startswith(there):
                break
            yield
        return self._text.startswith(text, self._at)

    def literal(self, text: str) -> Steps[bool]:
        """Read `text` if it comes next."""
        found = yield from self.at(text)
        if found:
            self.take(len(text))
        return found

    def run(self, pattern: re.Pattern[str], sink: Sink) -> Steps[str]:
        """Pass on the longest run of characters; `pattern` is one repeated class. Returns the character behind it."""
        while True:
            match = pattern.match(self._text, self._at)
            assert match is not None, pattern
            if match.end() > self._at:
                sink(self.take(match.end() - self._at))
            if self._at < len(self._text):
                return self._text[self._at]
            if self.ended:
                return ""
            yield

    def text(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read a run of characters whole."""
        pieces: list[str] = []
        yield from self.run(pattern, pieces.append)
        return "".join(pieces)

    def space(self) -> Steps[str]:
        """Read white space."""
        return (yield from self.text(SPACE))

    def until(self, markers: Markers, sink: Sink) -> Steps[str | None]:
        """Pass text on up to the first marker, which is read and returned; None at the end of all text."""
        while True:
            found = markers.pattern.search(self._text, self._at)
            if found is not None:
                if found.start() > self._at:
                    sink(self.take(found.start() - self._at))
                return self.take(len(found[0]))
            held = 0 if self.ended else markers.held(self._text, self._at)
            if len(self._text) - held > self._at:
                sink(self.take(len(self._text) - held - self._at))
            if self.ended:
                return None
            yield
