"""nanodeploy: an LLM inference engine that one person can read. The public API is LLM, SamplingParams and Config.

Nothing is imported before it is asked for: `import nanodeploy` costs no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanodeploy.config import Config as Config
    from nanodeploy.llm import LLM as LLM
    from nanodeploy.sampling import SamplingParams as SamplingParams

HOMES = {"LLM": "nanodeploy.llm", "SamplingParams": "nanodeploy.sampling", "Config": "nanodeploy.config"}
__all__ = ["LLM", "Config", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'nanodeploy' has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *HOMES]
