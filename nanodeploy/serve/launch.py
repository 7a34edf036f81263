"""The listening socket and the engine process: what a server takes hold of before it loads anything."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Self

from nanodeploy.config import Config
from nanodeploy.errors import ConfigError
from nanodeploy.phases import process_began

MAX_SOCKET_PATH = 100  # sun_path holds 108 bytes


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises ConfigError if the address cannot be had.

    A name with several addresses (localhost) means its IPv4 one.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}. Try another --port.") from error
    listener.setblocking(False)
    return listener


class EngineProcess:
    """The engine as a child in its own process group, and the private endpoint it connects to.

    Ctrl-C in a terminal does not reach the child: the parent decides. The child dies with its parent. As a context,
    it leaves neither processes nor files behind.
    """

    def __init__(self, config: Config, engine: str):
        """Start the engine process; `engine` is module:Class."""
        self.directory = tempfile.mkdtemp(prefix="nanodeploy-")  # only this user may enter
        self.endpoint = f"ipc://{self.directory}/engine"
        if len(self.endpoint) > MAX_SOCKET_PATH:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise ConfigError(f"the temporary directory {tempfile.gettempdir()} has too long a name for a socket.")
        self.began = process_began()  # of the whole start, by time.monotonic()
        own = [self.endpoint, str(os.getpid()), engine, str(self.began)]
        command = [sys.executable, "-m", "nanodeploy.runtime.process", *own]
        try:
            self.popen = subprocess.Popen(command, stdin=subprocess.PIPE, process_group=0)
        except OSError as error:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise ConfigError(f"cannot start the engine process: {error}.") from error
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; whoever waits for it will say so
            self.popen.stdin.write(json.dumps(config.to_dict()).encode())
            self.popen.stdin.close()

    def unlink(self) -> None:
        """Remove the socket's file. Once both sides are connected nobody needs it, and a kill -9 leaves nothing."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> None:
        """End the engine and every process it started, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.kill()
        self.unlink()
