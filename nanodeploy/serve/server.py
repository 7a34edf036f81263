"""From a config to a server that runs until told to stop: start-up, the ready message, signals, draining."""

import asyncio
import contextlib
import json
import logging
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvicorn

from nanodeploy.catalog import ModelFiles
from nanodeploy.config import Config
from nanodeploy.errors import ConfigError
from nanodeploy.phases import table
from nanodeploy.serve.app import Server
from nanodeploy.serve.client import EngineClient
from nanodeploy.serve.http import HttpProtocol
from nanodeploy.serve.launch import EngineProcess
from nanodeploy.serve.metrics import Latencies

REPORT_PERIOD_S = 10.0
DEAD_ENGINE_GRACE_S = 2.0  # after the engine died, so that every request hears it and a probe sees the 503
FLUSH_S = 5  # what replies may take to leave once the drain is over
ENGINE_EXIT_S = 5.0
log = logging.getLogger(__name__)


def run(config: Config, files: ModelFiles, listener: socket.socket, process: EngineProcess) -> int:
    """Serve until a signal comes or the engine ends; returns the exit code. Raises ConfigError if it cannot start.

    The port is open at once; /health says 503 until the model is ready.
    """
    logging.basicConfig(level=config.log_level.upper(), stream=sys.stderr, format="%(levelname)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    loop_factory = uvicorn.Config(app="", loop="auto").get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(_Life(config, files, listener, process).live())


class _Uvicorn(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the signals are ours


class _Life:
    def __init__(self, config: Config, files: ModelFiles, listener: socket.socket, process: EngineProcess):
        self.config = config
        self.files = files
        self.listener = listener
        self.process = process
        self.num_signals = 0
        self.last_signal = 0

    async def live(self) -> int:
        self.stop, self.force = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self.on_signal, number)
        latencies = Latencies()
        self.client = EngineClient(self.config, self.process, latencies)
        self.client.on_progress = self.say_phase
        self.say_phase(self.client.phase)
        with (
            contextlib.closing(self.client),
            contextlib.closing(Server(self.config, self.files, self.client, latencies)) as self.server,
        ):
            self.http = _Uvicorn(
                uvicorn.Config(
                    self.server.app(),
                    http=HttpProtocol,
                    ws="none",
                    lifespan="off",
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    timeout_keep_alive=60,
                    timeout_graceful_shutdown=FLUSH_S,
                )
            )
            logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
            serving = asyncio.create_task(self.http.serve(sockets=[self.listener]))
            await _first(self.client.started, self.stop)
            if not self.stop.is_set() and not self.client.ended.is_set():
                self.say_ready()
                reporter = asyncio.create_task(self.report())
                await _first(self.client.ended, self.stop)
                reporter.cancel()
            code = await self.leave()
            await serving
            return code

    def on_signal(self, number: int) -> None:
        """The first asks to drain, the second ends it at once."""
        self.num_signals += 1
        self.last_signal = number
        self.stop.set()
        if self.num_signals > 1:
            self.force.set()

    async def leave(self) -> int:
        """Drain if there is something to drain, stop the engine, stop listening; the exit code."""
        if self.client.ended.is_set():
            return await self.mourn()
        self.client.draining = True
        if self.client.generations:
            self.say(
                f"finishing {len(self.client.generations)} requests, for at most {self.config.shutdown_timeout:g} s; "
                "again to end now"
            )
            deadline = time.monotonic() + self.config.shutdown_timeout
            while self.client.generations and not self.force.is_set() and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
            self.client.fail_all("shutdown", "The server is shutting down.")
        if self.force.is_set() or self.client.info is None:
            self.process.kill()
        else:
            self.client.shut_down()
        self.http.should_exit = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ENGINE_EXIT_S):
                await _first(self.client.ended, self.force)
        if self.force.is_set():
            self.http.force_exit = True
            return 128 + self.last_signal
        return 0

    async def mourn(self) -> int:
        """The engine ended by itself: an operator's mistake is his one line, anything else an error in the log."""
        fatal = self.client.fatal
        if fatal is None or fatal.kind != "config":
            log.error("%s", self.client.last_words())
        if self.client.info is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DEAD_ENGINE_GRACE_S):
                    await self.stop.wait()
        self.http.should_exit = True
        if fatal is not None and fatal.kind == "config":
            raise ConfigError(fatal.message)
        return 1

    async def report(self) -> None:
        """A line every ten seconds in which something was done."""
        before, then = self.client.stats, time.monotonic()
        while True:
            await asyncio.sleep(REPORT_PERIOD_S)
            stats, now = self.client.stats, time.monotonic()
            if stats.num_steps != before.num_steps:
                seconds = now - then
                looked_up = stats.prefix_queries - before.prefix_queries
                used = 1 - stats.num_free_pages / stats.num_pages if stats.num_pages else 0.0
                self.say(
                    f"prompt {(stats.prompt_tokens - before.prompt_tokens) / seconds:.0f} tok/s, "
                    f"output {(stats.generation_tokens - before.generation_tokens) / seconds:.0f} tok/s, "
                    f"{stats.num_running} running, {stats.num_waiting} waiting, cache {used:.1%} in use, "
                    f"prefix hits {(stats.prefix_hits - before.prefix_hits) / max(looked_up, 1):.1%}"
                )
            before, then = stats, now

    def say(self, text: str) -> None:
        if self.config.log_level in ("debug", "info"):
            with contextlib.suppress(OSError):  # a full disk or a reader that left must not end the server
                print(text, flush=True)

    def say_phase(self, phase: str) -> None:
        self.say(f"[{time.monotonic() - self.process.began:6.1f} s] {phase}")

    def say_ready(self) -> None:
        ready = self.client.info
        assert ready is not None
        host, port = self.listener.getsockname()[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        name = self.config.public_name
        for line in table(ready.info["phases"], time.monotonic() - self.process.began, "from process start to ready"):
            self.say(line)
        self.say(
            f"{name} at {url}: {ready.num_pages * ready.page_size:,} tokens of KV cache "
            f"({ready.num_pages:,} pages of {ready.page_size}), longest request {ready.max_model_len:,} tokens\n"
            f"  {self.curl(url)}"
        )

    def curl(self, url: str) -> str:
        """A line to paste that this model answers."""
        body: dict[str, Any] = {"model": self.config.public_name}
        if self.server.template is not None:
            path, body["messages"] = "chat/completions", [{"role": "user", "content": "1+1=?"}]
        else:
            path, body["prompt"] = "completions", "1+1=" if self.server.tokenizer else [1, 2, 3]
        text = shlex.quote(json.dumps(body))
        return f"curl {url}/v1/{path} -H 'Content-Type: application/json' -d {text}"


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of the events is set."""
    tasks = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
