"""Servers for the tests: one that many share, and as many of their own as they start."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from serving import PATIENCE_S, ServerProcess, eventually, idle, make_tokenizer
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory for the fake engine: everything but weights."""
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer(directory)
    eos = Tokenizer.from_file(str(directory / "tokenizer.json")).token_to_id("<|im_end|>")
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 600, "eos_token_id": eos}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "top_k": 20}))
    return directory


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers; whatever still runs is killed at the end."""
    servers: list[ServerProcess] = []

    def start_one(*flags: str, **options) -> ServerProcess:
        servers.append(ServerProcess(*flags, **options))
        return servers[-1]

    yield start_one
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server that many tests share; each leaves it working."""
    running = ServerProcess(str(model), "--served-model-name", "fake", "--max_num_waiting", "200")
    try:
        yield running.started()
        assert running.popen.poll() is None, running.errors
    finally:
        running.kill()


@pytest.fixture
def client(server: ServerProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=PATIENCE_S)


@pytest.fixture
def healthy(server: ServerProcess) -> Iterator[ServerProcess]:
    """Whatever a test does, afterwards a request is answered as ever, nothing runs, and the engine is the same."""
    pid = server.engine_pid()
    yield server
    body = {"model": "fake", "prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True}
    reply = server.post("/v1/completions", body)
    assert reply.status_code == 200 and reply.json()["choices"][0]["token_ids"] == [5, 6, 7, 5]
    assert eventually(lambda: "nanodeploy:num_requests_running{" in (m := server.get("/metrics").text) and idle(m))
    assert server.engine_pid() == pid
    assert server.get("/health").status_code == 200
