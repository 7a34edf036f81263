"""A tool that the model calls, and an answer in the form of a JSON Schema, with OpenAI's client (pip install openai):

nanodeploy serve demo:qwen3
python examples/tools.py --url http://127.0.0.1:8000/v1 --question "What is the weather in Rome?"
"""

import argparse
import json
from typing import Any

from openai import OpenAI

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
# strict: a call that begins is held to the schema by a grammar, so its arguments can be relied upon.
WEATHER = {"name": "get_weather", "description": "Get the weather in a city", "parameters": CITY, "strict": True}
FORM = {
    "type": "object",
    "properties": {"temperature": {"type": "integer"}, "sky": {"enum": ["sunny", "cloudy", "rainy", "clear"]}},
    "required": ["temperature", "sky"],
    "additionalProperties": False,
}


def get_weather(city: str) -> dict[str, Any]:
    """The tool. This one makes it up."""
    return {"temperature": 7 + len(city), "sky": "cloudy"}


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--question", default="What is the weather in Rome?")
args = parser.parse_args()

client = OpenAI(base_url=args.url, api_key="none")
model = client.models.list().data[0].id
talk: list[Any] = [{"role": "user", "content": args.question}]
while True:
    reply = client.chat.completions.create(
        model=model, messages=talk, tools=[{"type": "function", "function": WEATHER}], temperature=0
    )
    message = reply.choices[0].message
    talk.append(message.to_dict())
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        result = get_weather(**json.loads(call.function.arguments))
        print(f"{call.function.name}({call.function.arguments}) -> {json.dumps(result)}")
        talk.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
print(message.content)

form = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": FORM}}
reply = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": f"repeat: {message.content}"}],
    response_format=form,
    temperature=0,
    extra_body={"chat_template_kwargs": {"enable_thinking": False}},
)
print("as JSON:", reply.choices[0].message.content)
