"""Grammars are tried in processes of their own: one that takes too long, or too much, is its user's error only."""

import contextlib
import json
import os
import queue
import select
import struct
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanodeploy.errors import ConfigError, QueueFullError, RequestError
from nanodeploy.serve.grammar import GrammarText

TIMEOUT_S = 2.0  # of one grammar
START_S = 60.0  # of a process, with the vocabulary
WAIT_S = 10.0  # for a process that is free
MAX_REMEMBERED = 256


class GrammarChecker:
    """Says what the engine is to compile, or raises. Thread-safe; call it off the event loop."""

    def __init__(
        self,
        tokenizer_json: Path,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        *,
        timeout_s: float = TIMEOUT_S,
        num_processes: int = 2,
    ):
        """Starts nothing: the first check does."""
        command = [str(tokenizer_json), str(vocab_size), str(timeout_s), *map(str, eos_token_ids)]
        self._timeout_s = timeout_s
        self._all = [_Process(command) for _ in range(num_processes)]
        self._free: queue.LifoQueue[_Process] = queue.LifoQueue()
        for process in self._all:
            self._free.put(process)
        self._lock = threading.Lock()
        self._remembered: OrderedDict[tuple[str, str | None], dict[str, str]] = OrderedDict()

    def check(self, grammar: GrammarText) -> str:
        """The text for nanodeploy.matcher.Grammar. Raises RequestError, QueueFullError, or ConfigError.

        The last if the tokenizer cannot be used. An answer is remembered, unless it was that time ran out.
        """
        key = (grammar.text, grammar.user)
        with self._lock:
            reply = self._remembered.get(key)
            if reply is not None:
                self._remembered.move_to_end(key)
        if reply is None:
            try:
                reply = self._ask({"text": grammar.text, "user": grammar.user})
            except TimeoutError:
                message = f"{grammar.param}: the grammar takes over {self._timeout_s:g} s to compile."
                raise RequestError(message, param=grammar.param) from None
            with self._lock:
                self._remembered[key] = reply
                while len(self._remembered) > MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        if "error" in reply:
            message = f"{grammar.param}: the grammar cannot be used: {reply['error']}"
            raise RequestError(message, param=grammar.param)
        return reply["text"]

    def close(self) -> None:
        for process in self._all:
            process.kill()

    def _ask(self, request: dict[str, Any]) -> dict[str, str]:
        try:
            process = self._free.get(timeout=WAIT_S)
        except queue.Empty:
            raise QueueFullError("Too many grammars are being compiled.") from None
        try:
            process.start()
            return process.ask(request, self._timeout_s)
        finally:
            self._free.put(process)


class _Process:
    def __init__(self, arguments: Sequence[str]):
        self._command = [sys.executable, "-m", "nanodeploy.serve.grammar_worker", *arguments]
        self._popen: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises ConfigError."""
        if self._popen is not None and self._popen.poll() is None:
            return
        self.kill()
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        greeting = self._read(START_S)
        if greeting is None or "error" in greeting:
            self.kill()
            raise ConfigError((greeting or {}).get("error", "The process that compiles grammars does not start."))

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, str]:
        """Raises TimeoutError; the process is gone then."""
        assert self._popen is not None and self._popen.stdin is not None
        body = json.dumps(request).encode()
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.write(struct.pack("<I", len(body)) + body)
            self._popen.stdin.flush()
        began = time.monotonic()
        reply = self._read(timeout_s)
        if reply is not None:
            return reply
        self.kill()
        if time.monotonic() - began >= timeout_s:
            raise TimeoutError
        return {"error": "it is too deep or too large."}  # the process ended over it

    def kill(self) -> None:
        if self._popen is not None:
            self._popen.kill()
            self._popen.communicate()  # closes the pipes, and reaps
            self._popen = None

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """A frame, read within the time; None if there is none."""
        assert self._popen is not None and self._popen.stdout is not None
        handle = self._popen.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        data = b""
        while len(data) < 4 or len(data) < 4 + struct.unpack("<I", data[:4])[0]:
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(handle, 1 << 16) if ready else b""
            if not piece:
                return None
            data += piece
        return json.loads(data[4:])
