"""What a request's sequences have said so far, shaped as OpenAI's objects: whole, or chunk by chunk.

A whole answer is one chunk of everything, so the two cannot differ.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET, Struct

from nanodeploy.sampling import SamplingParams
from nanodeploy.serve import openai, parsers
from nanodeploy.serve.parsers import Content, Event, Parser, Reasoning, ToolArguments, ToolStart
from nanodeploy.serve.text import Delta, TextStream
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import Logprobs, TokenEvent


@dataclass(frozen=True)
class Reading:
    """How one request's answers are told apart into reasoning, content and tool calls; the parsers by name."""

    tool_parser: str
    reasoning_parser: str
    tools: Sequence[Mapping[str, Any]]  # empty: nothing is taken for a call
    prompt: str
    parallel: bool

    @property
    def shown(self) -> frozenset[str]:
        """Special tokens that the parsers read."""
        return parsers.shown_tokens(self.tool_parser if self.tools else parsers.NONE, self.reasoning_parser)

    def parser(self) -> Parser:
        return parsers.make(self.tool_parser, self.reasoning_parser, self.tools, self.prompt, self.parallel)


class Answer:
    """The sequences of one request: number p * n + i is the i-th answer to prompt p."""

    id_prefix = ""

    def __init__(
        self,
        request: openai.SamplingFields,
        model: str,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompts: Sequence[list[int]],
        offsets: Sequence[int],
        shown: frozenset[str] = frozenset(),
    ):
        """`offsets` says per prompt where the answer's text begins, in characters: behind an echo. `shown` are special
        tokens that are text.
        """
        self.id = self.id_prefix + secrets.token_hex(12)
        self.created = int(time.time())
        self.model = model
        self.prompts = prompts
        self.return_token_ids = bool(request.return_token_ids)
        self._include_usage = request.stream_options is not None and request.stream_options.include_usage
        self._tokenizer = tokenizer
        self._num_top = params.logprobs  # None: no log-probabilities asked for
        self._n = params.n
        self._streams = [TextStream(tokenizer, params, offset, shown) for offset in offsets for _ in range(params.n)]
        self._cached = [0] * len(prompts)
        self._whole = [Delta() for _ in self._streams]
        self._begun = [False] * len(self._streams)
        self.num_open = len(self._streams)

    def feed(self, index: int, event: TokenEvent) -> Delta | None:
        """What an event adds to its sequence; None if that sequence has ended already."""
        stream = self._streams[index]
        if stream.finish_reason is not None:
            return None
        delta = stream.feed(event)
        prompt = index // self._n
        self._cached[prompt] = max(self._cached[prompt], event.num_cached_tokens)
        self.num_open -= delta.finish_reason is not None
        return delta

    def add(self, index: int, delta: Delta) -> None:
        """Keep a delta for the whole answer."""
        whole = self._whole[index]
        whole.text += delta.text
        whole.token_ids += delta.token_ids
        whole.logprobs += delta.logprobs
        whole.offsets += delta.offsets
        whole.finish_reason = delta.finish_reason
        whole.events += delta.events

    def whole(self) -> Struct:
        """The reply to a request without stream."""
        raise NotImplementedError

    def chunk(self, index: int, delta: Delta) -> bytes:
        """The server-sent events that tell a delta."""
        raise NotImplementedError

    def last_chunks(self) -> bytes:
        """How a stream ends: the usage, if asked for, and [DONE]."""
        usage = openai.event(self._usage_chunk()) if self._include_usage else b""
        return usage + openai.DONE

    def _usage_chunk(self) -> Struct:
        raise NotImplementedError

    def _begins(self, index: int) -> bool:
        """Whether this is the first chunk of its sequence."""
        begun, self._begun[index] = self._begun[index], True
        return not begun

    def _usage(self) -> openai.Usage:
        prompt, completion = sum(map(len, self.prompts)), self._num_completion_tokens()
        return openai.Usage(prompt, completion, prompt + completion, openai.PromptDetails(sum(self._cached)))

    def _num_completion_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self._streams)

    @property
    def _null_usage(self) -> Any:
        return None if self._include_usage else UNSET

    def _token_ids(self, ids: list[int]) -> Any:
        return ids if self.return_token_ids else UNSET

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.token_text(token_id) if self._tokenizer else f"token_id:{token_id}"

    def _token_bytes(self, token_id: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token_id)) if self._tokenizer else []


class CompletionAnswer(Answer):
    """/v1/completions, with echo."""

    id_prefix = "cmpl-"

    def __init__(
        self,
        request: openai.CompletionRequest,
        model: str,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompts: Sequence[list[int]],
        texts: Sequence[str],
        echo_only: bool,
    ):
        """`texts` are the prompts as echo repeats them. `echo_only`: the one token that was generated is not shown."""
        self._echo = bool(request.echo)
        self._echo_only = echo_only
        self._texts = texts
        self._prompt_logprobs: dict[int, list[Logprobs | None]] = {}
        super().__init__(request, model, tokenizer, params, prompts, [len(t) if self._echo else 0 for t in texts])

    def feed(self, index: int, event: TokenEvent) -> Delta | None:
        if event.prompt_logprobs is not None:
            self._prompt_logprobs[index] = event.prompt_logprobs
        delta = super().feed(index, event)
        if delta is not None and self._echo_only:
            return Delta(finish_reason=delta.finish_reason and "length")
        return delta

    def whole(self) -> openai.Completion:
        choices = [self._choice(index, delta) for index, delta in enumerate(self._whole)]
        return self._completion(choices, self._usage())

    def chunk(self, index: int, delta: Delta) -> bytes:
        return openai.event(self._completion([self._choice(index, delta)], self._null_usage))

    def _usage_chunk(self) -> openai.Completion:
        return self._completion([], self._usage())

    def _completion(self, choices: list[openai.CompletionChoice], usage: Any) -> openai.Completion:
        return openai.Completion(self.id, "text_completion", self.created, self.model, choices, usage)

    def _num_completion_tokens(self) -> int:
        return 0 if self._echo_only else super()._num_completion_tokens()

    def _choice(self, index: int, delta: Delta) -> openai.CompletionChoice:
        prompt = index // self._n
        begins = self._begins(index)
        logprobs = None
        if self._num_top is not None:
            logprobs = openai.CompletionLogprobs([], [], [], [])
            if begins and self._echo:
                self._add_prompt(logprobs, prompt, self._prompt_logprobs.get(index, []))
            for position, offset in zip(delta.logprobs, delta.offsets, strict=True):
                self._add_position(logprobs, position, offset)
        return openai.CompletionChoice(
            index=index,
            text=(self._texts[prompt] if begins and self._echo else "") + delta.text,
            logprobs=logprobs,
            finish_reason=delta.finish_reason,
            token_ids=self._token_ids(delta.token_ids),
            prompt_token_ids=self._token_ids(self.prompts[prompt]) if begins else UNSET,
        )

    def _add_prompt(self, logprobs: openai.CompletionLogprobs, prompt: int, positions: list[Logprobs | None]) -> None:
        """The echoed prompt's tokens; the first has no log-probability, as nothing predicts it."""
        offset = 0
        detokenizer = self._tokenizer.detokenizer(skip_special_tokens=False) if self._tokenizer else None
        for token_id, position in zip(self.prompts[prompt], positions, strict=True):
            if position is None:
                logprobs.tokens.append(self._token_text(token_id))
                logprobs.token_logprobs.append(None)
                logprobs.top_logprobs.append(None)
                logprobs.text_offset.append(offset)
            else:
                self._add_position(logprobs, position, offset)
            offset += len(detokenizer.feed(token_id)) if detokenizer else 0

    def _add_position(self, logprobs: openai.CompletionLogprobs, position: Logprobs, offset: int) -> None:
        text = self._token_text(position.token_id)
        top = dict(zip(map(self._token_text, position.top_ids), position.top_logprobs, strict=True))
        logprobs.tokens.append(text)
        logprobs.token_logprobs.append(position.logprob)
        logprobs.top_logprobs.append({**top, text: position.logprob})
        logprobs.text_offset.append(offset)


class ChatAnswer(Answer):
    """/v1/chat/completions."""

    id_prefix = "chatcmpl-"

    def __init__(
        self,
        request: openai.ChatRequest,
        model: str,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt: list[int],
        reading: Reading | None = None,
    ):
        """`reading` says how reasoning and tool calls are told from content; None: all is content."""
        shown = reading.shown if reading else frozenset()
        super().__init__(request, model, tokenizer, params, [prompt], [0], shown)
        self._parsers = [reading.parser() for _ in range(params.n)] if reading else []
        self._calls_tools = reading is not None and bool(reading.tools)

    def feed(self, index: int, event: TokenEvent) -> Delta | None:
        delta = super().feed(index, event)
        if delta is not None and self._parsers:
            delta.events = self._parsers[index].feed(delta.text)
            if delta.finish_reason is not None:
                delta.events += self._parsers[index].finish()
        return delta

    def whole(self) -> openai.Chat:
        choices = [
            openai.ChatChoice(
                index=index,
                message=_message(delta.events) if self._parsers else openai.Message("assistant", delta.text),
                logprobs=self._logprobs(delta),
                finish_reason=self._finish_reason(index, delta),
                token_ids=self._token_ids(delta.token_ids),
            )
            for index, delta in enumerate(self._whole)
        ]
        chat = openai.Chat(self.id, "chat.completion", self.created, self.model, choices, self._usage())
        chat.prompt_token_ids = self._token_ids(self.prompts[0])
        return chat

    def chunk(self, index: int, delta: Delta) -> bytes:
        events = b""
        if self._begins(index):
            opening = self._chunk([_choice(index, openai.ChatDelta(role="assistant", content=""))])
            opening.prompt_token_ids = self._token_ids(self.prompts[0])
            events += openai.event(opening)
        told = [_told(event) for event in delta.events]
        if not told and (delta.token_ids or delta.text):
            if not self._parsers:
                told = [openai.ChatDelta(content=delta.text)]
            elif not self._calls_tools or self._num_top is not None or self.return_token_ids:
                told = [openai.ChatDelta(content="")]  # the text is held back, its tokens are told
        for i, part in enumerate(told):
            choice = _choice(index, part)
            if i == 0:
                choice.logprobs = self._logprobs(delta)
                choice.token_ids = self._token_ids(delta.token_ids)
            events += openai.event(self._chunk([choice]))
        if delta.finish_reason is not None:
            reason = self._finish_reason(index, delta)
            events += openai.event(self._chunk([_choice(index, openai.ChatDelta(), reason)]))
        return events

    def _finish_reason(self, index: int, delta: Delta) -> str | None:
        called = delta.finish_reason == "stop" and self._parsers and self._parsers[index].num_calls
        return "tool_calls" if called else delta.finish_reason

    def _usage_chunk(self) -> openai.ChatChunk:
        chunk = self._chunk([])
        chunk.usage = self._usage()
        return chunk

    def _chunk(self, choices: list[openai.ChatChunkChoice]) -> openai.ChatChunk:
        return openai.ChatChunk(self.id, "chat.completion.chunk", self.created, self.model, choices, self._null_usage)

    def _logprobs(self, delta: Delta) -> openai.ChatLogprobs | None:
        if self._num_top is None:
            return None
        return openai.ChatLogprobs(
            [
                openai.TokenLogprob(
                    self._token_text(position.token_id),
                    position.logprob,
                    self._token_bytes(position.token_id),
                    [
                        openai.TopLogprob(self._token_text(id), logprob, self._token_bytes(id))
                        for id, logprob in zip(position.top_ids, position.top_logprobs, strict=True)
                    ],
                )
                for position in delta.logprobs
            ]
        )


def _told(event: Event) -> openai.ChatDelta:
    """An event as a chunk tells it. The name of a call comes first, then its arguments piece by piece."""
    match event:
        case Content(text):
            return openai.ChatDelta(content=text)
        case Reasoning(text):
            return openai.ChatDelta(reasoning_content=text)
        case ToolStart(index, id, name):
            call = openai.ToolCallDelta(index, openai.FunctionDelta("", name), id, "function")
        case ToolArguments(index, delta):
            call = openai.ToolCallDelta(index, openai.FunctionDelta(delta))
    return openai.ChatDelta(tool_calls=[call])


def _message(events: Sequence[Event]) -> openai.Message:
    """A whole answer's events as its message."""
    content = "".join(event.text for event in events if isinstance(event, Content))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    calls: dict[int, openai.ToolCall] = {}
    for event in events:
        if isinstance(event, ToolStart):
            calls[event.index] = openai.ToolCall(event.id, openai.FunctionCall(event.name, ""))
        elif isinstance(event, ToolArguments):
            calls[event.index].function.arguments += event.delta
    message = openai.Message("assistant", content or (None if calls else ""))
    if reasoning:
        message.reasoning_content = reasoning
    if calls:
        message.tool_calls = list(calls.values())
    return message


def _choice(index: int, delta: openai.ChatDelta, finish_reason: str | None = None) -> openai.ChatChunkChoice:
    return openai.ChatChunkChoice(index, delta, None, finish_reason)
