"""Limits that take long in a real server, with their constants shortened: silence, stuck readers, keep-alives."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import uvicorn
from serving import PATIENCE_S, eventually

from nanodeploy.serve import app, http
from nanodeploy.serve.app import _frames
from nanodeploy.serve.openai import KEEP_ALIVE


class Served:
    """An ASGI application behind our HTTP protocol, in a thread."""

    def __init__(self, application: Callable):
        self.listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(application, http=http.HttpProtocol, ws="none", lifespan="off", log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE_S)
        connection.connect(self.listener.getsockname())
        return connection

    def stop(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(PATIENCE_S)


class Endless:
    """Streams for ever, and knows whether somebody still listens."""

    def __init__(self) -> None:
        self.left = threading.Event()
        self.num_bytes = 65536  # of each piece

    async def __call__(self, scope, receive, send) -> None:
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        while not gone.done():
            await send({"type": "http.response.body", "body": b"x" * self.num_bytes, "more_body": True})
            await asyncio.sleep(0)
        self.left.set()


@pytest.fixture
def endless() -> Endless:
    return Endless()


@pytest.fixture
def served(endless: Endless) -> Iterator[Served]:
    running = Served(endless)
    yield running
    running.stop()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nx: y"])
def test_headers_that_do_not_come_end_the_connection(
    served: Served, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http, "HEADER_TIMEOUT_S", 0.3)
    with served.connect() as connection:
        began = time.monotonic()
        connection.sendall(sent)
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert 0.2 < time.monotonic() - began < 5


def test_a_trickle_of_headers_does_not_buy_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADER_TIMEOUT_S", 0.4)
    with served.connect() as connection:
        connection.settimeout(0.05)
        connection.sendall(b"GET / HTTP/1.1\r\n")
        reply = b""
        for i in range(100):
            try:
                connection.sendall(b"x%d: y\r\n" % i)
                reply = connection.recv(1000)
                break
            except TimeoutError:
                continue
        assert reply.startswith(b"HTTP/1.1 408 ") and i < 50


def test_a_reader_that_is_stuck_is_cut_off(served: Served, endless: Endless, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "STUCK_WRITE_S", 0.3)
    with served.connect(4096) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert endless.left.wait(10)


def test_a_slow_reader_is_not_cut_off(served: Served, endless: Endless, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "STUCK_WRITE_S", 0.5)
    endless.num_bytes = 16 << 20  # takes three seconds to read
    with served.connect(64 << 10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        until = time.monotonic() + 2
        while time.monotonic() < until:
            assert connection.recv(64 << 10)
            time.sleep(0.01)
        assert not endless.left.is_set()
    assert eventually(endless.left.is_set, 5)


class Silent:
    """A generation whose engine says nothing twice, then ends."""

    def __init__(self) -> None:
        self.num_waits = 0

    async def wait(self, timeout_s: float) -> bool:
        self.num_waits += 1
        return self.num_waits > 2

    def take(self) -> list:
        return []


class Finished:
    num_open = 1

    def last_chunks(self) -> bytes:
        return b"end"


def test_a_silent_engine_is_bridged_by_comments() -> None:
    async def collect(frames: AsyncIterator[bytes]) -> list[bytes]:
        answer = Finished()
        found = []
        async for frame in _frames(Silent(), answer):  # type: ignore[arg-type]
            found.append(frame)
            answer.num_open = 0 if len(found) == 2 else 1
        return found

    assert asyncio.run(collect(iter(()))) == [KEEP_ALIVE, KEEP_ALIVE, b"end"]  # type: ignore[arg-type]
    assert KEEP_ALIVE.startswith(b":") and KEEP_ALIVE.endswith(b"\n\n") and app.KEEP_ALIVE_S <= 30
