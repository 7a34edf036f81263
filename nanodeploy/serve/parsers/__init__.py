"""Reasoning and tool calls in a model's output, told apart as it streams. Pure text: no torch, no tokenizer."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from nanodeploy.errors import ConfigError
from nanodeploy.serve.parsers.dsml import DeepseekV4, DeepseekV32
from nanodeploy.serve.parsers.events import Content, Event, Reasoning, ToolArguments, ToolStart
from nanodeploy.serve.parsers.glm import Glm
from nanodeploy.serve.parsers.hermes import Hermes
from nanodeploy.serve.parsers.parser import THINK, THINK_END, Parser, Thinking, ToolFormat, opens_thinking
from nanodeploy.serve.parsers.qwen_xml import QwenXml
from nanodeploy.serve.parsers.sections import DeepseekV3, DeepseekV31, KimiK2
from nanodeploy.serve.parsers.values import Tools

__all__ = [
    "NONE",
    "REASONING_PARSERS",
    "TOOL_PARSERS",
    "Content",
    "Event",
    "Parser",
    "Reasoning",
    "ToolArguments",
    "ToolStart",
    "choose",
    "make",
    "opens_thinking",
    "shown_tokens",
]

NONE = "none"
# The names of --tool-call-parser and --reasoning-parser, as other engines have them.
TOOL_PARSERS: dict[str, type[ToolFormat] | None] = {
    "hermes": Hermes,
    "qwen3_coder": QwenXml,
    "glm47": Glm,
    "deepseek_v3": DeepseekV3,
    "deepseek_v31": DeepseekV31,
    "deepseek_v32": DeepseekV32,
    "deepseek_v4": DeepseekV4,
    "kimi_k2": KimiK2,
    NONE: None,
}
REASONING_PARSERS: dict[str, Thinking | None] = {"think": Thinking(), "deepseek_r1": Thinking(always=True), NONE: None}
TOOL_ALIASES = {"qwen3": "hermes", "qwen3_xml": "qwen3_coder", "glm45": "glm47", "glm5": "glm47"}
REASONING_ALIASES = dict.fromkeys(
    ("qwen3", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4", "glm45", "glm47", "glm5", "kimi_k2"),
    "think",
)
# What a chat template shows -> the format it teaches. The first that fits counts.
SIGNS = (
    ("<arg_key>", "glm47"),
    ("<function=", "qwen3_coder"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("<tool_call>", "hermes"),
)
SECTION = "<｜tool▁calls▁begin｜>"
# model_type -> parsers of models that come without a template, or whose template does not tell.
WITHOUT_TEMPLATE = {
    "deepseek_v32": ("deepseek_v32", "think"),
    "deepseek_v4": ("deepseek_v4", "think"),
    "glm_moe_dsa": ("glm47", "think"),
    "kimi_k2": ("kimi_k2", "think"),
    "kimi_k25": ("kimi_k2", "think"),
}


def choose(
    model_type: str | None, template: str | None, tool_parser: str = "auto", reasoning_parser: str = "auto"
) -> tuple[str, str]:
    """Names of the tool parser and the reasoning parser: as the flags say, else by what the chat template writes.

    `model_type` is config.json's. Raises ConfigError on a name that there is not.
    """
    tools, reasoning = _by_template(template) if template else WITHOUT_TEMPLATE.get(model_type or "", (NONE, NONE))
    if tool_parser != "auto":
        tools = _named("--tool-call-parser", tool_parser, TOOL_PARSERS, TOOL_ALIASES)
    if reasoning_parser != "auto":
        reasoning = _named("--reasoning-parser", reasoning_parser, REASONING_PARSERS, REASONING_ALIASES)
    return tools, reasoning


def make(
    tool_parser: str,
    reasoning_parser: str,
    tools: Sequence[Mapping[str, Any]] | None,
    prompt: str,
    parallel: bool = True,
) -> Parser:
    """The parser of one answer. Without tools nothing is taken for a call. `prompt` is what the answer follows."""
    return Parser(
        TOOL_PARSERS[tool_parser] if tools else None,
        REASONING_PARSERS[reasoning_parser],
        Tools(tools or ()),
        prompt_opens_thinking=opens_thinking(prompt),
        parallel=parallel,
    )


def shown_tokens(tool_parser: str, reasoning_parser: str) -> frozenset[str]:
    """Special tokens whose text these parsers read: a detokenizer must not skip them."""
    form = TOOL_PARSERS[tool_parser]
    thinks = (THINK, THINK_END) if REASONING_PARSERS[reasoning_parser] else ()
    return frozenset(thinks) | frozenset(form.tokens if form else ())


def _by_template(template: str) -> tuple[str, str]:
    if SECTION in template:
        # V3 and R1 fence the arguments, V3.1 does not; of the two R1 handles </think>, and never stops to think.
        fenced = "```json" in template
        if not fenced:
            return "deepseek_v31", "think"
        return "deepseek_v3", "deepseek_r1" if THINK_END in template else NONE
    tools = next((name for sign, name in SIGNS if sign in template), NONE)
    return tools, "think" if THINK_END in template else NONE


def _named(flag: str, name: str, there: Mapping[str, object], aliases: Mapping[str, str]) -> str:
    plain = aliases.get(name, name)
    if plain not in there:
        close = difflib.get_close_matches(name, [*there, *aliases], 1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{flag} is {name!r}; there are: auto, {', '.join(there)}.{hint}")
    return plain
