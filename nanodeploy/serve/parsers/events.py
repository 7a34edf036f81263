"""What a parser says of a model's output: text for the user, reasoning, and tool calls with their arguments as JSON."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class ToolStart:
    """A call begins. What its ToolArguments carry adds up to the arguments, as JSON text."""

    index: int  # 0, 1, ... of this answer
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolArguments:
    index: int
    delta: str


Event = Content | Reasoning | ToolStart | ToolArguments


def joined(events: Sequence[Event]) -> list[Event]:
    """The same, with neighbours of one kind made one event."""
    if len(events) < 2:
        return list(events)
    found: list[Event] = []
    for (kind, index), group in itertools.groupby(events, lambda e: (type(e), getattr(e, "index", None))):
        if kind is Content:
            found.append(Content("".join(e.text for e in group if isinstance(e, Content))))
        elif kind is Reasoning:
            found.append(Reasoning("".join(e.text for e in group if isinstance(e, Reasoning))))
        elif kind is ToolArguments and index is not None:
            found.append(ToolArguments(index, "".join(e.delta for e in group if isinstance(e, ToolArguments))))
        else:
            found.extend(group)
    return found
