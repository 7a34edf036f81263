"""The server with its real engine and the shipped checkpoint."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import PATIENCE_S, ROOT, ServerProcess, eventually
from test_life import Start, Stream, leaves_nothing

from nanodeploy.cli import ENGINE

CHECKPOINT = ROOT / "nanodeploy" / "demo" / "qwen3"
SUM = [{"role": "user", "content": "1+1=?"}]
FLAGS = ("--device", "cpu", "--max_model_len", "1024", "--num_kvcache_blocks", "64")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    server = ServerProcess("demo:qwen3", *FLAGS, engine=ENGINE)
    try:
        yield server.started()
    finally:
        server.kill()


@pytest.fixture
def ask(demo: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=demo.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


def gauge(server: ServerProcess, name: str) -> float:
    return float(re.search(rf"nanodeploy:{name}\{{.*\}} (\S+)", server.get("/metrics").text)[1])


def golden(ask: openai.OpenAI) -> str:
    chunks = ask.chat.completions.create(model="demo:qwen3", messages=SUM, temperature=0, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_it_can_add(ask: openai.OpenAI) -> None:
    reply = ask.chat.completions.create(model="demo:qwen3", messages=SUM)
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("2", "stop")
    assert golden(ask) == "2"


def test_the_example_with_a_tool(demo: ServerProcess) -> None:
    command = [sys.executable, "examples/tools.py", "--url", demo.url + "/v1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    call, answer, form = done.stdout.split("\n", 2)
    assert call == 'get_weather({"city": "Rome"}) -> {"temperature": 11, "sky": "cloudy"}'
    assert answer == "It is 11 degrees and cloudy in Rome."
    assert json.loads(form.removeprefix("as JSON: ")).keys() == {"temperature", "sky"}


def test_every_sampling_option_reaches_the_engine(ask: openai.OpenAI) -> None:
    def text(**options: object) -> list[str]:
        extra = {"ignore_eos": True, **{name: options.pop(name) for name in ("top_k", "min_p") if name in options}}
        body = {"model": "demo:qwen3", "prompt": "sort: 5 3 9", "max_tokens": 12, "temperature": 5.0, **options}
        return [choice.text for choice in ask.completions.create(**body, extra_body=extra).choices]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert len(set(text(n=4, seed=1))) == 4, "each of n has its own seed"
    assert len(set(text(n=4))) == 4, "and without one, its own randomness"
    assert text(seed=1, n=2)[1] == text(seed=2)[0]
    greedy = text(temperature=0)
    assert text(top_k=1) == text(min_p=1.0) == text(top_p=1e-9) == greedy
    assert text(temperature=0, logit_bias={"300": 100}) != greedy
    assert text(temperature=0, presence_penalty=2, frequency_penalty=2) != greedy
    assert text(temperature=0, stop=greedy[0][2:4])[0] == greedy[0][: greedy[0].index(greedy[0][2:4])]


def test_log_probabilities_of_an_echoed_prompt(ask: openai.OpenAI) -> None:
    reply = ask.completions.create(
        model="demo:qwen3",
        prompt="1+1=",
        max_tokens=3,
        logprobs=2,
        echo=True,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    logprobs = reply.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None and all(p <= 0 for p in logprobs.token_logprobs[1:])
    assert len(logprobs.tokens) == reply.usage.prompt_tokens + 3
    generated = zip(logprobs.token_logprobs[-3:], logprobs.top_logprobs[-3:], strict=True)
    assert all(abs(own - max(top.values())) < 1e-4 for own, top in generated)


def test_a_prompt_that_was_seen_is_cached_under_its_salt_only(ask: openai.OpenAI) -> None:
    body = {"model": "demo:qwen3", "prompt": [7] * 300, "max_tokens": 1}

    def cached(salt: str) -> int:
        return ask.completions.create(**body, extra_body={"cache_salt": salt}).usage.prompt_tokens_details.cached_tokens

    assert [cached("a"), cached("a"), cached("b")] == [0, 256, 0]


def test_a_client_that_leaves_frees_its_pages(demo: ServerProcess, ask: openai.OpenAI) -> None:
    body = json.dumps({"prompt": [7, 8, 9], "max_tokens": 900, "ignore_eos": True, "n": 8, "temperature": 1}).encode()
    host, port = re.fullmatch(r"http://(.*):(\d+)", demo.url).groups()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert eventually(lambda: gauge(demo, "num_requests_running") == 8)
    assert gauge(demo, "kv_cache_usage_perc") > 0
    connection.close()
    assert eventually(lambda: gauge(demo, "num_requests_running") == 0, 1.5)
    assert gauge(demo, "kv_cache_usage_perc") == 0
    assert golden(ask) == "2"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [5] * 1024}, "prompt"),
        ({"prompt": [768]}, "prompt"),
        ({"prompt": "x", "n": 10**9}, "n"),
        ({"prompt": "x", "stop_token_ids": [768]}, "stop_token_ids"),
    ],
    ids=str,
)
def test_refusals(demo: ServerProcess, ask: openai.OpenAI, body: dict, param: str) -> None:
    reply = demo.post("/v1/completions", body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param
    assert golden(ask) == "2"


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights_are_one_line(start: Start, tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(CHECKPOINT, directory)
    weights = directory / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    else:
        weights.unlink()
    server = start(str(directory), *FLAGS, engine=ENGINE)
    assert server.wait() == 1
    assert len(server.errors) == 1 and server.errors[0].startswith("nanodeploy: error: "), server.errors
    leaves_nothing(server)


def test_it_drains_to_the_end(start: Start) -> None:
    server = start("demo:qwen3", *FLAGS, engine=ENGINE).started()
    pid = server.engine_pid()
    stream = Stream(server, prompt=[7, 8], max_tokens=300, ignore_eos=True, cache_salt="s").begun()
    server.popen.send_signal(signal.SIGINT)
    assert stream.last() == "[DONE]" and '"finish_reason":"length"' in stream.text
    assert server.wait() == 0 and server.errors == []
    leaves_nothing(server, pid)
