"""What the prompts of DeepSeek V3.2 and V4 share: tool calls in DSML, and messages put into turns."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nanodeploy.errors import RequestError
from nanodeploy.serve.parsers.dsml import DSML, INVOKE, INVOKE_END, PARAMETER, PARAMETER_END

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
Message = Mapping[str, Any]


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def calls_text(message: Message, block: str, where: str) -> str:
    """The tool calls of an assistant's message; "" if it has none. A string with a closing tag in it cannot be told
    from the tag: DSML has no escapes."""
    lines = []
    for call in message.get("tool_calls") or ():
        function = call["function"]
        arguments = function.get("arguments") or {}
        if not isinstance(arguments, Mapping):
            text = f"{where}.tool_calls: the arguments of {function['name']} are not a JSON object."
            raise RequestError(text, param=f"{where}.tool_calls")
        lines.append(f'{INVOKE} name="{function["name"]}">')
        for key, value in arguments.items():
            is_string = isinstance(value, str)
            text = value if is_string else to_json(value)
            lines.append(f'{PARAMETER} name="{key}" string="{str(is_string).lower()}">{text}{PARAMETER_END}')
        if not arguments:
            lines.append("")
        lines.append(INVOKE_END)
    return "\n".join(["", "", f"<{DSML}{block}>", *lines, f"</{DSML}{block}>"]) if lines else ""


def system_text(content: str, tools_text: str, response_format: Mapping[str, Any] | None) -> str:
    """The system message, with the tools and the schema of the answer behind it."""
    parts = [content]
    if tools_text:
        parts.append(tools_text)
    if response_format:
        parts.append(RESPONSE_FORMAT + to_json(response_format))
    return "\n\n".join(parts)


def with_system(messages: Sequence[Message], needed: bool) -> list[Message]:
    """The messages, developers' as the system's; if need be with an empty system message before them."""
    found = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    if needed and (not found or found[0]["role"] != "system"):
        found.insert(0, {"role": "system", "content": ""})
    return found


def schemas(tools: Sequence[Mapping[str, Any]] | None) -> str:
    """The functions, one JSON object a line."""
    return "\n".join(to_json(tool["function"]) for tool in tools or ())


def in_call_order(results: list[Message], calls: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Tool results as their calls stood; they may come in any order."""
    order = {call.get("id"): i for i, call in enumerate(calls)}
    return sorted(results, key=lambda result: order.get(result.get("tool_call_id"), 0))


def reasoning_of(message: Message) -> str:
    return message.get("reasoning_content") or message.get("reasoning") or ""
