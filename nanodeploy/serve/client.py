"""The engine seen from the HTTP process: one socket out, events back to the requests that wait for them."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from nanodeploy import wire
from nanodeploy.config import Config
from nanodeploy.errors import EngineDeadError, QueueFullError
from nanodeploy.sampling import SamplingParams
from nanodeploy.serve.launch import EngineProcess
from nanodeploy.serve.metrics import Latencies
from nanodeploy.wire import GenerateRequest, Stats, TokenEvent

MAX_BUFFERED_EVENTS = 4096  # of one HTTP request whose client does not read
LAST_WORDS_S = 0.2  # a message that an ended engine had sent arrives within this
log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The HTTP client went away; nobody wants the answer."""


@dataclass(slots=True)
class _Sequence:
    generation: "Generation"
    index: int
    arrived: float
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


class Generation:
    """The sequences of one HTTP request, and what the engine has said about them, in order of arrival."""

    def __init__(self, client: "EngineClient", num_sequences: int):
        self._client = client
        self._events: deque[tuple[int, TokenEvent]] = deque()
        self._waiter: asyncio.Future[bool] | None = None
        self._gone = False
        self.open: dict[int, str] = {}  # index -> id of the sequences that have not ended
        self.num_sequences = num_sequences

    async def wait(self, timeout_s: float) -> bool:
        """Whether an event waits to be taken, after at most `timeout_s`. Raises ClientGone."""
        if not self._events and not self._gone:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        if self._gone:
            raise ClientGone
        return bool(self._events)

    def take(self) -> list[tuple[int, TokenEvent]]:
        """Every event that waits: (index of the sequence, event)."""
        events = list(self._events)
        self._events.clear()
        return events

    def refusal(self) -> TokenEvent | None:
        """The error that stands first in the queue, if one does: nothing was answered yet."""
        first = self._events[0][1] if self._events else None
        return first if first is not None and first.finish_reason == "error" else None

    def push(self, index: int, event: TokenEvent) -> None:
        self._events.append((index, event))
        if event.finish_reason is not None:
            self.open.pop(index, None)
        elif len(self._events) > MAX_BUFFERED_EVENTS:
            self.fail("client", "The client reads too slowly; the request was aborted.")
        self._wake()

    def end(self, index: int, reason: str) -> None:
        """This sequence needs no more tokens: the front end found the end itself."""
        id = self.open.pop(index, None)
        if id is not None:
            self._client.forget([id], reason)

    def fail(self, kind: str, message: str) -> None:
        """End every open sequence with an error event."""
        failed = list(self.open)
        self.close()
        for index in failed:
            event = TokenEvent(id="", finish_reason="error", error=message, error_kind=kind)
            self._events.append((index, event))
        self._wake()

    def disconnect(self) -> None:
        """The client went away: abort, and wake whoever waits with ClientGone."""
        self._gone = True
        self.close()
        self._wake()

    def close(self) -> None:
        """Abort what is still open. Always called in the end; after a whole answer it does nothing."""
        ids = list(self.open.values())
        self.open.clear()
        if ids:
            self._client.forget(ids, "abort")
        self._client.generations.discard(self)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(True)


class EngineClient:
    """Submits, aborts, and hears. All methods belong to the event loop's thread."""

    def __init__(self, config: Config, process: EngineProcess, latencies: Latencies):
        self._config = config
        self._process = process
        self._latencies = latencies
        self._ids = itertools.count(1)
        self._sequences: dict[str, _Sequence] = {}
        self._heard_at = time.monotonic()
        self.on_progress: Callable[[str], None] = lambda phase: None
        self.generations: set[Generation] = set()
        self.info: wire.Ready | None = None
        self.fatal: wire.Fatal | None = None
        self.stats = Stats()
        self.lab: dict[str, Any] | None = None  # what the kernel lab last said of itself
        self.phase = "starting the engine process"
        self.draining = False
        self.num_bad_frames = 0
        self.started = asyncio.Event()  # ready, or ended
        self.ended = asyncio.Event()
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndhwm = 0  # bounded by `submit`, not by a queue that would block the loop
        self._socket.bind(process.endpoint)
        self._receiver = asyncio.create_task(self._receive())
        self._receiver.add_done_callback(self._receiver_ended)
        loop = asyncio.get_running_loop()

        def watch() -> None:
            process.popen.wait()
            with contextlib.suppress(RuntimeError):  # the loop may have ended first
                loop.call_soon_threadsafe(self._process_ended)

        threading.Thread(target=watch, name="engine-watch", daemon=True).start()

    @property
    def state(self) -> str:
        """loading, ready, draining, unresponsive or dead."""
        if self.ended.is_set():
            return "dead"
        if self.info is None:
            return "loading"
        if self.silent_s > self._config.heartbeat_timeout:
            return "unresponsive"
        return "draining" if self.draining else "ready"

    @property
    def silent_s(self) -> float:
        """Seconds since the engine's loop last gave a sign of life."""
        return time.monotonic() - self._heard_at

    def ready(self) -> wire.Ready:
        """What the engine said of itself. Raises EngineDeadError with the reason if it cannot serve now."""
        state = self.state
        if state == "ready":
            assert self.info is not None
            return self.info
        reason = {
            "loading": f"The model is loading ({self.phase}).",
            "draining": "The server is shutting down.",
            "dead": self.last_words(),
            "unresponsive": f"The engine has not answered for {self.silent_s:.0f} s.",
        }
        raise EngineDeadError(reason[state])

    def last_words(self) -> str:
        """Why the engine ended."""
        if self.fatal is not None:
            return f"The engine ended: {self.fatal.message}"
        return f"The engine process ended with exit code {self._process.popen.returncode}."

    def submit(
        self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], salt: str, arrived: float
    ) -> Generation:
        """One sequence per (prompt, params). Raises EngineDeadError, or QueueFullError when too many are open."""
        self.ready()
        room = self._config.max_num_waiting + self._config.max_num_seqs - len(self._sequences)
        if len(prompts) > room:
            raise QueueFullError(f"Too many requests are waiting ({len(self._sequences)}). Try again soon.")
        generation = Generation(self, len(prompts))
        self.generations.add(generation)
        for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
            id = f"{next(self._ids):x}"
            generation.open[index] = id
            self._sequences[id] = _Sequence(generation, index, arrived)
            self._send(GenerateRequest(id, prompt, param, salt))
        return generation

    def forget(self, ids: list[str], reason: str) -> None:
        """Abort these sequences; whatever the engine still says of them is ignored."""
        for id in ids:
            sequence = self._sequences.pop(id, None)
            if sequence is not None:
                self._count(sequence, reason)
        if not self.ended.is_set():
            self._send(wire.Abort(ids))

    def fail_all(self, kind: str, message: str) -> None:
        for generation in list(self.generations):
            generation.fail(kind, message)

    def shut_down(self) -> None:
        """Ask the engine to leave now."""
        self._send(wire.Shutdown(0.0))

    def close(self) -> None:
        self._receiver.cancel()
        self._context.destroy(linger=0)

    def _send(self, message: wire.ToEngine) -> None:
        self._socket.send(wire.encode(message))  # without a high-water mark it never waits

    async def _receive(self) -> None:
        while True:
            frame = await self._socket.recv()
            self._heard_at = time.monotonic()
            try:
                message = wire.decode_from_engine(frame)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                self.num_bad_frames += 1
                log.error("dropped a bad frame from the engine: %s", error)
                continue
            if isinstance(message, wire.Events):
                self.stats = message.stats
                for event in message.events:
                    self._dispatch(event)
            elif isinstance(message, wire.Heartbeat):
                self.stats = message.stats
            elif isinstance(message, wire.LabReport):
                self.lab = message.state
                for line in message.lines:
                    log.info("%s", line)
            else:
                self._start_up(message)

    def _receiver_ended(self, task: asyncio.Task[None]) -> None:
        """A fault of ours: without ears the engine is as good as dead, and nobody may wait for ever."""
        if not task.cancelled() and task.exception() is not None:
            log.error("the front end stopped hearing the engine", exc_info=task.exception())
            self._process.kill()

    def _start_up(self, message: wire.Ready | wire.Progress | wire.Fatal) -> None:
        if isinstance(message, wire.Fatal):
            self.fatal = message
        elif isinstance(message, wire.Progress):
            self._process.unlink()  # connected
            self.phase = message.phase
            self.on_progress(message.phase)
        elif message.version != wire.VERSION:
            self.fatal = wire.Fatal("internal", f"it speaks version {message.version}, not {wire.VERSION}.")
            self._process.kill()
        else:
            self.info = message
            self.started.set()

    def _dispatch(self, event: TokenEvent) -> None:
        sequence = self._sequences.get(event.id)
        if sequence is None:
            return  # aborted meanwhile
        if event.token_ids:
            if not sequence.num_tokens:
                sequence.first = self._heard_at
                self._latencies.first_token.observe(self._heard_at - sequence.arrived)
            else:
                self._latencies.between_tokens.observe(self._heard_at - sequence.last)
            sequence.last = self._heard_at
            sequence.num_tokens += len(event.token_ids)
        if event.finish_reason is not None:
            del self._sequences[event.id]
            self._count(sequence, event.finish_reason)
        sequence.generation.push(sequence.index, event)

    def _count(self, sequence: _Sequence, reason: str) -> None:
        now = time.monotonic()
        self._latencies.finished[reason] = self._latencies.finished.get(reason, 0) + 1
        self._latencies.whole_request.observe(now - sequence.arrived)
        if sequence.num_tokens > 1:
            self._latencies.per_token.observe((sequence.last - sequence.first) / (sequence.num_tokens - 1))

    def _process_ended(self) -> None:
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self._bury)

    def _bury(self) -> None:
        self._process.unlink()
        self.ended.set()
        self.started.set()
        self.fail_all("dead", self.last_words())
