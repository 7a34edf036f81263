"""DeepSeek-V3.2's prompt, after encoding_dsv32.py of its Hugging Face repository (MIT); it has no Jinja template.

A turn that is not the last is written without its reasoning, as if the model had not thought.
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

THINKS = False
BLOCK = "function_calls"
# The model was trained on these very words.
TOOLS = """\
## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to \
the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{schemas}
</functions>
"""


def encode(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinking: bool = THINKS,
    response_format: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt. `response_format` is the schema of the answer. Raises RequestError on tool results without calls."""
    turns = with_system(messages, needed=bool(tools or response_format))
    last_user = max((i for i, message in enumerate(turns) if message["role"] == "user"), default=-1)
    text = BOS
    i = 0
    while i < len(turns):
        message, where = turns[i], f"messages[{i}]"
        role, content = message["role"], message.get("content") or ""
        # Every message behind the last one of the user belongs to the turn that goes on.
        opening = THINK if thinking and i >= last_user else THINK_END
        if role == "system":
            tools_text = TOOLS.replace("{schemas}", schemas(tools)) if tools and i == 0 else ""
            text += system_text(content, tools_text, response_format if i == 0 else None)
        elif role == "user":
            text += USER + content + ASSISTANT + opening
        elif role == "tool":
            calls = (turns[i - 1].get("tool_calls") if i else None) or ()
            results = in_call_order([m for m in turns[i : i + len(calls)] if m["role"] == "tool"], calls)
            if not calls or len(results) != len(calls):
                what = f"{len(results)} tool results follow {len(calls)} tool calls; wanted one for each"
                raise RequestError(f"{where}: {what}.", param=where)
            each = (f"\n<result>{m.get('content') or ''}</result>" for m in results)
            text += f"\n\n<function_results>{''.join(each)}\n</function_results>\n\n{opening}"
            i += len(results) - 1
        else:
            thought = reasoning_of(message) + THINK_END if thinking and i > last_user else ""
            text += thought + content + calls_text(message, BLOCK, where) + EOS
        i += 1
    if add_generation_prompt and (not turns or turns[-1]["role"] not in ("user", "tool")):
        text += ASSISTANT + (THINK if thinking else THINK_END)
    return text
