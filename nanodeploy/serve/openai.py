"""OpenAI's requests and responses as types. Fields of a response that a request did not ask for are left out."""

import re
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from nanodeploy.errors import RequestError
from nanodeploy.sampling import SamplingParams

MAX_SEQUENCES = 1024  # prompts x n of one request
MAX_SALT_CHARS = 256
MAX_TOOLS = 128
TOOL_NAME = re.compile(r"[\w.:-]{1,128}")
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI has it

# A bound that msgspec checks: Python would take integers of any length, and fail on printing them.
Int = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Tokens = list[Int]


class StreamOptions(Struct):
    include_usage: bool = False


class SamplingFields(Struct, kw_only=True):
    """What both endpoints share. None means not given: the model's generation_config.json, then OpenAI's default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = None
    best_of: Int | None = None
    max_tokens: Int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[Int, float] | None = None
    seed: Int | None = None
    stop: str | list[str] | None = None
    # beyond OpenAI, under the names that other engines use
    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Tokens | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    # what the answer must look like, in OpenAI's words, in vLLM's, and in vLLM's of old
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None


class CompletionRequest(SamplingFields, kw_only=True):
    prompt: str | list[str | Int | Tokens]
    echo: bool | None = None
    logprobs: Int | None = None


class ChatRequest(SamplingFields, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# Fields that change the answer and that this server does not carry out: refused, unless they ask for nothing.
NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
UNSUPPORTED = frozenset(
    {
        "suffix",
        "use_beam_search",
        "length_penalty",
        "prompt_logprobs",
        "truncate_prompt_tokens",
        "prompt_embeds",
        "bad_words",
        "allowed_token_ids",
        "logits_processors",
        "functions",
        "function_call",
        "audio",
        "prediction",
        "web_search_options",
        "continue_final_message",
        "chat_template",
        "documents",
        "mm_processor_kwargs",
        "return_tokens_as_token_ids",
    }
)
# Fields that other clients send and that change nothing here.
HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "reasoning_effort",
        "prompt_cache_key",
        "safety_identifier",
        "verbosity",
        "modalities",
        "priority",
        "request_id",
        "spaces_between_special_tokens",
        "add_generation_prompt",
    }
)

R = TypeVar("R", CompletionRequest, ChatRequest)
_decode_any = msgspec.json.Decoder().decode


def decode(body: bytes, kind: type[R]) -> tuple[R, list[str]]:
    """A request body, and the names in it that mean nothing here. Raises RequestError on what is no such request."""
    try:
        raw = _decode_any(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"The body is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise RequestError("The body is nested too deeply.") from error
    if not isinstance(raw, dict):
        raise RequestError("The body is not a JSON object.")
    for name in UNSUPPORTED & raw.keys():
        if raw[name] not in NOTHING:
            raise RequestError(f"{name} is not supported by this server.", param=name)
    unknown = [name for name in raw if name not in kind.__struct_fields__ and name not in HARMLESS | UNSUPPORTED]
    try:
        return msgspec.convert(raw, kind, str_keys=True), unknown
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").lstrip(".") or None
        if missing := re.search(r"missing required field `(\w+)`", message):
            param = missing[1]
        where = f"{param}: " if param else ""
        raise RequestError(f"{where}{message[:1].lower()}{message[1:]}.", param=param) from error
    except RecursionError as error:
        raise RequestError("The body is nested too deeply.") from error


def sampling_params(request: SamplingFields, defaults: dict[str, Any], max_tokens: int | None) -> SamplingParams:
    """The request over the model's defaults over OpenAI's. Ranges are checked later, by SamplingParams.check."""
    given: dict[str, Any] = dict(defaults)
    for name in SamplingParams.__struct_fields__:
        value = getattr(request, name, None)
        if value is not None and name not in ("logprobs", "max_tokens"):
            given[name] = value
    if isinstance(request.stop, str):
        given["stop"] = [request.stop] if request.stop else []
    return SamplingParams(**given, max_tokens=max_tokens)


def check_common(request: SamplingFields) -> None:
    """What the types do not say. Raises RequestError."""
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise RequestError("best_of other than n is not supported by this server.", param="best_of")
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options is only for stream=true.", param="stream_options")
    salt = request.cache_salt
    if salt is not None and not (0 < len(salt) <= MAX_SALT_CHARS and salt.isascii() and salt.isprintable()):
        raise RequestError(f"cache_salt: wanted 1 to {MAX_SALT_CHARS} printable ASCII characters.", param="cache_salt")


def check_tools(tools: list[dict[str, Any]] | None) -> None:
    """What the types do not say of tools. Raises RequestError."""
    names: set[str] = set()
    for i, tool in enumerate(tools or ()):
        where, function = f"tools[{i}]", tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise RequestError(f"{where}: wanted {{'type': 'function', 'function': {{...}}}}.", param=where)
        name = function.get("name")
        if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
            message = f"{where}.function.name is {str(name)[:80]!r}; wanted 1 to 128 letters, digits or _.:-"
            raise RequestError(message, param=f"{where}.function.name")
        if name in names:
            raise RequestError(f"{where}: there is a tool {name!r} already.", param=f"{where}.function.name")
        names.add(name)
        if not isinstance(function.get("parameters"), dict | None):
            message = f"{where}.function.parameters: wanted a JSON Schema, as an object."
            raise RequestError(message, param=f"{where}.function.parameters")
    if len(names) > MAX_TOOLS:
        raise RequestError(f"{len(names)} tools; at most {MAX_TOOLS} fit one request.", param="tools")


def schema_of(response_format: dict[str, Any] | None) -> dict[str, Any] | None:
    """The JSON Schema that a response_format has, if it has one."""
    described = (response_format or {}).get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    return schema if isinstance(schema, dict) else None


def structured(request: SamplingFields) -> dict[str, Any]:
    """What `structured_outputs` asks for, or the guided_* of old."""
    given = dict(request.structured_outputs or {})
    for name in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{name}")
        if value not in (None, "", []):
            given.setdefault(name, value)
    return given


def prompts_of(request: CompletionRequest) -> list[str | Tokens]:
    """The prompts: one or many, each text or token ids. Raises RequestError on a mixture or an empty prompt."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [[item for item in prompt if isinstance(item, int)]]
    if kinds not in ({str}, {list}):
        what = "an empty list" if not prompt else "a list that mixes strings, token ids and lists"
        raise RequestError(
            f"prompt is {what}; wanted a string, token ids, or a list of either.",
            param="prompt",
        )
    if len(prompt) > MAX_SEQUENCES:
        raise RequestError(f"{len(prompt)} prompts; at most {MAX_SEQUENCES} fit one request.", param="prompt")
    return [item for item in prompt if not isinstance(item, int)]


# ---------------------------------------------------------------- responses


class PromptDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct):
    """A whole completion, or one chunk of a stream; `usage` is null or absent on chunks as include_usage says."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(Struct):
    name: str
    arguments: str  # JSON, as text


class ToolCall(Struct):
    id: str
    function: FunctionCall
    type: str = "function"


class Message(Struct):
    role: str
    content: str | None  # null beside tool calls
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class Chat(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET


class FunctionDelta(Struct):
    arguments: str
    name: str | UnsetType = UNSET


class ToolCallDelta(Struct):
    """A piece of the call number `index`: first id, type and name, then arguments only."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChatDelta(Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Error(Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(Struct):
    error: Error


class ModelCard(Struct):
    id: str
    created: int
    max_model_len: int | UnsetType = UNSET
    object: str = "model"
    owned_by: str = "nanodeploy"


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


_encoder = msgspec.json.Encoder()
to_json = _encoder.encode


def event(message: Struct) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(message) + b"\n\n"


DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
