"""The HTTP routes: OpenAI's completions and chat completions, models, health, metrics."""

import asyncio
import functools
import importlib.metadata
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanodeploy.catalog import ModelFiles
from nanodeploy.config import Config
from nanodeploy.errors import ConfigError, EngineDeadError, NanoDeployError, QueueFullError, RequestError
from nanodeploy.sampling import SamplingParams, model_defaults
from nanodeploy.serve import metrics, openai
from nanodeploy.serve.answers import Answer, ChatAnswer, CompletionAnswer, Reading
from nanodeploy.serve.chat import ChatTemplate, Encoding
from nanodeploy.serve.client import ClientGone, EngineClient, Generation
from nanodeploy.serve.encodings import ENCODERS
from nanodeploy.serve.grammar import Thinks, grammar_of, thinks_of
from nanodeploy.serve.grammar_check import GrammarChecker
from nanodeploy.serve.parsers import NONE, REASONING_PARSERS, TOOL_PARSERS, choose
from nanodeploy.serve.text import Delta
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import TokenEvent

MAX_BODY_BYTES = 16 << 20
MAX_ALL_BODIES_BYTES = 256 << 20  # of all requests that are being read at once
BODY_TIMEOUT_S = 60.0
REFUSED_BODY_S = 2.0  # how long a body too large is read and thrown away, so that the client hears why
KEEP_ALIVE_S = 15.0
MAX_GRAMMARS_AT_ONCE = 32  # that are tried, or wait for it
log = logging.getLogger(__name__)
T = TypeVar("T")


class ApiError(Exception):
    """An error reply: status, OpenAI's body, headers."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(message)
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.status = status
        self.body = openai.ErrorBody(openai.Error(message, kind, param, code))
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @classmethod
    def of(cls, error: NanoDeployError) -> "ApiError":
        if isinstance(error, RequestError):
            return cls(400, str(error), param=error.param, code=error.code)
        if isinstance(error, QueueFullError):
            return cls(503, str(error), code="overloaded", retry_after="1")
        if isinstance(error, EngineDeadError):
            return cls(503, str(error), code="unavailable", retry_after="5")
        return cls(500, str(error), x_should_retry="false")

    @classmethod
    def of_event(cls, event: TokenEvent) -> "ApiError":
        """The error that an engine (or the client, on its behalf) sent for one sequence."""
        message = event.error or "The engine aborted the request."
        if event.error_kind == "request":
            return cls(400, message, param=event.error_param)
        if event.error_kind == "queue_full":
            return cls(503, message, code="overloaded", retry_after="1")
        if event.error_kind in ("dead", "shutdown"):
            return cls(503, message, code="unavailable", retry_after="5")
        return cls(500, message, x_should_retry="false")  # the same request would fail again

    def response(self) -> Response:
        return _json(self.body, self.status, self.headers)


class Server:
    """What the routes share: the model's name and text side, the engine client, the metrics."""

    def __init__(self, config: Config, files: ModelFiles, client: EngineClient, latencies: metrics.Latencies):
        self.config = config
        self.client = client
        self.latencies = latencies
        self.created = int(time.time())
        self.tokenizer = Tokenizer(files.tokenizer_dir) if files.tokenizer_dir is not None else None
        source = self.tokenizer.chat_template if self.tokenizer else None
        self.template: ChatTemplate | Encoding | None = None
        model_type = files.config.get("model_type")
        if self.tokenizer and source:
            self.template = ChatTemplate(source, self.tokenizer.special_tokens)
        elif self.tokenizer and model_type in ENCODERS:
            self.template = Encoding(ENCODERS[model_type])
        self.parsers = choose(model_type, source, config.tool_call_parser, config.reasoning_parser)
        self.files = files
        self.grammar_checker: GrammarChecker | None = None  # from the first grammar on
        self.num_grammars = 0  # being tried
        self.defaults = model_defaults(files.generation_config)  # of requests that do not say
        self.bodies_bytes = 0
        self._threads = ThreadPoolExecutor(2, "text")
        self._grammar_threads = ThreadPoolExecutor(4, "grammar")  # each waits for a process
        self._warned: set[str] = set()

    def app(self) -> Starlette:
        routes = [
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/server_info", self.server_info),
            Route("/lab", self.lab),
            Route("/v1/models", self.models),
            Route("/v1/models/{id:path}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
            ApiError: _reply,
            NanoDeployError: _reply,
            ClientGone: _nobody_reads,
            ClientDisconnect: _nobody_reads,
            HTTPException: _http_error,
            Exception: _internal_error,
        }
        app = Starlette(routes=routes, exception_handlers=handlers)
        app.router.redirect_slashes = False
        return app

    def close(self) -> None:
        """End the processes that try grammars."""
        if self.grammar_checker is not None:
            self.grammar_checker.close()

    # -- about the server

    async def health(self, request: Request) -> Response:
        """200 while the engine's loop gives signs of life and takes requests; else 503 and the reason."""
        state = self.client.state
        body: dict[str, Any] = {"status": state, "num_steps": self.client.stats.num_steps}
        if state == "loading":
            body["phase"] = self.client.phase
        else:
            body["silent_s"] = round(self.client.silent_s, 3)
        return _json(body, 200 if state == "ready" else 503)

    async def metrics(self, request: Request) -> Response:
        is_up = self.client.state in ("ready", "draining")
        text = metrics.exposition(self.config.public_name, self.client.stats, self.latencies, is_up)
        return Response(text, media_type="text/plain; version=0.0.4")

    async def server_info(self, request: Request) -> Response:
        ready = self.client.info
        body = {
            "version": _version(),
            "state": self.client.state,
            "config": self.config.to_dict(),
            "sampling_defaults": self.defaults,
            "tool_call_parser": self.parsers[0],
            "reasoning_parser": self.parsers[1],
            "engine": None if ready is None else ready.info,
        }
        return _json(body)

    async def lab(self, request: Request) -> Response:
        """What became of kernel files that were saved while the server runs. Read-only."""
        if not self.config.lab:
            raise ApiError(404, "The kernel lab is not open; start the server with --lab.")
        return _json(self.client.lab or {})

    async def models(self, request: Request) -> Response:
        return _json(openai.ModelList([self._card()]))

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["id"])
        return _json(self._card())

    def _card(self) -> openai.ModelCard:
        card = openai.ModelCard(self.config.public_name, self.created)
        if self.client.info is not None:
            card.max_model_len = self.client.info.max_model_len
        return card

    # -- generation

    async def completions(self, request: Request) -> Response:
        arrived = time.monotonic()
        body = await self._read(request, openai.CompletionRequest)
        prompts = openai.prompts_of(body)
        self.client.ready()
        if self.tokenizer is None and isinstance(prompts[0], str):
            message = "This model has no tokenizer: send prompt as a list of token ids."
            raise RequestError(message, param="prompt")
        encode = functools.partial(self._encode, add_special_tokens=body.add_special_tokens is not False)
        token_ids = [p if isinstance(p, list) else await self._in_thread(encode, p) for p in prompts]
        for ids in token_ids:
            self._check_prompt(ids, body.max_tokens, "prompt")
        echo_only = bool(body.echo) and body.max_tokens == 0  # scoring: the engine makes one token, nobody sees it
        max_tokens = 1 if echo_only else openai.DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        params = openai.sampling_params(body, self.defaults, max_tokens)
        if body.logprobs is not None:
            prompt_logprobs = body.logprobs if body.echo else None
            params = replace(params, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs)
        self._check_params(params, len(prompts))
        params = replace(params, grammar=await self._grammar(body))
        texts = [p if isinstance(p, str) else self._decode(p) if body.echo else "" for p in prompts]
        answer = CompletionAnswer(body, self.config.public_name, self.tokenizer, params, token_ids, texts, echo_only)
        return await self._answer(request, body, answer, token_ids, params, arrived)

    async def chat_completions(self, request: Request) -> Response:
        arrived = time.monotonic()
        body = await self._read(request, openai.ChatRequest)
        self._check_chat(body)
        self.client.ready()
        tools = None if body.tool_choice == "none" else body.tools
        prompt, token_ids = await self._in_thread(self._encode_chat, body, tools)
        max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        self._check_prompt(token_ids, max_tokens, "messages")
        params = openai.sampling_params(body, self.defaults, max_tokens)
        if body.logprobs:
            params = replace(params, logprobs=body.top_logprobs or 0)
        self._check_params(params, 1)
        tool_parser, reasoning_parser = self.parsers
        parallel = body.parallel_tool_calls is not False
        thinks = thinks_of(REASONING_PARSERS[reasoning_parser], prompt)
        calls = {"tool_format": TOOL_PARSERS[tool_parser], "tools": tools, "tool_choice": body.tool_choice}
        params = replace(params, grammar=await self._grammar(body, thinks, **calls, parallel=parallel))
        reading = None
        if reasoning_parser != NONE or (tools and tool_parser != NONE):
            reading = Reading(tool_parser, reasoning_parser, tools or [], prompt, parallel)
        answer = ChatAnswer(body, self.config.public_name, self.tokenizer, params, token_ids, reading)
        return await self._answer(request, body, answer, [token_ids], params, arrived)

    def _check_chat(self, body: openai.ChatRequest) -> None:
        if self.template is None:
            missing = "tokenizer" if self.tokenizer is None else "chat template"
            raise RequestError(f"This model has no {missing}; use /v1/completions.", param="messages")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs=true.", param="top_logprobs")
        openai.check_tools(body.tools)

    async def _answer(
        self,
        request: Request,
        body: openai.SamplingFields,
        answer: Answer,
        token_ids: list[list[int]],
        params: SamplingParams,
        arrived: float,
    ) -> Response:
        """Submit every sequence, then answer whole or as a stream."""
        prompts = [ids for ids in token_ids for _ in range(params.n)]
        # Every choice echoes the prompt, so every one is scored, not just the first as elsewhere.
        nth = [replace(params.nth(i), prompt_logprobs=params.prompt_logprobs) for i in range(params.n)]
        each = nth * len(token_ids)
        generation = self.client.submit(prompts, each, body.cache_salt or "", arrived)
        watcher = asyncio.create_task(_watch(request.receive, generation))
        streams = False
        try:
            # An error that comes before the first token still gets its own status, streaming or not.
            await generation.wait(KEEP_ALIVE_S)
            refusal = generation.refusal()
            if refusal is not None:
                raise ApiError.of_event(refusal)
            streams = bool(body.stream)
            if streams:
                return EventStream(_frames(generation, answer), generation, watcher)
            while True:
                for index, delta in _deltas(generation, answer):
                    answer.add(index, delta)
                if not answer.num_open:
                    return _json(answer.whole(), headers={"x-request-id": answer.id})
                await generation.wait(KEEP_ALIVE_S)
        finally:
            if not streams:  # else both are the stream's
                watcher.cancel()
                generation.close()

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert self.tokenizer is not None
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False) if self.tokenizer else ""

    def _encode_chat(self, body: openai.ChatRequest, tools: Sequence[dict[str, Any]] | None) -> tuple[str, list[int]]:
        """The prompt, and its tokens."""
        asked = body.messages, tools, body.chat_template_kwargs
        if isinstance(self.template, Encoding):
            text = self.template.render(*asked, response_format=openai.schema_of(body.response_format))
        else:
            assert self.template is not None
            text = self.template.render(*asked)
        return text, self._encode(text, add_special_tokens=bool(body.add_special_tokens))  # templates write their own

    async def _grammar(self, body: openai.SamplingFields, thinks: Thinks = Thinks.NEVER, **calls: Any) -> str | None:
        """The grammar that the answer must follow, tried in a process of its own. `calls` as in grammar_of.

        Raises RequestError, QueueFullError.
        """
        form: dict[str, Any] = {"response_format": body.response_format, "structured": openai.structured(body)}
        if not any((*form.values(), calls.get("tools"), calls.get("tool_choice"))):
            return None
        markers = self.tokenizer.markers if self.tokenizer else {}
        grammar = await self._in_thread(functools.partial(grammar_of, markers, thinks, **form, **calls))
        if grammar is None:
            return None
        if self.files.tokenizer_dir is None:
            raise RequestError("This model has no tokenizer, which structured output needs.", param=grammar.param)
        if self.grammar_checker is None:
            path, vocab_size = self.files.tokenizer_dir / "tokenizer.json", self.client.ready().vocab_size
            self.grammar_checker = GrammarChecker(path, vocab_size, self.files.eos_token_ids)
        if self.num_grammars >= MAX_GRAMMARS_AT_ONCE:
            raise QueueFullError("Too many grammars are being compiled. Try again soon.")
        self.num_grammars += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._grammar_threads, self.grammar_checker.check, grammar)
        except ConfigError as error:  # of the model rather than of a flag, and of this request alone
            raise RequestError(str(error), param=grammar.param) from error
        finally:
            self.num_grammars -= 1

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """Text of any length, without stopping the loop that serves everybody's tokens."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    def _check_params(self, params: SamplingParams, num_prompts: int) -> None:
        """Ranges, before anything is made n times."""
        params.check(vocab_size=self.client.ready().vocab_size, max_logprobs=self.config.max_logprobs)
        if num_prompts * params.n > openai.MAX_SEQUENCES:
            message = f"{num_prompts} prompts x n={params.n}: at most {openai.MAX_SEQUENCES} sequences per request."
            raise RequestError(message, param="n")

    def _check_prompt(self, token_ids: list[int], max_tokens: int | None, param: str) -> None:
        ready = self.client.ready()
        if not token_ids:
            raise RequestError("The prompt is empty; wanted at least one token.", param=param)
        if min(token_ids) < 0 or max(token_ids) >= ready.vocab_size:
            raise RequestError(f"A token id of the prompt is not in 0 to {ready.vocab_size - 1}.", param=param)
        asked = max(0, max_tokens or 0)
        if len(token_ids) + max(asked, 1) > ready.max_model_len:
            message = (
                f"This model's maximum context length is {ready.max_model_len} tokens. However, you requested "
                f"{len(token_ids) + asked} tokens ({len(token_ids)} in the {param}, {asked} in the completion)."
            )
            raise RequestError(message, param=param, code="context_length_exceeded")

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.config.public_name, self.config.model):
            message = f"The model {name[:200]!r} does not exist; this server has {self.config.public_name!r}."
            raise ApiError(404, message, param="model", code="model_not_found")

    async def _read(self, request: Request, kind: type[openai.R]) -> openai.R:
        """The body as a request of this kind. Raises ApiError and RequestError."""
        media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if media_type != "application/json":  # a web page cannot send that to localhost unasked
            raise ApiError(415, f"Content-Type is {media_type[:80]!r}; wanted application/json.", connection="close")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "Content-Encoding is not supported; send the body as it is.", connection="close")
        body, unknown = openai.decode(await self._read_body(request), kind)
        self._check_model(body.model)
        openai.check_common(body)
        for name in unknown:
            if name not in self._warned and len(self._warned) < 100:
                self._warned.add(name)
                log.warning("ignoring a request field that means nothing here: %.80r", name)
        return body

    async def _read_body(self, request: Request) -> bytes:
        """At most MAX_BODY_BYTES, within BODY_TIMEOUT_S."""
        body = bytearray()
        taken = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for piece in request.stream():
                    body += piece
                    taken += len(piece)
                    self.bodies_bytes += len(piece)
                    if len(body) > MAX_BODY_BYTES:
                        body.clear()
                        await _throw_away(request)
                        message = f"The body is too large; at most {MAX_BODY_BYTES} bytes are read."
                        raise ApiError(413, message, connection="close")
                    if self.bodies_bytes > MAX_ALL_BODIES_BYTES:
                        message = "Too many large requests at once."
                        raise ApiError(503, message, retry_after="1", connection="close")
            return bytes(body)
        except TimeoutError:
            message = f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s."
            raise ApiError(408, message, connection="close") from None
        finally:
            self.bodies_bytes -= taken


class EventStream(Response):
    """Server-sent events. Whatever happens in the middle becomes an error event, and the sequences are closed."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], generation: Generation, watcher: asyncio.Task[None]):
        self._frames = frames
        self._generation = generation
        self._watcher = watcher
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except ClientGone:
            return
        except ApiError as error:
            await send({"type": "http.response.body", "body": openai.event(error.body), "more_body": True})
        except Exception:
            log.exception("a stream failed")
            body = openai.event(ApiError(500, "Internal error.").body)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            self._watcher.cancel()
            self._generation.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _deltas(generation: Generation, answer: Answer) -> Iterator[tuple[int, Delta]]:
    """What the events that wait add to the answer. Raises ApiError at an event that ends the whole request."""
    for index, event in generation.take():
        if event.finish_reason in ("error", "abort"):
            raise ApiError.of_event(event)
        delta = answer.feed(index, event)
        if delta is None:
            continue
        if delta.finish_reason is not None:
            generation.end(index, delta.finish_reason)  # nothing to do if the engine ended it, too
        yield index, delta


async def _frames(generation: Generation, answer: Answer) -> AsyncIterator[bytes]:
    """The stream's bytes; all that is known at one moment goes out together."""
    while answer.num_open:
        if await generation.wait(KEEP_ALIVE_S):
            frames: list[bytes] = []
            try:
                for index, delta in _deltas(generation, answer):
                    frames.append(answer.chunk(index, delta))
            finally:  # an error goes out behind what came before it
                if frames:
                    yield b"".join(frames)
        else:
            yield openai.KEEP_ALIVE
    yield answer.last_chunks()


async def _watch(receive: Receive, generation: Generation) -> None:
    """Disconnects the generation when the client goes away."""
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.disconnect()


async def _throw_away(request: Request) -> None:
    try:
        async with asyncio.timeout(REFUSED_BODY_S):
            async for _ in request.stream():
                pass
    except TimeoutError:
        pass


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("nanodeploy")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _json(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(openai.to_json(body), status, headers, "application/json")


async def _reply(request: Request, error: ApiError | NanoDeployError) -> Response:
    return (error if isinstance(error, ApiError) else ApiError.of(error)).response()


async def _nobody_reads(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = {
        404: f"There is no {request.url.path[:200]} here.",
        405: f"{request.method} is not allowed on {request.url.path[:200]}.",
    }.get(error.status_code, error.detail)
    reply = ApiError(error.status_code, message).response()
    reply.headers.update(error.headers or {})
    return reply


async def _internal_error(request: Request, error: Exception) -> Response:
    """Our own fault: Starlette hands the exception on to the log; the client learns nothing of it."""
    return ApiError(500, "Internal error.", x_should_retry="false").response()
