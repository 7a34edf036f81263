"""The engine process on its socket: typed frames in and out, heartbeats, shutdown, and how it dies."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq
from serving import PATIENCE_S, ROOT, eventually, is_alive

from nanodeploy import wire
from nanodeploy.config import Config
from nanodeploy.runtime.process import whole_start
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import Abort, Events, Fatal, GenerateRequest, Heartbeat, Progress, Ready, Shutdown, TokenEvent

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}


class Peer:
    """The front end's side of the socket."""

    def __init__(self, directory: Path, model: Path, **settings):
        endpoint = f"ipc://{directory}/s"
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.bind(endpoint)
        command = [sys.executable, "-m", "nanodeploy.runtime.process", endpoint, str(os.getpid())]
        self.popen = subprocess.Popen(
            [*command, "fake_engine:FakeEngine", str(time.monotonic())],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=ENV,
        )
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(Config(model=str(model), **settings).to_dict()).encode())
        self.popen.stdin.close()

    def send(self, message) -> None:
        self.socket.send(message if isinstance(message, bytes) else wire.encode(message))

    def receive(self):
        assert self.socket.poll(PATIENCE_S * 1000), "nothing came"
        return wire.decode_from_engine(self.socket.recv())

    def until(self, kind: type):
        while not isinstance(message := self.receive(), kind):
            pass
        return message

    def events(self, count: int) -> list[TokenEvent]:
        """At least `count` events."""
        found: list[TokenEvent] = []
        while len(found) < count:
            found += self.until(Events).events
        return found

    def close(self) -> None:
        self.popen.kill()
        self.popen.wait()
        self.context.destroy(linger=0)


@pytest.fixture
def connect(tmp_path: Path, model: Path) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def one(**settings) -> Peer:
        peers.append(Peer(tmp_path, model, **settings))
        return peers[-1]

    yield one
    for peer in peers:
        peer.close()


@pytest.fixture
def peer(connect: Callable[..., Peer]) -> Peer:
    peer = connect()
    assert peer.until(Ready).version == wire.VERSION
    return peer


def request(id: str, salt: str = "", **params) -> GenerateRequest:
    return GenerateRequest(id, [5, 6, 7], SamplingParams(**{"max_tokens": 4, **params}), salt)


def golden(peer: Peer, id: str = "golden") -> None:
    """A request that must be answered as ever."""
    peer.send(request(id))
    events = [e for e in peer.events(4) if e.id == id]
    assert [t for e in events for t in e.token_ids] == [5, 6, 7, 5]
    assert [e.finish_reason for e in events] == [None, None, None, "length"]


def test_start_up_tells_its_phases_and_then_itself(connect: Callable[..., Peer]) -> None:
    peer = connect(max_model_len=99)
    first, second, ready = peer.receive(), peer.receive(), peer.receive()
    assert isinstance(first, Progress) and isinstance(second, Progress) and second.phase == "pretending to load"
    assert isinstance(ready, Ready) and ready.max_model_len == 99 and ready.info["device"] == "fake"
    phases = ready.info["phases"]
    assert first.phase in phases and "front end: flags, model files, port" in phases
    assert sum(phases.values()) == pytest.approx(second.elapsed_s, abs=1), "it began when the peer said"


def test_the_whole_start_has_the_engines_phases_in_the_place_of_the_engine() -> None:
    whole = whole_start(0.5, {"python": 1.0, "engine": 4.0, "garbage": 0.25}, {"weights": 1.5, "warming up": 2.0})
    assert list(whole.items()) == [
        ("front end: flags, model files, port", 0.5), ("python", 1.0), ("weights", 1.5), ("warming up", 2.0),
        ("engine: all else", 0.5), ("garbage", 0.25),
    ]  # fmt: skip


def test_one_message_per_step_carries_every_request(peer: Peer) -> None:
    for i in range(20):
        peer.send(request(str(i), salt="delay=0.02"))
    deadline = time.monotonic() + PATIENCE_S
    while len(peer.until(Events).events) < 20:
        assert time.monotonic() < deadline


def test_it_gives_signs_of_life_when_idle(peer: Peer) -> None:
    began = time.monotonic()
    uptimes = [peer.until(Heartbeat).stats.uptime_s for _ in range(4)]
    assert time.monotonic() - began < 6
    assert uptimes == sorted(set(uptimes))


def test_an_abort_ends_a_request_once(peer: Peer) -> None:
    peer.send(request("a", salt="delay=0.01", max_tokens=100000))
    peer.events(2)
    peer.send(Abort(["a", "unknown"]))
    while not (last := peer.events(1)[-1]).finish_reason:
        pass
    assert (last.id, last.finish_reason) == ("a", "abort")
    assert peer.until(Heartbeat).stats.num_running == 0


@pytest.mark.parametrize(
    "bad",
    [request("r", salt="refuse"), request("r", top_p=2.0), request("r", stop_token_ids=[10**6]), request("r", n=0)],
    ids=["refused", "range", "vocabulary", "n"],
)
def test_a_bad_request_is_an_event_of_its_own(peer: Peer, bad: GenerateRequest) -> None:
    peer.send(bad)
    (event,) = peer.events(1)
    assert (event.id, event.finish_reason, event.error_kind) == ("r", "error", "request") and event.error
    golden(peer)


def test_a_full_queue_is_told_apart(peer: Peer) -> None:
    peer.send(request("f", salt="full"))
    assert peer.events(1)[0].error_kind == "queue_full"


def test_a_repeated_id_does_not_mix_two_requests(peer: Peer) -> None:
    peer.send(request("a", salt="delay=0.01"))
    peer.send(GenerateRequest("a", [9, 9], SamplingParams(max_tokens=4)))
    assert [t for e in peer.events(4) for t in e.token_ids] == [5, 6, 7, 5]


class Bomb:
    def __reduce__(self):
        return os._exit, (66,)


def hostile_frames() -> list[bytes]:
    rng = random.Random(0)
    good = wire.encode(request("x"))
    frames = [b"", b"\xc1", pickle.dumps(Bomb()), json.dumps({"type": "generate"}).encode()]
    frames += [good[:i] for i in range(0, len(good), 7)]
    frames += [msgspec.msgpack.encode(value) for value in (None, 5, [1], {"type": "exec"}, {"type": "generate"})]
    frames += [
        msgspec.msgpack.encode({"type": "generate", "id": "x", "prompt_token_ids": ["a"], "params": {}}),
        msgspec.msgpack.encode({"type": "generate", "id": 5, "prompt_token_ids": [1], "params": {}}),
        msgspec.msgpack.encode(
            {"type": "generate", "id": "x", "prompt_token_ids": [2**70 // 2**7], "params": {"n": 1.5}}
        ),
        msgspec.msgpack.encode({"type": "abort", "ids": "all"}),
        msgspec.msgpack.encode({"type": "shutdown", "drain_s": "now"}),
        msgspec.msgpack.encode(msgspec.msgpack.Ext(1, pickle.dumps(Bomb()))),
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x81\xa4type\xa5\xff\xfe\xfd\xfc\xfb",
    ]
    return frames + [rng.randbytes(rng.randrange(1, 200)) for _ in range(500)]


def test_hostile_frames_never_become_anything(peer: Peer) -> None:
    for frame in hostile_frames():
        peer.send(frame)
    golden(peer)
    assert peer.popen.poll() is None


def test_ctrl_c_is_the_parents_business(peer: Peer) -> None:
    peer.popen.send_signal(signal.SIGINT)
    golden(peer)


def test_shutdown_finishes_what_runs(peer: Peer) -> None:
    peer.send(request("a", salt="delay=0.05"))
    peer.send(Shutdown(PATIENCE_S))
    peer.send(request("late"))
    reasons = {e.id: e.finish_reason for e in peer.events(5) if e.finish_reason}
    assert reasons == {"a": "length", "late": "error"}
    assert peer.popen.wait(PATIENCE_S) == 0


def test_shutdown_aborts_what_is_not_done_in_time(peer: Peer) -> None:
    peer.send(request("a", salt="delay=0.01", max_tokens=100000))
    peer.events(2)
    peer.send(Shutdown(0.1))
    assert peer.popen.wait(PATIENCE_S) == 0
    while not (last := peer.events(1)[-1]).finish_reason:
        pass
    assert last.finish_reason == "abort"


@pytest.mark.parametrize(
    ("start", "kind", "words", "is_quiet"),
    [("config_error", "config", "truncated", True), ("crash", "internal", "ZeroDivisionError: on purpose", False)],
)
def test_a_failed_start_says_whose_fault_it_was(
    connect: Callable[..., Peer], start: str, kind: str, words: str, is_quiet: bool
) -> None:
    peer = connect(kernels=f"start={start}")
    fatal = peer.until(Fatal)
    assert fatal.kind == kind and words in fatal.message
    assert peer.popen.wait(PATIENCE_S) == 1
    assert (peer.popen.stderr.read() == b"") == is_quiet


def test_a_crash_in_a_step_is_told_and_ends_it(peer: Peer) -> None:
    peer.send(request("a", salt="crash"))
    assert peer.until(Fatal) == Fatal("internal", "ZeroDivisionError: crash on purpose")
    assert peer.popen.wait(PATIENCE_S) == 1
    assert b"Traceback" in peer.popen.stderr.read()


def test_it_dies_with_its_parent(tmp_path: Path, model: Path) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'nanodeploy.runtime.process', sys.argv[1], str(os.getpid()),"
        " 'fake_engine:FakeEngine', str(time.monotonic())], stdin=subprocess.PIPE)\n"
        "child.stdin.write(sys.argv[2].encode()); child.stdin.close(); print(child.pid, flush=True); time.sleep(60)"
    )
    config = json.dumps(Config(model=str(model)).to_dict())
    endpoint = f"ipc://{tmp_path}/s"
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.bind(endpoint)
        parent = subprocess.Popen([sys.executable, "-c", code, endpoint, config], stdout=subprocess.PIPE, env=ENV)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert socket.poll(PATIENCE_S * 1000), "it is up and running"
        assert is_alive(pid)
        parent.kill()
        parent.wait()
        assert eventually(lambda: not is_alive(pid), 3)
