"""The engine: requests in, tokens out. `step` is all that happens, over and over."""

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from msgspec.structs import replace

from nanodeploy.config import Config
from nanodeploy.errors import QueueFullError, RequestError
from nanodeploy.runtime.grammars import Failure, Grammars
from nanodeploy.runtime.pages import PagePool
from nanodeploy.runtime.request import Request
from nanodeploy.runtime.runner import InFlight
from nanodeploy.runtime.scheduler import Scheduler, event
from nanodeploy.runtime.startup import start
from nanodeploy.wire import Abort, GenerateRequest, Stats, TokenEvent


class Engine:
    """One model on one device. Not thread-safe.

    Attributes for all to read: info (what was chosen at start-up and how long that took, in JSON's types), config
    (nothing in it is "auto" any more), vocab_size, max_model_len, num_pages, page_size.
    """

    def __init__(self, config: Config, progress: Callable[[str], None] | None = None):
        """Takes seconds; `progress` hears what begins and what was chosen. Raises ConfigError, CheckpointError."""
        self.began = time.monotonic()
        started = start(config, progress or (lambda text: None))
        self.config, self.runner, self.eos_ids = started.config, started.runner, started.eos_ids
        self.info: dict[str, Any] = started.info
        self.vocab_size, self.max_model_len = self.runner.model.vocab_size, started.max_model_len
        self.num_pages, self.page_size = started.num_pages, config.kvcache_block_size
        self.scheduler = Scheduler(
            PagePool(self.num_pages),
            page_size=self.page_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_caching=config.enable_prefix_caching,
        )
        self.grammars = Grammars(started.tokenizer_json, self.vocab_size, self.eos_ids)
        self.inbox: deque[Request | Abort] = deque()
        self.early: list[TokenEvent] = []  # of requests that ended before the scheduler saw them
        self.in_flight: InFlight | None = None
        self.open: set[str] = set()  # ids whose last event has not been returned
        self.seeds = random.Random(config.seed)

    def submit(self, message: GenerateRequest) -> None:
        """Queue a request. Raises RequestError for one that cannot be served, QueueFullError if too many wait."""
        self.check(message)
        if len(self.open) >= self.config.max_num_seqs + self.config.max_num_waiting:
            raise QueueFullError(f"{self.config.max_num_waiting} requests wait already. Try again later.")
        seed = self.seeds.getrandbits(63)
        request = Request.of(message, eos_ids=self.eos_ids, seed=seed, max_model_len=self.max_model_len)
        self.open.add(request.id)
        if request.params.grammar is None:
            self.inbox.append(request)
        else:
            self.grammars.add(request)

    def abort(self, id: str) -> None:
        """End a request wherever it stands; its last event comes from a later step. Unknown ids are ignored."""
        if request := self.grammars.withdraw(id):
            self.early.append(event(request, [], [], "abort"))
        elif id in self.open:
            self.inbox.append(Abort([id]))

    def step(self) -> list[TokenEvent]:
        """Launch the next step, then return what the one before it brought, which the device finished meanwhile."""
        self.admit()
        plan = self.scheduler.plan()  # who, how many tokens, which pages
        masked = plan is not None and self.grammars.constrains(plan.sampled)
        launched = self.runner.launch(plan, masked) if plan else None  # returns at once; token ids stay on the device
        events = self.settle(self.in_flight)  # waits for the previous step only
        if masked and launched:
            events += self.sample_masked(launched)  # which needed the previous step's tokens: see grammars.py
        self.in_flight = launched
        return events

    def idle(self) -> bool:
        """There is nothing to do: prepare for what may come, some milliseconds' worth. False: all is prepared."""
        if self.runner.prepare():
            return True
        self.grammars.prepare()
        return False

    def admit(self) -> None:
        """Empty the inbox, into which requests come whose grammars are compiled by now."""
        if self.grammars.are_compiling:
            if not (self.inbox or self.in_flight or self.scheduler.requests):
                self.grammars.wait()
            for request, error in self.grammars.ready():
                if error:
                    ended = event(request, [], [], "error")
                    self.early.append(replace(ended, error=error, error_kind="request", error_param="grammar"))
                else:
                    self.inbox.append(request)
        self.scheduler.admit(self.inbox)

    def settle(self, in_flight: InFlight | None) -> list[TokenEvent]:
        result = self.runner.wait(in_flight)
        events = self.early + self.scheduler.settle(in_flight.plan if in_flight else None, result)
        self.early = []
        if in_flight and result and self.grammars.matchers:
            failures = self.grammars.follow(in_flight.plan.sampled, result.tokens)
            events += [self.fail(failure) for failure in failures]
        self.close_ended(events)
        return events

    def sample_masked(self, launched: InFlight) -> list[TokenEvent]:
        """The rest of a launched step in which grammars have a say. Returns the last events of those that failed."""
        masks = self.runner.sampler.masks_to_fill()
        masked, failures = self.grammars.fill(launched.plan.sampled, masks)
        self.runner.sample(launched, masked)
        events = [self.fail(failure) for failure in failures]
        self.close_ended(events)
        return events

    def fail(self, failure: Failure) -> TokenEvent:
        """End a request over its grammar. Its token in flight will be dropped."""
        request, message = failure
        return replace(self.scheduler.end(request, "error"), error=message, error_kind="request", error_param="grammar")

    def close_ended(self, events: list[TokenEvent]) -> None:
        """Those that had their last event are no more."""
        ended = [event.id for event in events if event.finish_reason]
        self.open.difference_update(ended)
        self.grammars.forget(ended)

    def reset_prefix_cache(self) -> None:
        """Forget every cached page, so that the next prompts start cold."""
        self.scheduler.pool.forget()

    def busy(self) -> bool:
        """Whether step() has anything to do."""
        return bool(self.open or self.in_flight)

    def stats(self) -> Stats:
        scheduler = self.scheduler
        return Stats(
            uptime_s=time.monotonic() - self.began,
            num_steps=scheduler.num_steps,
            num_running=len(scheduler.running),
            num_waiting=len(self.open) - len(scheduler.running),
            num_pages=self.num_pages,
            num_free_pages=scheduler.pool.num_available,
            num_preemptions=scheduler.num_preemptions,
            prompt_tokens=scheduler.num_prompt_tokens,
            generation_tokens=scheduler.num_generated_tokens,
            prefix_queries=scheduler.num_prefix_queries,
            prefix_hits=scheduler.num_prefix_hits,
        )

    def close(self) -> None:
        """Give the device's memory back. The engine cannot be used after."""
        if self.in_flight:
            self.runner.wait(self.in_flight)
        self.grammars.close()
        self.runner.release()
        del self.runner, self.in_flight
        if self.config.device == "cuda":
            torch.cuda.empty_cache()

    def check(self, message: GenerateRequest) -> None:
        """The door: past it, no request can hurt another. Raises RequestError."""
        tokens = message.prompt_token_ids
        if message.id in self.open:
            raise RequestError(f"The request id {message.id} is in use.", param="id")
        if not tokens:
            raise RequestError("The prompt is empty; wanted at least one token.", param="prompt")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            wrong = next(token for token in tokens if not 0 <= token < self.vocab_size)
            raise RequestError(f"The prompt has token id {wrong}; wanted 0 to {self.vocab_size - 1}.", param="prompt")
        if len(tokens) >= self.max_model_len:
            raise RequestError(
                f"This model's maximum context length is {self.max_model_len} tokens, the answer included. However, "
                f"your prompt has {len(tokens)} tokens. Please reduce its length.",
                param="prompt",
                code="context_length_exceeded",
            )
        message.params.check(vocab_size=self.vocab_size, max_logprobs=self.config.max_logprobs)
        if message.params.grammar is not None:
            self.grammars.check()
