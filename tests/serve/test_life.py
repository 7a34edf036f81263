"""How a server starts, drains, and dies; and what it leaves behind: nothing."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from serving import PATIENCE_S, ServerProcess, eventually, is_alive

Start = Callable[..., ServerProcess]
SLOW = {"prompt": [5, 6], "max_tokens": 200, "cache_salt": "delay=0.02", "stream": True}


class Stream(threading.Thread):
    """A client that reads a stream to its end."""

    def __init__(self, server: ServerProcess, **body: object):
        super().__init__(daemon=True)
        self.server, self.body = server, {**SLOW, **body}
        self.status, self.text = 0, ""
        self.start()

    def run(self) -> None:
        try:
            with self.server.http.stream("POST", self.server.url + "/v1/completions", json=self.body) as reply:
                self.status = reply.status_code
                for piece in reply.iter_text():
                    self.text += piece
        except httpx.TransportError as error:
            self.text += f"cut off: {error}"

    def begun(self) -> "Stream":
        assert eventually(lambda: self.text.count("data: ") >= 3)
        return self

    def last(self) -> str:
        """The last event."""
        self.join(PATIENCE_S)
        assert not self.is_alive() and self.text.endswith("\n\n")
        return self.text.rstrip("\n").rpartition("\n\n")[2].removeprefix("data: ")


def leaves_nothing(server: ServerProcess, *pids: int) -> None:
    assert eventually(lambda: not any(map(is_alive, pids)), 5)
    assert eventually(lambda: not os.listdir(server.temporary), 5), os.listdir(server.temporary)


# ---------------------------------------------------------------- start


def test_start_up_tells_its_phases_and_a_line_that_works(start: Start, model: Path) -> None:
    server = start(str(model)).started()
    told = "".join(server.lines)
    assert "pretending to load" in told and "6,400 tokens of KV cache" in told and "longest request 256 tokens" in told
    seconds = [float(line.split(" s  ")[0]) for line in told.splitlines() if re.match(r" +\d+\.\d\d s  ", line)]
    assert len(seconds) > 3 and sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.05), told
    curl = server.expect("^ *curl .*")[0]
    reply = subprocess.run(f"{curl} -s", shell=True, capture_output=True, text=True, timeout=PATIENCE_S)
    assert json.loads(reply.stdout)["choices"][0]["message"]["content"] == "user\n1+1=?"
    assert not os.listdir(server.temporary), "the socket's file is gone once both sides are connected"
    assert server.errors == []


def test_while_it_loads_the_port_answers_503(start: Start, model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(str(model), "--port", str(port), "--kernels", "start=slow")
    server.expect("pretending to load")
    server.url = f"http://127.0.0.1:{port}"
    health = server.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "loading"
    assert health.json()["phase"] == "pretending to load"
    reply = server.post("/v1/completions", {"prompt": [5]})
    assert reply.status_code == 503 and reply.headers["retry-after"] and "loading" in reply.json()["error"]["message"]
    assert server.get("/v1/models").status_code == 200
    server.started()
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, "starting the engine"), (signal.SIGTERM, "pretending to load")]
)
def test_a_signal_while_it_loads_ends_it(start: Start, model: Path, number: int, moment: str) -> None:
    server = start(str(model), "--kernels", "start=slow")
    server.expect(moment)
    began = time.monotonic()
    server.popen.send_signal(number)
    assert server.wait() == 0 and time.monotonic() - began < 2
    assert server.errors == []
    leaves_nothing(server)


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        (["nowhere/at/all"], "There is no directory nowhere/at/all", 1),
        (["demo:qwen4"], "Did you mean demo:qwen3", 1),
        (["--max_model_length", "5"], "Did you mean --max_model_len?", 2),
        (["{model}", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1", 1),
        (["{model}", "--port", "{port}"], "cannot listen on 127.0.0.1 port {port}: Address already in use", 1),
        (["{model}", "--kernels", "start=config_error"], "model.safetensors is truncated: it ends after 10 bytes.", 1),
        (["{model}", "--tokenizer", "{empty}"], "there is no tokenizer.json", 1),
    ],
    ids=["no_directory", "no_demo", "flag", "host", "port", "engine", "tokenizer"],
)
def test_a_mistake_is_one_line(
    start: Start, model: Path, tmp_path: Path, flags: list[str], words: str, code: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        names = {"model": str(model), "port": taken.getsockname()[1], "empty": str(tmp_path)}
        server = start(*(flag.format(**names) for flag in flags))
        assert server.wait() == code
        assert len(server.errors) == 1 and words.format(**names) in server.errors[0], server.errors
    leaves_nothing(server)


def test_an_engine_that_crashes_at_start(start: Start, model: Path) -> None:
    server = start(str(model), "--kernels", "start=crash")
    assert server.wait() == 1
    assert "Traceback" in "".join(server.errors) and "ZeroDivisionError: on purpose" in server.errors[-1]
    silent = start(str(model), "--kernels", "start=die")
    assert silent.wait() == 1
    assert silent.errors == ["ERROR: The engine process ended with exit code 7.\n"]
    leaves_nothing(silent)


def test_a_full_disk_under_the_log_does_not_end_it(start: Start, model: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open("/dev/full", "w") as full:
        server = start(str(model), "--port", str(port), stdout=full)
        server.url = f"http://127.0.0.1:{port}"
        assert eventually(lambda: answers(server))
        assert server.post("/v1/completions", {"prompt": [5]}).status_code == 200


def answers(server: ServerProcess) -> bool:
    try:
        return server.get("/health").status_code == 200
    except httpx.TransportError:
        return False


# ---------------------------------------------------------------- drain


def test_a_drain_finishes_what_runs_and_refuses_what_comes(start: Start, model: Path) -> None:
    server = start(str(model)).started()
    pid = server.engine_pid()
    stream = Stream(server, max_tokens=60).begun()
    server.popen.send_signal(signal.SIGTERM)
    assert eventually(lambda: server.get("/health").status_code == 503)
    assert server.get("/health").json()["status"] == "draining"
    late = server.post("/v1/completions", {"prompt": [5]})
    assert late.status_code == 503 and late.headers["retry-after"] and "shutting down" in late.text
    assert stream.last() == "[DONE]" and '"finish_reason":"length"' in stream.text
    assert server.wait() == 0 and server.errors == []
    leaves_nothing(server, pid)


def test_a_drain_has_an_end(start: Start, model: Path) -> None:
    server = start(str(model), "--shutdown_timeout", "0.3").started()
    stream = Stream(server).begun()
    whole = Stream(server, stream=False)
    time.sleep(0.2)
    began = time.monotonic()
    server.popen.send_signal(signal.SIGTERM)
    assert "shutting down" in json.loads(stream.last())["error"]["message"]
    whole.join(PATIENCE_S)
    assert whole.status == 503 and "shutting down" in whole.text
    assert server.wait() == 0 and time.monotonic() - began < 3
    leaves_nothing(server)


def test_a_second_signal_ends_it_at_once(start: Start, model: Path) -> None:
    server = start(str(model)).started()
    pid = server.engine_pid()
    stream = Stream(server).begun()
    server.popen.send_signal(signal.SIGINT)
    server.expect("finishing 1 requests")
    began = time.monotonic()
    server.popen.send_signal(signal.SIGINT)
    assert server.wait() == 128 + signal.SIGINT and time.monotonic() - began < 2
    assert "error" in stream.last()
    leaves_nothing(server, pid)


def test_a_hung_engine_does_not_hold_up_the_end(start: Start, model: Path) -> None:
    server = start(str(model), "--shutdown_timeout", "0.2").started()
    pid = server.engine_pid()
    os.kill(pid, signal.SIGSTOP)
    server.popen.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    leaves_nothing(server, pid)


# ---------------------------------------------------------------- death


@pytest.mark.parametrize("how", ["kill -9", "crash in a step"])
def test_when_the_engine_dies_everybody_hears_it(start: Start, model: Path, how: str) -> None:
    server = start(str(model)).started()
    pid = server.engine_pid()
    streams = [Stream(server).begun() for _ in range(6)]
    whole = Stream(server, stream=False)
    time.sleep(0.1)
    if how == "kill -9":
        os.kill(pid, signal.SIGKILL)
    else:
        crash = server.post("/v1/completions", {"prompt": [5], "cache_salt": "crash"})
        assert crash.status_code == 503 and "crash on purpose" in crash.text
    for stream in streams:
        assert "The engine" in json.loads(stream.last())["error"]["message"]
    whole.join(PATIENCE_S)
    assert whole.status == 503
    health = server.get("/health")
    assert health.status_code == 503 and health.json()["status"] == "dead"
    assert server.post("/v1/completions", {"prompt": [5]}).status_code == 503
    assert server.wait() == 1
    assert "The engine" in server.errors[-1]
    leaves_nothing(server, pid)


def test_when_the_server_is_killed_the_engine_goes_too(start: Start, model: Path) -> None:
    server = start(str(model)).started()
    pid = server.engine_pid()
    Stream(server, cache_salt="delay=0.02")
    time.sleep(0.2)
    server.popen.kill()
    leaves_nothing(server, pid)


def test_a_hung_engine_is_unhealthy_until_it_is_back(start: Start, model: Path) -> None:
    server = start(str(model), "--heartbeat-timeout", "1").started()
    pid = server.engine_pid()
    stream = Stream(server, max_tokens=30).begun()
    os.kill(pid, signal.SIGSTOP)
    assert eventually(lambda: server.get("/health").status_code == 503, 4)
    assert server.get("/health").json()["status"] == "unresponsive"
    assert server.post("/v1/completions", {"prompt": [5]}).status_code == 503
    os.kill(pid, signal.SIGCONT)
    assert eventually(lambda: server.get("/health").status_code == 200, 4)
    assert stream.last() == "[DONE]"
    assert server.post("/v1/completions", {"prompt": [5]}).status_code == 200


def test_a_long_step_is_not_a_hang(start: Start, model: Path) -> None:
    server = start(str(model), "--heartbeat-timeout", "10").started()
    stream = Stream(server, cache_salt="hang=2", max_tokens=3)
    time.sleep(1)
    assert server.get("/health").status_code == 200
    assert stream.last() == "[DONE]"


# ---------------------------------------------------------------- models without text


def test_a_model_without_a_tokenizer_takes_token_ids(start: Start) -> None:
    server = start("demo:random-qwen3-0.6b").started()
    assert '"prompt": [1, 2, 3]' in server.expect("^ *curl .*")[0]
    reply = server.post("/v1/completions", {"prompt": "hello"})
    assert reply.status_code == 400 and "token ids" in reply.json()["error"]["message"]
    chat = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert chat.status_code == 400 and "no tokenizer" in chat.json()["error"]["message"]
    body = {"prompt": [7, 8], "max_tokens": 4, "logprobs": 1, "echo": True, "return_token_ids": True, "stop": "x"}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == "" and choice["token_ids"] == [7, 8, 7, 8]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in (7, 8, 7, 8, 7, 8)]
    streamed = server.post("/v1/completions", {**body, "stream": True}).text
    assert streamed.count("data: {") == 4, "one chunk per token, though the text is empty: clients time them"


def test_a_model_without_a_chat_template_completes(start: Start, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer_config.json").unlink()
    server = start(str(bare), "--served-model-name", "a/b").started()
    assert "/v1/completions" in server.expect("^ *curl .*")[0]
    chat = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert chat.status_code == 400 and "no chat template" in chat.json()["error"]["message"]
    assert server.get("/v1/models/a/b").json()["id"] == "a/b"


def test_a_broken_chat_template_is_one_line(start: Start, model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "chat_template.jinja").write_text("{% for %}")
    server = start(str(broken))
    assert server.wait() == 1 and len(server.errors) == 1 and "does not parse" in server.errors[0]
    leaves_nothing(server)


def test_running_out_of_file_descriptors_passes(start: Start, model: Path) -> None:
    server = start(str(model)).started()
    used = len(os.listdir(f"/proc/{server.popen.pid}/fd"))
    resource.prlimit(server.popen.pid, resource.RLIMIT_NOFILE, (used + 10, used + 10))
    address = httpx.URL(server.url)
    connections = [socket.create_connection((address.host, address.port), timeout=5) for _ in range(60)]
    time.sleep(0.5)
    for connection in connections:
        connection.close()
    assert eventually(lambda: answers(server))
    assert server.post("/v1/completions", {"prompt": [5]}).status_code == 200
