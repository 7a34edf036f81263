"""/lab over HTTP, on a copy of the tree: what is saved beside a running server, and what is left when it ends."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from serving import ROOT, ServerProcess, children, eventually, is_alive

ENGINE = "nanodeploy.runtime.engine:Engine"
SLOW = "import time\n\ntime.sleep(60)\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources, where a test may save what it likes."""
    for name in ("nanodeploy", "bench"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    return tmp_path / "tree"


def serve(start: Callable[..., ServerProcess], tree: Path) -> ServerProcess:
    flags = ("demo:qwen3", "--lab", "--max_num_seqs", "4", "--num_kvcache_blocks", "16", "--max_model_len", "128")
    server = start(*flags, engine=ENGINE, root=tree).started()
    assert eventually(lambda: server.get("/lab").json() != {})
    return server


def ask(server: ServerProcess) -> None:
    reply = server.post("/v1/completions", {"prompt": [5, 6, 7], "max_tokens": 4})
    assert reply.status_code == 200


def test_without_the_flag_there_is_no_lab(server: ServerProcess) -> None:
    reply = server.get("/lab")
    assert reply.status_code == 404 and "--lab" in reply.json()["error"]["message"]


def test_without_bench_the_lab_is_refused_at_the_door(start: Callable[..., ServerProcess], tree: Path) -> None:
    shutil.rmtree(tree / "bench")
    server = start("demo:qwen3", "--lab", engine=ENGINE, root=tree)
    assert server.wait() == 1
    assert "source checkout" in server.errors[-1] and "Traceback" not in "".join(server.errors)


@pytest.mark.slow
def test_a_save_is_refused_with_its_reason_and_ending_in_a_gate_leaves_nothing(
    start: Callable[..., ServerProcess], tree: Path
) -> None:
    server = serve(start, tree)
    room = tree / "nanodeploy" / "ops" / "silu_mul"
    (room / "mine.py").write_text("def oops(\n")

    def history() -> list[dict]:
        return server.get("/lab").json()["ops"]["silu_mul"]["history"]

    assert eventually(lambda: bool(history()))
    assert history()[0]["outcome"] == "refused" and history()[0]["reason"] == "line 1: '(' was never closed"
    assert eventually(lambda: any("silu_mul/mine.py refused: line 1" in line for line in server.errors))
    ask(server)

    (room / "mine.py").write_text(SLOW)
    assert eventually(lambda: server.get("/lab").json()["gating"] == ["silu_mul/mine.py"])
    engine = server.engine_pid()
    assert eventually(lambda: bool(children(engine)))
    ask(server)
    processes = [engine, *children(engine)]
    server.popen.send_signal(signal.SIGINT)
    assert server.wait() == 0
    assert eventually(lambda: not any(map(is_alive, processes)))
    assert not list(server.temporary.iterdir())
