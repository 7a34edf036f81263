"""Offline: LLM.generate and LLM.chat, on the same engine as the server, in this process.

Names are those vLLM's users know, so that a script moves over by its import line.
"""

import operator
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, TracebackType
from typing import Any, Self

import msgspec
from tqdm import tqdm

from nanodeploy import catalog, flags, wire
from nanodeploy.errors import ConfigError, NanoDeployError, RequestError
from nanodeploy.runtime.engine import Engine
from nanodeploy.sampling import SamplingParams, model_defaults
from nanodeploy.serve.chat import ChatTemplate
from nanodeploy.serve.text import Delta, TextStream
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import GenerateRequest, TokenEvent

# vLLM's spelling -> ours, where they differ.
SPELLINGS = {"block_size": "kvcache_block_size", "num_gpu_blocks_override": "num_kvcache_blocks"}
# vLLM's settings whose one value here is what nanodeploy does anyway: scripts pass them out of habit.
HABITS = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "trust_remote_code": False, "disable_log_stats": True}
NO_LIMIT = 2**31 - 1
BAR_PERIOD_S = 0.1

Prompt = str | Sequence[int] | Mapping[str, Any]
PlainPrompt = tuple[str | None, list[int]]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class Logprob:
    """One candidate at one position. `rank` 1 is the likeliest; `decoded_token` is None without a tokenizer."""

    logprob: float
    rank: int
    decoded_token: str | None


PositionLogprobs = dict[int, Logprob]  # token id -> Logprob: the position's own token and the likeliest ones


@dataclass
class CompletionOutput:
    """One answer. A stop token is not in `token_ids`; a stop string ends `text`, and its tokens are in `token_ids`."""

    index: int
    text: str = ""  # empty without a tokenizer
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[PositionLogprobs] | None = None  # beside token_ids
    finish_reason: str | None = None  # "stop" or "length"
    stop_reason: int | str | None = None  # the stop string or the stop token id that ended it; None for the end token


@dataclass
class RequestOutput:
    """A prompt and its `n` answers."""

    request_id: str
    prompt: str | None  # None where token ids came
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    finished: bool = True


class LLM:
    """An engine and its tokenizer. Every keyword is a field of Config: `LLM("demo:qwen3", max_model_len=4096)`.

    Not for several threads at once. Use it as a context, or call close(), to give the device's memory back.
    """

    def __init__(self, model: str, **settings: Any):
        """Loads the model; takes seconds. Raises ConfigError on a setting, a machine or a model that does not fit."""
        config = flags.from_mapping({"model": model, **_translate(settings)}, "LLM")
        files = catalog.locate(config.model, config.tokenizer)
        self.config = config
        self.tokenizer = Tokenizer(files.tokenizer_dir) if files.tokenizer_dir else None
        self._template: ChatTemplate | None = None
        self._defaults = model_defaults(files.generation_config)
        self._num_runs = 0
        self._closed = False
        self.engine = Engine(config, progress=_say if config.log_level in ("debug", "info") else None)

    @property
    def info(self) -> dict[str, Any]:
        """The resolved config, the device, the kernels chosen, the phases of start-up, the size of the cache."""
        return self.engine.info

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers, in the order of the prompts.

        A prompt is a string, a list of token ids, {"prompt": ...} or {"prompt_token_ids": ...}; one prompt or a list.
        sampling_params: one for all, one for each, or None for the model's own defaults. Raises RequestError that
        names the first bad prompt before anything runs. Ctrl-C ends every request, and the LLM can be used again.
        """
        plain = [self._plain(prompt, f"prompts[{i}]") for i, prompt in enumerate(_listed(prompts))]
        return self._run(plain, self._params_for(sampling_params, len(plain)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers to one conversation, a list of {"role", "content"}, or to a list of them, as from generate().

        `tools` are what the template tells the model of, in OpenAI's form; a call comes back as text, unparsed.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if one else messages
        tokenizer, template = self._chat_parts()
        plain = []
        for i, conversation in enumerate(conversations):
            with _naming(f"messages[{i}]"):
                text = template.render(conversation, tools, chat_template_kwargs, add_generation_prompt)
            plain.append((text, tokenizer.encode(text, add_special_tokens=False)))
        return self._run(plain, self._params_for(sampling_params, len(plain)), use_tqdm)

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, over SamplingParams' own defaults."""
        return SamplingParams(**self._defaults)

    def reset_prefix_cache(self) -> None:
        """Forget every cached page, so that the next prompts start cold."""
        self._open_engine().reset_prefix_cache()

    def close(self) -> None:
        """Free the device. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What generate() and chat() share.

    def _run(
        self, prompts: Sequence[PlainPrompt], params: Sequence[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        """Submit everything, step until everything has ended, and gather."""
        engine = self._open_engine()
        self._num_runs += 1
        results = [RequestOutput(f"{self._num_runs}-{i}", text, ids, []) for i, (text, ids) in enumerate(prompts)]
        running: dict[str, _Answer] = {}
        for i, (result, wanted) in enumerate(zip(results, params)):
            for k in range(wanted.n):
                answer = _Answer(result, k, wanted, self.tokenizer)
                try:
                    with _naming(f"prompts[{i}]"):
                        engine.submit(GenerateRequest(answer.id, result.prompt_token_ids, wanted.nth(k)))
                except NanoDeployError:
                    self._abort(running)
                    raise
                result.outputs.append(answer.output)
                running[answer.id] = answer
        with _CtrlC() as ctrl_c, _Bar(results, use_tqdm) as bar:
            while running and not ctrl_c.pressed:
                for event in engine.step():
                    if event.id not in running:
                        continue  # its stop string came before this token
                    answer = running[event.id]
                    if event.finish_reason == "error":
                        self._abort(running)
                        raise NanoDeployError(f"request {event.id}: {event.error}")
                    bar.saw(event, answer)
                    if answer.take(event):
                        del running[event.id]
                        if event.finish_reason is None:
                            engine.abort(event.id)
                        bar.ended(answer)
            self._abort(running)
        return results

    def _abort(self, running: Mapping[str, Any]) -> None:
        """End these, and wait until the engine has nothing left to do."""
        for request_id in running:
            self.engine.abort(request_id)
        while self.engine.busy():
            self.engine.step()

    def _open_engine(self) -> Engine:
        if self._closed:
            raise NanoDeployError("This LLM is closed; make a new one.")
        return self.engine

    def _chat_parts(self) -> tuple[Tokenizer, ChatTemplate]:
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            raise RequestError(f"{self.config.model} has no chat template; use generate().", param="messages")
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer.chat_template, self.tokenizer.special_tokens)
        return self.tokenizer, self._template

    def _plain(self, prompt: Any, where: str) -> PlainPrompt:
        """A prompt in any of its forms as (text or None, token ids)."""
        if isinstance(prompt, Mapping):
            key = "prompt_token_ids" if "prompt_token_ids" in prompt else "prompt"
            if key not in prompt:
                raise RequestError(f"{where} has keys {sorted(map(str, prompt))}; wanted prompt or prompt_token_ids.")
            prompt = prompt[key]
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(f"{where} is text, but {self.config.model} has no tokenizer; pass token ids.")
            return prompt, self.tokenizer.encode(prompt, add_special_tokens=True)
        try:
            return None, [operator.index(token) for token in prompt]
        except TypeError:
            raise RequestError(f"{where} is {_short(prompt)}; wanted a string or a list of token ids.") from None

    def _params_for(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        """One SamplingParams per prompt, each with fields of the declared types."""
        if given is None:
            given = self.default_sampling_params()
        if isinstance(given, SamplingParams):
            return [self._typed(given, "sampling_params")] * num_prompts
        if len(given) != num_prompts:
            raise RequestError(f"{len(given)} sampling_params came for {num_prompts} prompts.", param="sampling_params")
        return [self._typed(params, f"sampling_params[{i}]") for i, params in enumerate(given)]

    def _typed(self, params: Any, where: str) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            raise RequestError(f"{where} is {_short(params)}; wanted SamplingParams.", param="sampling_params")
        try:
            typed = msgspec.convert(msgspec.to_builtins(params), SamplingParams)
        except msgspec.ValidationError as error:
            raise RequestError(f"{where}: {error}.", param="sampling_params") from error
        with _naming(where):
            typed.check(vocab_size=self.engine.vocab_size, max_logprobs=self.config.max_logprobs)
        if typed.stop and self.tokenizer is None:
            raise RequestError(
                f"{where}.stop: {self.config.model} has no tokenizer to find strings with.", param="stop"
            )
        return typed


class _Answer:
    """One sequence while it runs: its tokens so far, and the search for its stop strings."""

    def __init__(self, request: RequestOutput, index: int, params: SamplingParams, tokenizer: Tokenizer | None):
        self.id = f"{request.request_id}-{index}"
        self.request = request
        self.output = CompletionOutput(index)
        self.params = params
        self.tokenizer = tokenizer
        # Only stop strings need the text while it grows. The one that matched is left in it, to be told and cut off.
        seen = msgspec.structs.replace(params, include_stop_str_in_output=True)
        self.stream = TextStream(tokenizer, seen) if params.stop else None
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0

    def take(self, event: TokenEvent) -> bool:
        """Take an event in; whether the sequence has ended."""
        output = self.output
        if event.prompt_logprobs is not None:
            self.request.prompt_logprobs = [self.logprobs_of(p) if p else None for p in event.prompt_logprobs]
        if output.index == 0:
            self.request.num_cached_tokens = max(self.request.num_cached_tokens, event.num_cached_tokens)
        delta = self.stream.feed(event) if self.stream else event  # up to the stop string, if it ends here
        output.token_ids += delta.token_ids
        if output.logprobs is not None and output.cumulative_logprob is not None:
            output.logprobs += map(self.logprobs_of, delta.logprobs)
            output.cumulative_logprob += sum(position.logprob for position in delta.logprobs)
        output.finish_reason = delta.finish_reason
        if event.stop_token_id is not None and event.stop_token_id in self.params.stop_token_ids:
            output.stop_reason = event.stop_token_id
        if isinstance(delta, Delta):
            output.text += delta.text
            if delta.finish_reason == "stop" and event.stop_token_id is None:
                self.stop_at_string()
        elif output.finish_reason and self.tokenizer:
            skip = self.params.skip_special_tokens
            output.text = self.tokenizer.decode(output.token_ids, skip_special_tokens=skip)
        return output.finish_reason is not None

    def stop_at_string(self) -> None:
        """The text ends with a stop string: the longest of those it ends with, as the matcher has it."""
        stop = max((s for s in self.params.stop if self.output.text.endswith(s)), key=len)
        self.output.stop_reason = stop
        if not self.params.include_stop_str_in_output:
            self.output.text = self.output.text.removesuffix(stop)

    def logprobs_of(self, position: wire.Logprobs) -> PositionLogprobs:
        def candidate(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, self.tokenizer.token_text(token) if self.tokenizer else None)

        found = {position.token_id: candidate(position.token_id, position.logprob, position.rank)}
        for rank, (token, logprob) in enumerate(zip(position.top_ids, position.top_logprobs), 1):
            found.setdefault(token, candidate(token, logprob, rank))
        return found


class _CtrlC:
    """The first Ctrl-C is noted and raised at the end, so that no engine step is torn; a second one raises at once.

    A program's own SIGINT handler stays as it is, and so does everything in other threads than the main one.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._ours = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._ours = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.pressed and error[0] is None:
            raise KeyboardInterrupt

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True


class _Bar:
    """The progress bar: prompts that are done, and tokens per second in and out. Only where stderr is a terminal."""

    def __init__(self, results: Sequence[RequestOutput], wanted: bool):
        self.bar = tqdm(
            total=len(results), desc="Processed prompts", disable=None if wanted else True, dynamic_ncols=True
        )
        self.began = self.shown = time.perf_counter()
        self.unseen = {id(result) for result in results}
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def saw(self, event: TokenEvent, answer: _Answer) -> None:
        """Count an event's tokens; a prompt counts when its first token comes."""
        if self.bar.disable:
            return
        if id(answer.request) in self.unseen:
            self.unseen.remove(id(answer.request))
            self.num_prompt_tokens += len(answer.request.prompt_token_ids)
        self.num_output_tokens += len(event.token_ids)
        now = time.perf_counter()
        if now - self.shown >= BAR_PERIOD_S:
            self.shown, elapsed = now, now - self.began
            rates = self.num_prompt_tokens / elapsed, self.num_output_tokens / elapsed
            self.bar.set_postfix_str("input {:.0f} tok/s, output {:.0f} tok/s".format(*rates))

    def ended(self, answer: _Answer) -> None:
        """One answer is whole; its prompt is done with the last of them."""
        if all(output.finish_reason for output in answer.request.outputs):
            self.bar.update()


def _translate(settings: Mapping[str, Any]) -> dict[str, Any]:
    """vLLM's spellings to ours. Raises ConfigError on a setting that asks for what nanodeploy does not do."""
    ours: dict[str, Any] = {"max_num_waiting": NO_LIMIT}  # the limit protects a server; here the caller waits anyway
    for name, value in settings.items():
        if name in HABITS:
            if value != HABITS[name]:
                raise ConfigError(f"LLM: {name}={value!r} is not supported; leave it out.")
            continue
        ours[SPELLINGS.get(name, name)] = value
    return ours


def _listed(prompts: Any) -> Sequence[Any]:
    """One prompt or many as a list of prompts."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(f"prompts is {_short(prompts)}; wanted a prompt or a list of prompts.", param="prompts")
    return [prompts] if prompts and all(isinstance(p, int) for p in prompts) else prompts


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """A RequestError from inside says where in the caller's lists it came from."""
    try:
        yield
    except RequestError as error:
        raise RequestError(f"{where}: {error}", param=error.param, code=error.code) from error


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) < 60 else text[:57] + '...'}"


def _say(phase: str) -> None:
    print(f"nanodeploy: {phase}", file=sys.stderr, flush=True)
