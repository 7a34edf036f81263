"""The benches' own arithmetic: the workload, the floors, idle time, the HTTP client and its report."""

import asyncio
import json
import math
import socket
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import header, offline, serve, startup
from nanodeploy.config import Config

H200 = types.SimpleNamespace(copy_bytes_per_s=4257e9, bf16_flops_per_s=767e12)


def test_the_workload_is_the_peers():
    """The totals that every published figure of W was measured on."""
    prompts, params = offline.workload(256, 10000)
    assert sum(map(len, prompts)) == 142_827
    assert sum(p.max_tokens for p in params) == 133_966
    assert all(100 <= len(p) <= 1024 for p in prompts) and all(100 <= p.max_tokens <= 1024 for p in params)
    assert all(p.ignore_eos and p.temperature == 0.6 for p in params)


def test_floors_of_qwen3_8b():
    """Against the figures worked out by hand for this shape: 15.1 GB of weights, 3.55 ms, 13.4 ms, 10.4 s."""
    work = offline.Work.of(Config(model="demo:random-qwen3-8b"), torch.bfloat16)
    assert work.weight_bytes == pytest.approx(15.1e9, rel=0.01)
    assert work.kv_token_bytes == 36 * 2 * 8 * 128 * 2
    assert work.decode_floor_s(1, 1000, H200) == pytest.approx(3.58e-3, rel=0.01)
    assert work.decode_floor_s(256, 1100, H200) == pytest.approx(13.4e-3, rel=0.02)
    prompts, params = offline.workload(256, 10000)
    floor_s = work.workload_floor_s([len(p) for p in prompts], [p.max_tokens for p in params], H200)
    assert floor_s == pytest.approx(10.4, rel=0.05)


def test_tied_models_read_their_embedding_once():
    work = offline.Work.of(Config(model="demo:random-qwen3-0.6b"), torch.bfloat16)
    assert work.weight_bytes == pytest.approx(2 * 0.596e9, rel=0.01)
    assert work.layer_flops + work.head_flops == pytest.approx(work.weight_bytes, rel=0.01)


def test_a_mixture_reads_the_experts_that_its_tokens_go_to():
    """Qwen3-30B-A3B: 3.3 billion parameters a token, 1.5 ms at batch 1 (all 30.5 billion would be 14)."""
    work = offline.Work.of(Config(model="demo:random-qwen3-30b-a3b"), torch.bfloat16)
    assert (work.weight_bytes + work.expert_bytes) / 2e9 == pytest.approx(30.5 - 0.31, rel=0.01)
    assert (work.layer_flops + work.head_flops) / 2e9 == pytest.approx(3.35 - 0.31, rel=0.01)
    assert work.read_bytes(1) == pytest.approx(work.layer_flops + work.head_flops, rel=0.01)
    assert work.read_bytes(1e6) == work.weight_bytes + work.expert_bytes
    assert work.decode_floor_s(1, 0, H200) == pytest.approx(1.43e-3, rel=0.02)
    assert work.decode_floor_s(64, 1000, H200) > 8 * work.decode_floor_s(1, 1000, H200)


def test_floors_of_latents_and_of_weights_in_fp8():
    work = offline.Work.of(Config(model="demo:random-deepseek-v3-slice", kv_cache_dtype="fp8"), torch.bfloat16)
    assert work.kv_token_bytes == 8 * 656
    assert work.pair_flops == 8 * 2 * 128 * (192 + 128)
    per_expert = 3 * 7168 * 2048
    assert work.expert_bytes == pytest.approx(7 * 32 * per_expert, rel=1e-3) and work.expert_share == 8 / 32
    bf16 = offline.Work.of(Config(model="demo:random-qwen3-8b"), torch.bfloat16)
    fp8 = offline.Work.of(Config(model="demo:random-qwen3-8b", quantization="fp8"), torch.bfloat16)
    in_16_bits = 2 * 151936 * 4096
    assert fp8.weight_bytes - in_16_bits == pytest.approx((bf16.weight_bytes - in_16_bits) / 2, rel=1e-3)
    assert (fp8.layer_flops, fp8.head_flops) == (bf16.layer_flops, bf16.head_flops)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=12), st.integers(1, 6))
def test_busy_time_is_the_union(intervals, min_gap):
    covered = {t for start, length in intervals for t in range(start, start + length)}
    begin, end = min(s for s, _ in intervals), max(s + n for s, n in intervals)
    busy, gaps = offline.busy_and_gaps([(s, s + n) for s, n in intervals], min_gap)
    assert busy == len(covered)
    assert gaps <= end - begin - busy
    if min_gap == 1:
        assert gaps == end - begin - busy


def test_kernel_intervals_reads_a_trace():
    events = [
        {"cat": "kernel", "ph": "X", "ts": 10.0, "dur": 5.0},
        {"cat": "gpu_memcpy", "ph": "X", "ts": 20.0, "dur": 1.0},
        {"cat": "cuda_runtime", "ph": "X", "ts": 0.0, "dur": 99.0},
        {"cat": "kernel", "ph": "s", "ts": 0.0},
    ]
    assert offline.kernel_intervals({"traceEvents": events}) == [(10.0, 15.0), (20.0, 21.0)]


def test_the_table_tells_who_is_ahead():
    config = Config(model="demo:random-qwen3-8b")
    rows = [
        offline.Row("W", 9065 * 1.1, "tok/s", floor=12000, peer_key=("w_output_tok_s",)),
        offline.Row("TPOT, batch 1", 5.24 / 1.25, "ms", floor=3.55, peer_key=("tpot_ms", "1")),
        offline.Row("prefill 9x9", 1.0, "tok/s", peer_key=("prefill_tok_s", "9x9")),
    ]
    lines = offline.table(rows, offline.peers_of(config)).splitlines()
    assert "vllm 0.24.0" in lines[0]
    assert "1.10" in lines[1].split() and "1.25" in lines[2].split()
    assert lines[3].split() == ["prefill", "9x9,", "tok/s", "1"]
    assert offline.peers_of(Config(model="demo:qwen3")) == {}


def test_results_carry_their_header(tmp_path):
    path = tmp_path / "deep" / "out.json"
    header.write_json(path, {"x": 1}, commit="abc")
    written = json.loads(path.read_text())
    assert written["x"] == 1 and written["header"]["commit"] == "abc"
    assert written["header"]["versions"]["torch"] == torch.__version__
    assert len(written["header"]["sources_sha256"]) == 64 and list(path.parent.iterdir()) == [path]


# bench.serve against a server that sends what each test says


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30), st.floats(0, 100))
def test_percentiles(values, percent):
    got = serve.percentile(values, percent)
    assert min(values) <= got <= max(values)
    assert math.isclose(
        got, torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100).item(), rel_tol=1e-9, abs_tol=1e-9
    )


def arguments(*flags):
    return serve.parser().parse_args([*flags])


def test_work_is_the_seeds():
    args = arguments("--num-prompts", "50", "--request-rate", "10", "--input-len", "3-9", "--output-len", "4")
    works = serve.make_work(args, 0)
    assert works == serve.make_work(args, 0) != serve.make_work(args, 1)
    assert all(3 <= len(w.prompt) <= 9 and w.output_tokens == 4 for w in works)
    assert works[0].at_s == 0 and 2 < works[-1].at_s < 10
    assert {w.at_s for w in serve.make_work(arguments("--num-prompts", "5"), 0)} == {0.0}


async def answer(body, respond, **changes):
    """Serve one connection with `respond(writer, request)`, and send one completion to it."""

    async def connected(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await respond(writer, json.loads(await reader.readexactly(length)))
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        target = serve.Target("127.0.0.1", server.sockets[0].getsockname()[1], "m")
        return await serve.complete(target, body, 0.5)


def chunked(*pieces):
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in [*pieces, b""])


OK = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":3}}\n\ndata: [DONE]\n\n'
TOKEN = b'data: {"choices":[{"text":"","finish_reason":null}],"usage":null}\n\n'


def test_a_stream_is_timed():
    asked = {}

    async def respond(writer, request):
        asked.update(request)
        writer.write(OK + chunked(TOKEN[:9])[:-5])
        await asyncio.sleep(0.05)
        writer.write(chunked(TOKEN[9:])[:-5])  # the first token, cut in two
        await asyncio.sleep(0.1)
        writer.write(chunked(b": keep-alive\n\n" + TOKEN + TOKEN, USAGE))

    outcome = asyncio.run(answer(serve.Work(0, [1, 2], 3), respond))
    assert outcome.error is None and (outcome.num_prompt, outcome.num_output) == (2, 3)
    assert outcome.ttft_s >= 0.05 and outcome.latency_s >= 0.15
    assert len(outcome.itl_s) == 2 and outcome.itl_s[0] >= 0.09 > outcome.itl_s[1]
    assert outcome.tpot_s == pytest.approx((outcome.latency_s - outcome.ttft_s) / 2)
    assert asked["prompt"] == [1, 2] and asked["max_tokens"] == 3 and asked["stream"] and asked["ignore_eos"]


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (b'HTTP/1.1 503 Busy\r\ncontent-length: 5\r\n\r\n{"e"}', "HTTP 503"),
        (OK + chunked(TOKEN, b'data: {"error":{"message":"dead"}}\n\n'), "dead"),
        (OK + chunked(TOKEN, TOKEN)[:-5], "IncompleteRead"),
        (OK + chunked(TOKEN, USAGE.replace(b"3", b"2")), "asked for 3 tokens, got 2"),
        (b"", "IncompleteRead"),
    ],
    ids=["status", "error event", "cut off", "too few", "hung up"],
)
def test_failures_are_counted(reply, why):
    async def respond(writer, request):
        writer.write(reply)

    outcome = asyncio.run(answer(serve.Work(0, [1], 3), respond))
    assert outcome.error and why in outcome.error
    summary = serve.summarize([outcome], 1.0, {})
    assert (summary["successful"], summary["failed"], summary["output_tokens"]) == (0, 1, 0)
    assert why in summary["first_error"]


def test_the_summary_and_its_block():
    fast = serve.Outcome(10, num_output=5, ttft_s=0.1, latency_s=0.5, itl_s=[0.1] * 4)
    slow = serve.Outcome(20, num_output=5, ttft_s=0.3, latency_s=1.5, itl_s=[0.3] * 4)
    summary = serve.summarize([fast, slow], 2.0, dict(map(serve.limit, ["ttft:200", "tpot:150"])))
    assert summary["output_tokens_per_s"] == 5 and summary["total_tokens_per_s"] == 20
    assert summary["goodput_per_s"] == 0.5
    assert summary["ttft_ms"]["mean"] == pytest.approx(200) and summary["tpot_ms"]["median"] == pytest.approx(200)
    block = serve.block(summary)
    for line in ("Successful requests:", "Request goodput (req/s):", "Mean TTFT (ms):", "P99 ITL (ms):"):
        assert line in block
    assert len({len(line) for line in block.splitlines()}) == 1


def test_a_busy_client_says_so():
    assert serve.ClientLoad(0.3, 0.004).complaint is None
    assert "client was the bottleneck" in serve.ClientLoad(0.95, 0.004).complaint


# Whole runs, on a model of random weights that a CPU carries


@pytest.fixture
def model_dir(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16, "vocab_size": 300}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2100}
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e4, **sizes, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_offline_runs_whole(model_dir, capsys):
    out = model_dir / "out.json"
    own = ["--num-requests", "1", "--batches", "1", "--prefill-len", "64", "--json", str(out), "--commit", "abc"]
    offline.main([str(model_dir), *own, "--load_format", "dummy", "--device", "cpu", "--max_num_seqs", "8"])
    results = json.loads(out.read_text())
    names = [row["name"] for row in results["rows"]]
    assert names == ["W (1 requests)", "TPOT, batch 1", "prefill 1x960", "prefill 1x64"]
    assert all(row["value"] > 0 for row in results["rows"])
    assert results["engine"]["config"]["max_num_seqs"] == 8 and results["engine"]["phases"]
    assert results["header"]["commit"] == "abc" and results["memory_gib"]["host_max_rss"] > 0
    assert all(name in capsys.readouterr().out for name in names[:1])


def test_serve_launches_and_loads_a_server(model_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = model_dir / "out.json"
    own = [
        "--num-prompts",
        "5",
        "--num-warmups",
        "1",
        "--input-len",
        "3-9",
        "--output-len",
        "4",
        "--max-token-id",
        "299",
    ]
    command = [sys.executable, "-m", "bench.serve", "--launch", str(model_dir), "--port", str(port), *own]
    engine_flags = ["--load_format", "dummy", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--json", str(out), *engine_flags], cwd=header.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert (results["successful"], results["output_tokens"]) == (5, 20) and "Mean TTFT (ms):" in done.stdout
    assert results["server_flags"] == engine_flags and results["server_ready_s"] > 0
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger, no listener may
        again.bind(("127.0.0.1", port))  # the server is gone


# Start-up


def test_startup_times_a_server_and_its_sums_are_whole(tmp_path, capsys):
    own = ["--device", "cpu", "--max_model_len", "64", "--max_num_batched_tokens", "64", "--max_num_seqs", "2"]
    startup.main(["demo:qwen3", *own, "--warm-runs", "0", "--json", str(tmp_path)])
    run = json.loads((tmp_path / "startup-qwen3.json").read_text())["runs"]["cold"]
    assert run["first_token_s"] == pytest.approx(run["ready_s"] + run["first_request_s"])
    assert 0 < sum(run["phases"].values()) < run["ready_s"] + 0.05
    assert {"front end: flags, model files, port", "loading the engine's libraries", "loading weights"} < set(
        run["phases"]
    )
    shown = [float(line.split(" s  ")[0]) for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert sum(shown[:-1]) == pytest.approx(shown[-1], abs=0.1) and shown[-1] == pytest.approx(
        run["first_token_s"], abs=0.01
    )
