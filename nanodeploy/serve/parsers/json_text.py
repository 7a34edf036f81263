"""JSON that streams through: where a value ends is found by its brackets and quotes, character class by class."""

import json
import re

from nanodeploy.serve.parsers.reader import Reader, Sink, Steps

OUTSIDE = re.compile(r'[^"{}\[\]<]*')  # nothing that opens or closes, nor may begin a marker
INSIDE = re.compile(r'[^"\\]*')
SCALAR = re.compile(r"[^\s,}\]<]*")


def value(read: Reader, sink: Sink, stop: str) -> Steps[None]:
    """Pass on one JSON value as it is written, well formed or not. `stop` outside of a string ends it early."""
    char = yield from read.peek()
    if char == '"':
        yield from _string(read, sink)
    elif char in ("{", "["):
        yield from _nested(read, sink, stop)
    else:
        yield from read.run(SCALAR, sink)


def arguments(read: Reader, sink: Sink, stop: str) -> Steps[None]:
    """The arguments of a call: an object; some models write it as a string of JSON, or not at all when it is empty."""
    yield from read.space()
    char = yield from read.peek()
    if char in ("{", "["):
        yield from _nested(read, sink, stop)
        return
    pieces: list[str] = []
    yield from value(read, pieces.append, stop)
    text = "".join(pieces)
    unquoted = decoded(text) if char == '"' else None
    sink((text if unquoted is None else unquoted) if text not in ("", "null", '""') else "{}")


def string(read: Reader) -> Steps[str | None]:
    """Read a JSON string; None if there is none, or not a whole one."""
    if (yield from read.peek()) != '"':
        return None
    pieces: list[str] = []
    yield from _string(read, pieces.append)
    return decoded("".join(pieces))


def decoded(text: str) -> str | None:
    """The string that JSON text stands for; None if it is not one."""
    try:
        found = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    # Half a surrogate pair is legal in JSON and not in UTF-8.
    return found.encode("utf-8", "replace").decode() if isinstance(found, str) else None


def _nested(read: Reader, sink: Sink, stop: str) -> Steps[None]:
    depth = 0
    while char := (yield from read.run(OUTSIDE, sink)):
        if char == '"':
            yield from _string(read, sink)
            continue
        if char == "<" and (yield from read.at(stop)):
            return
        depth += (char in "{[") - (char in "}]")
        sink(read.take())
        if depth == 0:
            return


def _string(read: Reader, sink: Sink) -> Steps[None]:
    sink(read.take())
    while char := (yield from read.run(INSIDE, sink)):
        sink(read.take())
        if char == '"':
            return
        if (yield from read.peek()):
            sink(read.take())  # whatever the backslash escapes
