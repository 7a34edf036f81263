"""The engine: requests in, tokens out. `step` is the loop; the rest is the way in and the start-up."""

import dataclasses
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nanodeploy import catalog
from nanodeploy.catalog import ModelFiles
from nanodeploy.config import Config, use_compile_caches
from nanodeploy.errors import ConfigError, QueueFullError, RequestError
from nanodeploy.models import registry as models
from nanodeploy.ops import machine
from nanodeploy.ops import registry as ops
from nanodeploy.ops.layouts import num_pages_for
from nanodeploy.runtime import cache
from nanodeploy.runtime.pages import PagePool
from nanodeploy.runtime.request import Request
from nanodeploy.runtime.resolve import resolve
from nanodeploy.runtime.runner import InFlight, Runner
from nanodeploy.runtime.scheduler import Scheduler
from nanodeploy.wire import Abort, GenerateRequest, Stats, TokenEvent


class Engine:
    """One model on one device. Not thread-safe.

    `info` says, in JSON's types, what was chosen at start-up and how long that took.
    """

    def __init__(self, config: Config, progress: Callable[[str], None] | None = None):
        """Takes seconds; `progress` hears what begins and what was chosen. Raises ConfigError, CheckpointError."""
        self.say = progress or (lambda text: None)
        self.info: dict[str, Any] = {"phases": {}}
        self.began = time.monotonic()
        use_compile_caches()
        with self.phase("reading the model's config"):
            files = catalog.locate(config.model, config.tokenizer)
        try:
            self.runner = self.start(config, files)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"The GPU's memory ran out: {str(error).partition('. ')[0]}. "
                f"Lower --gpu_memory_utilization (it is {config.gpu_memory_utilization:g}) or --max_num_batched_tokens."
            ) from error
        self.scheduler = Scheduler(
            PagePool(self.num_pages),
            page_size=self.page_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            prefix_caching=config.enable_prefix_caching,
        )
        self.inbox: list[Request | Abort] = []
        self.in_flight: InFlight | None = None
        self.open: set[str] = set()  # ids whose last event has not been returned
        self.num_steps = 0
        self.seeds = random.Random(config.seed)

    def submit(self, message: GenerateRequest) -> None:
        """Queue a request. Raises RequestError for one that cannot be served, QueueFullError if too many wait."""
        self.check(message)
        if len(self.open) >= self.config.max_num_seqs + self.config.max_num_waiting:
            raise QueueFullError(f"{self.config.max_num_waiting} requests wait already. Try again later.")
        seed = self.seeds.getrandbits(63)
        request = Request.of(message, eos_ids=self.eos_ids, seed=seed, max_model_len=self.max_model_len)
        self.open.add(request.id)
        self.inbox.append(request)

    def abort(self, id: str) -> None:
        """End a request wherever it stands; its last event comes from a later step. Unknown ids are ignored."""
        if id in self.open:
            self.inbox.append(Abort([id]))

    def step(self) -> list[TokenEvent]:
        """Launch the next step, then return what the one before it brought, which the device finished meanwhile."""
        inbox, self.inbox = self.inbox, []
        self.scheduler.admit(inbox)
        plan = self.scheduler.plan()  # who, how many tokens, which pages
        launched = self.runner.launch(plan) if plan else None  # returns at once; token ids stay on the device
        events = self.settle(self.in_flight)  # waits for the previous step only
        self.in_flight = launched
        self.num_steps += launched is not None
        return events

    def settle(self, in_flight: InFlight | None) -> list[TokenEvent]:
        result = self.runner.wait(in_flight)
        events = self.scheduler.settle(in_flight.plan if in_flight else None, result)
        self.open.difference_update(event.id for event in events if event.finish_reason)
        return events

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
            num_steps=self.num_steps,
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

    def start(self, config: Config, files: ModelFiles) -> Runner:
        """From files to a runner that is warm. What can fail, fails as early as it can be known."""
        skeleton = models.skeleton(files)
        config, reasons = resolve(config, files, skeleton.max_model_len)
        device, dtype = torch.device(config.device), getattr(torch, config.dtype)
        on_gpu, compiled = device.type == "cuda", device.type == "cuda" and not config.enforce_eager
        self.say(f"{files.name}: {config.dtype} on {machine.key() if on_gpu else 'cpu'}")
        ops.use(config.kernel_overrides())

        model_len, page_size, needs = skeleton.max_model_len, config.kvcache_block_size, skeleton.cache_needs()
        bytes_per_page = cache.page_bytes(needs, page_size, dtype)
        weights_bytes = sum(parameter.numel() * dtype.itemsize for parameter in skeleton.parameters())

        def room(step_bytes: int) -> cache.Room:
            if on_gpu:
                return cache.room_on_gpu(device, config.gpu_memory_utilization, weights_bytes, step_bytes)
            return cache.room_on_cpu(config, bytes_per_page, model_len)

        cache.choose_sizes(config, room(0), bytes_per_page, model_len)  # what fails now spares the loading
        with self.phase("loading weights"):
            model = models.build(files, dtype=dtype, device=device, load_format=config.load_format, seed=config.seed)
        if compiled:
            model.compile_layers()
        runner = Runner(
            model,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_pages=num_pages_for(config.max_model_len or model_len, page_size),
            page_size=page_size,
            device=device,
        )
        with self.phase("compiling and warming up" if compiled else "warming up"):
            runner.caches = cache.allocate(needs, 2, page_size, dtype, device)
            step_bytes = runner.warm_up(config.max_model_len or model_len) - weights_bytes
            runner.caches = []
        with self.phase("allocating the KV cache"):
            have = room(step_bytes)
            self.num_pages, self.max_model_len = cache.choose_sizes(config, have, bytes_per_page, model_len)
            runner.caches = cache.allocate(needs, self.num_pages, page_size, dtype, device)
        if compiled:
            with self.phase("capturing CUDA graphs"):
                runner.capture_graphs()

        cache_bytes = self.num_pages * bytes_per_page
        self.say(
            f"KV cache: {self.num_pages * page_size} tokens in {self.num_pages} pages, "
            f"{cache_bytes / cache.GIB:.2f} GiB of {have.num_bytes / cache.GIB:.2f} ({have.reason})"
        )
        if config.max_model_len is None:
            reasons["max_model_len"] = (
                "the model's" if self.max_model_len == model_len else "cut to what the cache holds"
            )
            self.say(f"max_model_len: {self.max_model_len} ({reasons['max_model_len']})")
        kernels: dict[str, list[str]] = {}  # what was chosen -> ops
        for name, choices in ops.chosen().items():
            kernels.setdefault(", ".join(f"{k} ({reason})" for k, reason in choices.items()), []).append(name)
        for choice, names in kernels.items():
            self.say(f"{', '.join(names)}: {choice}")
        self.config = dataclasses.replace(config, max_model_len=self.max_model_len, num_kvcache_blocks=self.num_pages)
        self.page_size, self.vocab_size = page_size, skeleton.vocab_size
        self.eos_ids = frozenset(token for token in files.eos_token_ids if token < self.vocab_size)
        self.info |= {
            "config": self.config.to_dict(),
            "reasons": reasons,
            "device": machine.key() if on_gpu else "cpu",
            "torch": torch.__version__,
            "kernels": ops.chosen(),
            "num_pages": self.num_pages,
            "page_size": page_size,
            "cache_tokens": self.num_pages * page_size,
            "cache_bytes": cache_bytes,
            "weights_bytes": weights_bytes,
        }
        return runner

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say that a phase of start-up begins, and note the seconds it took."""
        self.say(name)
        began = time.monotonic()
        yield
        self.info["phases"][name] = time.monotonic() - began
