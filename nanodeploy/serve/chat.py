"""Chat messages to one prompt text, by the model's own Jinja template, as Hugging Face renders it.

The environment is Hugging Face's: sandboxed and immutable, trim_blocks, lstrip_blocks, loop controls,
`{% generation %}`, and the helpers raise_exception, tojson and strftime_now. Templates come with the model only, never
from a request.
"""

import datetime
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from nanodeploy.errors import CheckpointError, RequestError
from nanodeploy.serve.encodings import Encoder

ROLES = ("system", "developer", "user", "assistant", "tool")
# Variables that the server sets; a request's chat_template_kwargs may not.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"})
MAX_KWARG_CHARS = 1000


class Encoding:
    """The prompt of a model that has no template, behind the same door. `variables` as of a ChatTemplate."""

    def __init__(self, encoder: Encoder):
        self._encoder = encoder
        self._takes_effort = "effort" in inspect.signature(encoder.encode).parameters
        self.variables = frozenset(("thinking", "enable_thinking", *(("effort",) if self._takes_effort else ())))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        response_format: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. `response_format` is the schema of the answer. Raises RequestError."""
        given = _checked(kwargs or {}, self.variables)
        thinking = given.get("thinking", given.get("enable_thinking", self._encoder.THINKS))
        effort = {"effort": given.get("effort")} if self._takes_effort else {}
        return self._encoder.encode(
            _plain(messages, knows_developer=False),
            tools or None,
            thinking=bool(thinking),
            response_format=response_format,
            add_generation_prompt=add_generation_prompt,
            **effort,
        )


class ChatTemplate:
    """A compiled template. `variables` are the names that a request's chat_template_kwargs may set."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        """`special_tokens` are bos_token, eos_token, ... Raises CheckpointError on a template that does not parse."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
            named = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the model's chat template does not parse: {error}.") from error
        self._special_tokens = dict(special_tokens)
        self.variables = frozenset(named) - RESERVED - set(environment.globals) - set(special_tokens)
        self._knows_developer = "developer" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt. Raises RequestError on messages or kwargs that are malformed or that the template refuses."""
        plain = _plain(messages, self._knows_developer)
        given = _checked(kwargs or {}, self.variables)
        try:
            return self._template.render(
                **self._special_tokens,
                **given,
                messages=plain,
                tools=list(tools) if tools else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            message = f"The model's chat template refused these messages: {error}"
            raise RequestError(message, param="messages") from error


def _plain(messages: Sequence[Mapping[str, Any]], knows_developer: bool) -> list[dict[str, Any]]:
    """OpenAI's messages as templates expect them: content is a string, arguments of tool calls are objects."""
    if not messages:
        raise RequestError("messages is empty; wanted at least one message.", param="messages")
    return [_plain_message(message, f"messages[{i}]", knows_developer) for i, message in enumerate(messages)]


def _plain_message(message: Mapping[str, Any], where: str, knows_developer: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}; wanted an object.", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"{where}.role is {role!r}; wanted one of {', '.join(ROLES)}.", param=f"{where}.role")
    if role == "developer" and not knows_developer:
        role = "system"
    calls = message.get("tool_calls")
    content = _text(message.get("content"), f"{where}.content", may_be_absent=role == "assistant")
    plain = {key: value for key, value in message.items() if value is not None}
    plain |= {"role": role, "content": content}
    if calls is not None:
        plain["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    return plain


def _checked(kwargs: Mapping[str, Any], variables: frozenset[str]) -> dict[str, Any]:
    """A request's chat_template_kwargs."""
    for name, value in kwargs.items():
        if name not in variables:
            there = ", ".join(sorted(variables)) or "none"
            message = f"chat_template_kwargs.{name} is not a variable of this model's template; it has: {there}."
            raise RequestError(message[:MAX_KWARG_CHARS], param="chat_template_kwargs")
        if not isinstance(value, bool | int | float | str | None) or len(str(value)) > MAX_KWARG_CHARS:
            message = f"chat_template_kwargs.{name}: wanted a short string, a number, true, false or null."
            raise RequestError(message, param="chat_template_kwargs")
    return dict(kwargs)


def _text(content: Any, where: str, may_be_absent: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None and may_be_absent:
        return ""
    if not isinstance(content, list):
        raise RequestError(f"{where} is missing; wanted a string or a list of text parts.", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise RequestError(
                f"{where}[{i}] is of type {str(kind)[:40]!r}; this model takes text parts only.", param=f"{where}[{i}]"
            )
        texts.append(part[kind])
    return "\n".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls of an earlier answer: OpenAI carries arguments as JSON text, templates want the object."""
    plain = []
    for i, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}[{i}] has no function with a name.", param=where)
        arguments = function.get("arguments") or "{}"
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{where}[{i}].function.arguments is not JSON: {error}.", param=where) from error
        plain.append({**call, "function": {**function, "arguments": arguments}})
    return plain


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, with which trainers mark the assistant's words: here its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """json.dumps rather than Jinja's filter, which escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
