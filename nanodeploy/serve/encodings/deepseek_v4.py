"""DeepSeek-V4's prompt, after encoding_dsv4.py of its Hugging Face repository (MIT); it has no Jinja template.

Tool results are part of the user's turn. Reasoning of earlier turns is dropped, unless there are tools. Of its first
release: the revision of 31 July 2026 words the efforts differently.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanodeploy.errors import RequestError
from nanodeploy.serve.encodings.dsml import (
    ASSISTANT,
    BOS,
    EOS,
    USER,
    Message,
    calls_text,
    in_call_order,
    reasoning_of,
    schemas,
    system_text,
    with_system,
)
from nanodeploy.serve.parsers.parser import THINK, THINK_END

THINKS = True
BLOCK = "tool_calls"
REMINDER = "<｜latest_reminder｜>"
# The model was trained on these very words.
MAX_EFFORT = """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""
TOOLS = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside \
<think>...</think> BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


def encode(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool = THINKS,
    effort: str | None = None,
    response_format: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt. `effort` "max" asks for the longest reasoning. Besides OpenAI's roles there is latest_reminder.

    Raises RequestError on tool results that follow no call.
    """
    turns = _turns(with_system(messages, needed=bool(tools or response_format)))
    last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
    text = BOS + (MAX_EFFORT if thinking and effort == "max" else "")
    for i, turn in enumerate(turns):
        # Whether this turn's reasoning is written, or will be.
        thinks = thinking and (bool(tools) or i >= last_user)
        if turn["role"] == "system":
            tools_text = TOOLS.replace("{schemas}", schemas(tools)) if tools and i == 0 else ""
            text += system_text(turn.get("content") or "", tools_text, response_format if i == 0 else None)
        elif turn["role"] == "latest_reminder":
            text += REMINDER + (turn.get("content") or "")
        elif turn["role"] == "assistant":
            thought = reasoning_of(turn) + THINK_END if thinks else ""
            text += thought + (turn.get("content") or "") + calls_text(turn, BLOCK, "messages") + EOS
        else:
            text += USER + "\n\n".join(turn["parts"])
            if i + 1 == len(turns) or turns[i + 1]["role"] in ("assistant", "latest_reminder"):
                text += ASSISTANT + (THINK if thinks else THINK_END)
    if add_generation_prompt and (not turns or turns[-1]["role"] != "user"):
        text += ASSISTANT + (THINK if thinking else THINK_END)
    return text


def _turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, with tool results and the user's words that follow each other made one turn of `parts`."""
    turns: list[dict[str, Any]] = []
    calls: Sequence[Mapping[str, Any]] = ()
    i = 0
    while i < len(messages):
        message = messages[i]
        if message["role"] not in ("user", "tool"):
            calls = message.get("tool_calls") or calls
            turns.append(dict(message))
            i += 1
            continue
        group = [message]
        while i + len(group) < len(messages) and messages[i + len(group)]["role"] == message["role"]:
            group.append(messages[i + len(group)])
        if message["role"] == "tool":
            if not calls:
                raise RequestError(f"messages[{i}]: a tool result that follows no tool call.", param=f"messages[{i}]")
            parts = [f"<tool_result>{m.get('content') or ''}</tool_result>" for m in in_call_order(group, calls)]
        else:
            parts = [m.get("content") or "" for m in group]
        if turns and turns[-1]["role"] == "user":
            turns[-1]["parts"] += parts
        else:
            turns.append({"role": "user", "parts": parts})
        i += len(group)
    return turns
