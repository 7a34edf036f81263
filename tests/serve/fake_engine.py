"""An Engine without a model: it answers with the prompt, over and over, and misbehaves on demand.

The cache_salt of a request says how: `delay=S` sleeps per step, `burst=N` brings N tokens per event, `crash` raises in
step, `refuse` raises RequestError, `full` raises QueueFullError, `hang=S` sleeps once. `--kernels start=...` says how
it starts: slow, config_error, crash, die.
"""

import os
import time
from collections.abc import Callable

from nanodeploy import catalog
from nanodeploy.config import Config
from nanodeploy.errors import CheckpointError, QueueFullError, RequestError
from nanodeploy.wire import GenerateRequest, Logprobs, Stats, TokenEvent

VOCAB_SIZE = 600


class FakeEngine:
    def __init__(self, config: Config, progress: Callable[[str], None] | None = None):
        assert progress is not None
        progress("pretending to load")
        start = config.kernel_overrides().get("start")
        if start == "slow":
            time.sleep(3)
        if start == "config_error":
            raise CheckpointError("model.safetensors is truncated:\n  it ends after 10 bytes.")
        if start == "crash":
            raise ZeroDivisionError("on purpose")
        if start == "die":
            os._exit(7)
        self.eos = catalog.locate(config.model, config.tokenizer).eos_token_ids
        self.info = {"device": "fake"}
        self.vocab_size = VOCAB_SIZE
        self.max_model_len = config.max_model_len or 256
        self.num_pages = 100
        self.page_size = config.kvcache_block_size
        self.running: dict[str, tuple[GenerateRequest, int]] = {}
        self.aborted: list[str] = []
        self.num_steps = self.prompt_tokens = self.generation_tokens = 0
        self.began = time.monotonic()

    def submit(self, request: GenerateRequest) -> None:
        request.params.check(vocab_size=self.vocab_size, max_logprobs=20)
        assert request.params.n == 1 and not request.params.stop
        if request.cache_salt == "refuse":
            raise RequestError("refused on purpose", param="prompt")
        if request.cache_salt == "full":
            raise QueueFullError("full on purpose")
        self.running[request.id] = (request, 0)
        self.prompt_tokens += len(request.prompt_token_ids)

    def abort(self, id: str) -> None:
        if self.running.pop(id, None) is not None:
            self.aborted.append(id)

    def idle(self) -> bool:
        return False

    def busy(self) -> bool:
        return bool(self.running or self.aborted)

    def step(self) -> list[TokenEvent]:
        self.num_steps += 1
        events = [TokenEvent(id=id, finish_reason="abort") for id in self.aborted]
        self.aborted = []
        delay = 0.0
        for request, count in list(self.running.values()):
            order, _, value = request.cache_salt.partition("=")
            if order == "crash":
                raise ZeroDivisionError("crash on purpose")
            if order == "hang" and count == 0:
                time.sleep(float(value))
            delay = max(delay, float(value) if order == "delay" else 0.0)
            events.append(self.advance(request, count, int(value) if order == "burst" else 1))
        if delay:
            time.sleep(delay)
        return events

    def advance(self, request: GenerateRequest, count: int, burst: int) -> TokenEvent:
        params, prompt = request.params, request.prompt_token_ids
        limit = min(params.max_tokens or 2**31, self.max_model_len - len(prompt))
        stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos))
        tokens: list[int] = []
        reason = stop = None
        while reason is None and len(tokens) < burst:
            token = prompt[(count + len(tokens)) % len(prompt)]
            if token in stops and count + len(tokens) >= params.min_tokens:
                reason, stop = "stop", token
            else:
                tokens.append(token)
                if count + len(tokens) >= limit:
                    reason = "length"
        self.generation_tokens += len(tokens)
        self.running[request.id] = (request, count + len(tokens))
        if reason is not None:
            del self.running[request.id]
        scored = params.prompt_logprobs
        return TokenEvent(
            id=request.id,
            token_ids=tokens,
            logprobs=[self.logprobs(t, params.logprobs) for t in tokens] if params.logprobs is not None else [],
            prompt_logprobs=[None] + [self.logprobs(t, scored) for t in prompt[1:]]
            if scored is not None and count == 0
            else None,
            finish_reason=reason,
            stop_token_id=stop,
            num_prompt_tokens=len(prompt),
            num_cached_tokens=16 * (len(prompt) // 16) if request.cache_salt == "cached" else 0,
        )

    def logprobs(self, token: int, num_top: int) -> Logprobs:
        top = [(token + i) % self.vocab_size for i in range(num_top)]
        return Logprobs(token, -0.5, 1, top, [-0.5 - i for i in range(num_top)])

    def stats(self) -> Stats:
        return Stats(
            uptime_s=time.monotonic() - self.began,
            num_steps=self.num_steps,
            num_running=len(self.running),
            num_pages=self.num_pages,
            num_free_pages=self.num_pages - len(self.running),
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
        )

    def close(self) -> None:
        pass
