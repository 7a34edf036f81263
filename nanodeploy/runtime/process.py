"""The engine process: one Engine, one socket, one loop. Knows no HTTP and no text.

Started as `python -m nanodeploy.runtime.process ENDPOINT PARENT_PID MODULE:CLASS BEGAN` with the Config as JSON on
stdin; BEGAN is when the start as a whole began, by time.monotonic().
It ignores Ctrl-C, as the parent decides when to stop, and it dies with the parent.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import zmq

from nanodeploy import wire
from nanodeploy.config import Config
from nanodeploy.errors import ConfigError, NanoDeployError, QueueFullError, RequestError
from nanodeploy.phases import Phases, process_began
from nanodeploy.wire import Abort, Events, Fatal, GenerateRequest, Heartbeat, Progress, Ready, Shutdown, TokenEvent

HEARTBEAT_S = 0.5
LINGER_MS = 1000  # how long the last message may take to leave
PR_SET_PDEATHSIG = 1
LIBRARIES = "loading the engine's libraries"
LAB = "nanodeploy.runtime.lab:Lab"  # loaded with --lab only


class EngineLike(Protocol):
    """What the loop needs of runtime.engine.Engine."""

    info: dict[str, Any]
    vocab_size: int
    max_model_len: int
    num_pages: int
    page_size: int

    def submit(self, request: GenerateRequest) -> None: ...
    def abort(self, id: str) -> None: ...
    def step(self) -> list[TokenEvent]: ...
    def busy(self) -> bool: ...
    def idle(self) -> bool: ...
    def stats(self) -> wire.Stats: ...
    def close(self) -> None: ...


class LabLike(Protocol):
    """What the loop needs of runtime.lab.Lab."""

    def open(self, engine: Any) -> None: ...
    def turn(self) -> wire.LabReport | None: ...
    def step(self) -> list[TokenEvent]: ...
    def close(self) -> None: ...


def main(config_json: str, endpoint: str, engine: str, began: float) -> int:
    """Build the engine, serve the socket until told to stop, and return an exit code. `began`: see above.

    The operator's mistakes leave as Fatal("config") without a word on stderr, ours as Fatal("internal") with a
    traceback there.
    """
    own = process_began()
    phases = Phases("engine process: Python", own)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = LINGER_MS
    socket.connect(endpoint)

    def send(message: wire.FromEngine) -> None:
        socket.send(wire.encode(message))

    def progress(phase: str) -> None:
        send(Progress(phase, time.monotonic() - began))

    lab: LabLike | None = None
    try:
        config = Config(**json.loads(config_json))
        phases.begin(LIBRARIES)
        progress(LIBRARIES)
        build: Callable[..., EngineLike] = _named(engine)
        lab = _named(LAB)() if config.lab else None
        phases.begin("engine")
        built = build(config, progress=progress)
        phases.begin("collecting garbage")
        gc.collect()
        gc.freeze()  # what start-up made stays; collections during serving need not walk it
        send(
            Ready(
                version=wire.VERSION,
                vocab_size=built.vocab_size,
                max_model_len=built.max_model_len,
                num_pages=built.num_pages,
                page_size=built.page_size,
                info={**built.info, "phases": whole_start(own - began, phases.end(), built.info.get("phases", {}))},
            )
        )
        if lab is not None:
            lab.open(built)
        _Loop(built, socket, send, lab).run()
        built.close()
        return 0
    except ConfigError as error:
        send(Fatal("config", str(error)))
        return 1
    except Exception as error:
        traceback.print_exc()
        send(Fatal("internal", f"{type(error).__name__}: {error}"))
        return 1
    finally:
        if lab is not None:
            lab.close()
        context.destroy(linger=LINGER_MS)


def _named(what: str) -> Any:
    """What MODULE:NAME stands for."""
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


def whole_start(front_end_s: float, process: dict[str, float], engine: dict[str, float]) -> dict[str, float]:
    """The phases from the first process on, with seconds: the engine's own stand where the process just had it built.

    `process` has a phase "engine", of which `engine` may leave a part untold; that is named too.
    """
    parts: dict[str, float] = {"front end: flags, model files, port": max(0.0, front_end_s)}
    for name, seconds in process.items():
        if name == "engine":
            parts |= engine
            parts["engine: all else"] = max(0.0, seconds - sum(engine.values()))
        else:
            parts[name] = seconds
    return parts


class _Loop:
    """Messages in, one step, messages out. One message carries all events of a step."""

    def __init__(
        self, engine: EngineLike, socket: zmq.Socket, send: Callable[[wire.FromEngine], None], lab: LabLike | None
    ):
        self.engine = engine
        self.lab = lab
        self.socket = socket
        self.send = send
        self.open: set[str] = set()  # submitted, no finish_reason yet
        self.events: list[TokenEvent] = []  # to be sent
        self.deadline: float | None = None  # when a shutdown stops waiting
        self.num_bad_frames = 0

    def run(self) -> None:
        """Serve until a Shutdown was carried out."""
        engine, lab, last_sent = self.engine, self.lab, 0.0
        step = engine.step if lab is None else lab.step
        while True:
            if lab is not None and (news := lab.turn()):
                self.send(news)
            at_once = engine.busy() or engine.idle()
            wait_s = 0.0 if at_once else max(0.0, last_sent + HEARTBEAT_S - time.monotonic())
            if self.socket.poll(0 if at_once else int(wait_s * 1000) + 1):
                self.receive()
            if engine.busy():
                self.events += step()
            if self.events:
                self.open.difference_update(e.id for e in self.events if e.finish_reason is not None)
                self.send(Events(self.events, engine.stats()))
                self.events = []
                last_sent = time.monotonic()
            elif time.monotonic() - last_sent >= HEARTBEAT_S:
                self.send(Heartbeat(engine.stats()))
                last_sent = time.monotonic()
            if self.deadline is not None and self.shut_down():
                return

    def receive(self) -> None:
        """Take every message that waits."""
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = wire.decode_to_engine(frame)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                self.num_bad_frames += 1
                if self.num_bad_frames & (self.num_bad_frames - 1) == 0:  # 1, 2, 4, 8, ...: no flood
                    print(f"engine: dropped {self.num_bad_frames} bad frames; last: {error}", file=sys.stderr)
                continue
            if isinstance(message, GenerateRequest):
                self.submit(message)
            elif isinstance(message, Abort):
                for id in message.ids:
                    self.engine.abort(id)
            else:
                self.begin_shutdown(message)

    def submit(self, request: GenerateRequest) -> None:
        if request.id in self.open:
            return  # a front end never repeats an id; a second one would mix two requests' tokens
        try:
            if self.deadline is not None:
                raise QueueFullError("The server is shutting down.")
            self.engine.submit(request)
            self.open.add(request.id)
        except RequestError as error:
            self.refuse(request.id, error, "request", error.param)
        except QueueFullError as error:
            self.refuse(request.id, error, "queue_full", None)

    def refuse(self, id: str, error: NanoDeployError, kind: str, param: str | None) -> None:
        event = TokenEvent(id=id, finish_reason="error", error=str(error), error_kind=kind, error_param=param)
        self.events.append(event)

    def begin_shutdown(self, message: Shutdown) -> None:
        self.deadline = time.monotonic() + message.drain_s

    def shut_down(self) -> bool:
        """Whether everything has ended. Past the deadline what still runs is aborted, once."""
        assert self.deadline is not None
        if time.monotonic() >= self.deadline:
            for id in self.open:
                self.engine.abort(id)
            self.deadline = float("inf")
        return not self.engine.busy() and not self.events


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends, even while a GPU call holds the interpreter."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call above
        os._exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, endpoint_, parent_, engine_, began_ = sys.argv
    die_with(int(parent_))
    sys.exit(main(sys.stdin.read(), endpoint_, engine_, float(began_)))
