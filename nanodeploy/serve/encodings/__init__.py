"""Prompts of models that come without a chat template, written as their authors' reference code writes them.

Messages are those of serve/chat.py once they are checked: content is a string, arguments of tool calls are objects.
"""

from collections.abc import Callable
from typing import Protocol

from nanodeploy.serve.encodings import deepseek_v4, deepseek_v32

__all__ = ["ENCODERS", "Encoder"]


class Encoder(Protocol):
    """A module of this package."""

    THINKS: bool  # whether it thinks when nobody says
    encode: Callable[..., str]


# config.json's model_type -> how its prompts are written.
ENCODERS: dict[str, Encoder] = {"deepseek_v32": deepseek_v32, "deepseek_v4": deepseek_v4}
