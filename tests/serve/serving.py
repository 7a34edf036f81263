"""Servers as subprocesses on free loopback ports, with a fake engine and a tiny tokenizer of their own."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0  # how long anything may take on a busy machine
TEXT = [
    "The quick brown fox jumps over the lazy dog. 1+1=2, 2+2=4.",
    "Grüße aus Köln: €5, 😀 and 日本語 text. def f(x): return x + 1",
    "user assistant system hello world stop STOP stopping",
]
TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'tool' and not message.tool_call_id %}
{{- raise_exception('a tool message needs an id') }}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if enable_thinking is defined and enable_thinking %}{{- '<think>' }}{%- endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def make_tokenizer(directory: Path, kind: str = "byte_level") -> None:
    """tokenizer.json and tokenizer_config.json of a small BPE, as Qwen's (byte level) or as Llama 2's."""
    specials = [AddedToken(t, special=True) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet, vocab_size = pre_tokenizers.ByteLevel.alphabet(), 500
    else:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet, vocab_size = list("▁abcdefghijklmnopqrstuvwxyz.,=+012"), 500
        specials += [AddedToken(f"<0x{i:02X}>", special=False) for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=specials)
    tokenizer.train_from_iterator(TEXT * 3 if kind == "byte_level" else TEXT[:1] * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


class ServerProcess:
    """`nanodeploy serve` as a subprocess. Output is collected by threads, so that no pipe fills up."""

    def __init__(
        self,
        *flags: str,
        engine: str = "fake_engine:FakeEngine",
        stdout: IO | int = subprocess.PIPE,
        root: Path = ROOT,
    ):
        # Its TMPDIR, to see what it leaves behind. Not pytest's: the path of a socket in it has to be short.
        self._temporary = tempfile.TemporaryDirectory(prefix="nd-")
        self.temporary = Path(self._temporary.name)
        code = f"import sys; from nanodeploy import cli; sys.exit(cli.main(sys.argv[1:], engine={engine!r}))"
        path = os.pathsep.join([str(root), str(Path(__file__).parent)])
        self.popen = subprocess.Popen(
            [sys.executable, "-c", code, "serve", "--port", "0", *flags],
            cwd=root,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TMPDIR": self._temporary.name, "OMP_NUM_THREADS": "1"},
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        self._news: queue.Queue[str | None] = queue.Queue()
        for stream, keep in ((self.popen.stdout, self.lines), (self.popen.stderr, self.errors)):
            if stream is not None:
                threading.Thread(target=self._collect, args=(stream, keep), daemon=True).start()
        self.url = ""
        self.http = httpx.Client(timeout=PATIENCE_S, limits=httpx.Limits(max_connections=200))

    def _collect(self, stream, keep: list[str]) -> None:
        for line in stream:
            keep.append(line)
            if keep is self.lines:
                self._news.put(line)
        self._news.put(None)

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line on stdout."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            line = self._news.get(timeout=max(0.01, deadline - time.monotonic()))
            if line is None:
                raise AssertionError(f"it ended: {self.lines} {self.errors}")
            if match := re.search(pattern, line):
                return match

    def started(self) -> "ServerProcess":
        self.url = self.expect(r" at (http://\S+): ")[1]
        return self

    def wait(self) -> int:
        code = self.popen.wait(PATIENCE_S)
        time.sleep(0.1)  # for the collectors
        return code

    def engine_pid(self) -> int:
        """The engine: the child that is a group of its own."""
        found = [pid for pid in children(self.popen.pid) if os.getpgid(pid) == pid]
        assert len(found) == 1
        return found[0]

    def get(self, path: str) -> httpx.Response:
        return self.http.get(self.url + path)

    def post(self, path: str, body: object = None, **kwargs) -> httpx.Response:
        return self.http.post(self.url + path, json=body, **kwargs)

    def kill(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGKILL)
        self.http.close()
        self.popen.wait()


def children(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(status.parent.name))
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def eventually(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def idle(metrics: str) -> bool:
    return bool(re.search(r'num_requests_running\{model_name="fake"\} 0\.0', metrics))
