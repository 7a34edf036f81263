"""Chat templates: as transformers renders them, and never more than the model's author allowed."""

import json

import pytest
from serving import ROOT, TEMPLATE
from transformers.utils.chat_template_utils import render_jinja_template

from nanodeploy.errors import CheckpointError, RequestError
from nanodeploy.serve.chat import ChatTemplate
from nanodeploy.serve.tokenizer import Tokenizer

DEMO = ROOT / "nanodeploy" / "demo" / "qwen3"
HELPERS = """\
{%- for message in messages %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {% generation %}{{ message.content | trim }}{% endgeneration %}
  {#- a comment #}
    {{ bos_token }}{{ {"a": [1, 'é<']} | tojson }} {{ {"b": 1} | tojson(indent=2) }}
{% endfor %}
{{ strftime_now("%Y") }}{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}"""
TOOLS = [{"type": "function", "function": {"name": "f", "description": "Grüße <&>", "parameters": {"type": "object"}}}]
MESSAGES = [
    [{"role": "user", "content": "hi <b>&amp; 'quotes'"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\n"}],
    [
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "ü"}}}],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nso 42"},
        {"role": "user", "content": "thanks"},
    ],
]


def templates() -> list[str]:
    return [TEMPLATE, HELPERS, (DEMO / "chat_template.jinja").read_text()]


@pytest.mark.parametrize("source", templates(), ids=["ours", "helpers", "demo"])
@pytest.mark.parametrize("messages", MESSAGES, ids=["user", "system", "tools"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no_tools", "tools"])
def test_rendering_is_that_of_transformers(source: str, messages: list, tools: list | None) -> None:
    template = ChatTemplate(source, {"bos_token": "<s>"})
    kwargs = {"enable_thinking": False} if "enable_thinking" in source else {}
    theirs, _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=True, bos_token="<s>", **kwargs
    )
    assert template.render(messages, tools, kwargs) == theirs[0]


def render(messages: object, **options) -> str:
    return ChatTemplate(TEMPLATE, {}).render(messages, **options)


def test_content_parts_and_roles() -> None:
    text = render(
        [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": None, "name": None},
        ],
        add_generation_prompt=False,
    )
    assert text == "<|im_start|>system\na\nb<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    knows = ChatTemplate("{{ messages[0].role }}{# developer #}", {})
    assert knows.render([{"role": "developer", "content": "x"}]) == "developer"


def test_arguments_of_tool_calls_become_objects() -> None:
    template = ChatTemplate("{{ messages[0].tool_calls[0].function.arguments.city }}", {})
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps({"city": "Köln"})}}
    assert template.render([{"role": "assistant", "tool_calls": [call]}]) == "Köln"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "root", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        (
            [
                {"role": "user", "content": "x"},
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]},
            ],
            "messages[1].content[0]",
        ),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "tool_calls": "x"}], "messages[0].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages[0].tool_calls",
        ),
        ([{"role": "tool", "content": "no id"}], "messages"),
    ],
)
def test_malformed_messages(messages: list, param: str) -> None:
    with pytest.raises(RequestError) as error:
        render(messages)
    assert error.value.param == param


@pytest.mark.parametrize(
    "kwargs",
    [
        {"chat_template": "x"},
        {"messages": []},
        {"tools": []},
        {"tokenize": True},
        {"add_generation_prompt": False},
        {"raise_exception": 1},
        {"bos_token": "x"},
        {"unheard_of": 1},
        {"enable_thinking": {"a": 1}},
        {"enable_thinking": "x" * 2000},
    ],
)
def test_requests_may_set_the_templates_own_variables_only(kwargs: dict) -> None:
    with pytest.raises(RequestError) as error:
        render([{"role": "user", "content": "x"}], kwargs=kwargs)
    assert error.value.param == "chat_template_kwargs"
    assert "<think>" in render([{"role": "user", "content": "x"}], kwargs={"enable_thinking": True})


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{{ messages | tojson(indent='x' * 5, cls=1) }}",
        "{% include 'x' %}",
    ],
)
def test_a_hostile_template_cannot_leave_the_sandbox(source: str) -> None:
    with pytest.raises(RequestError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_template_that_does_not_parse_is_the_operators_error() -> None:
    with pytest.raises(CheckpointError, match="does not parse"):
        ChatTemplate("{% for %}", {})


def test_the_demo_has_a_template() -> None:
    tokenizer = Tokenizer(DEMO)
    assert tokenizer.chat_template is not None
    text = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens).render(
        [{"role": "user", "content": "1+1=?"}]
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == "user\n1+1=?\nassistant\n"
