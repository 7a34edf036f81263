"""Demo-like checkpoints of the families with experts and latents, made by the demos' own trainer, in the whole engine:
in every precision, offline and served."""

import functools
import json
import subprocess
import sys
import urllib.request

import pytest
import torch
from test_deterministic import told
from tiny import PaddedSteps, make_engine
from torch._dynamo.testing import CompileCounter

from bench.header import ROOT
from bench.startup import READY
from nanodeploy import LLM, SamplingParams, catalog
from nanodeploy.errors import ConfigError
from nanodeploy.ops.layouts import E4M3
from nanodeploy.wire import GenerateRequest

NAMES = ("qwen3-moe", "deepseek-v3")
PRECISIONS = {
    "plain": {},
    "weights": {"quantization": "fp8"},
    "cache": {"kv_cache_dtype": "fp8"},
    "both": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
SIZES = {"max_model_len": 256, "num_kvcache_blocks": 80}
TEXT = "The red house stands near the old river. Sort: 5 3 9 1. What is 12+34?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Name -> the checkpoint of two steps of its recipe."""

    @functools.cache
    def train(name):
        out = tmp_path_factory.mktemp("demo") / name
        few = ["--steps", "2", "--fewer", "64", "--num_eval", "0", "--workers", "1", "--device", "cpu"]
        command = [sys.executable, "-m", "bench.demo.train", "--recipe", name, "--out", str(out), *few]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
        return out

    return train


@pytest.fixture(params=NAMES)
def directory(request, trained):
    return trained(request.param)


def requests() -> list[GenerateRequest]:
    """Two of them share a prefix of two pages; the third is sampled and asks for scores of its prompt."""
    made = []
    for i, (text, length) in enumerate([(0, 44), (0, 43), (1, 19)]):
        prompt = [(7 * j * j + 3 * j + text) % 700 for j in range(length)]
        asked = {"temperature": 0.8, "prompt_logprobs": 0} if i == 2 else {"temperature": 0.0}
        params = SamplingParams(seed=i, max_tokens=8, ignore_eos=True, logprobs=2, **asked)
        made.append(GenerateRequest(str(i), prompt, params))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["plain", "cache", "both"])
def test_the_engines_laws_in_every_precision(directory, precision):
    """Under --deterministic, to the bit: alone, batched, from the prefix cache, padded as graphs are, in chunks,
    preempted."""
    flags = {"deterministic": True, **SIZES, **PRECISIONS[precision]}
    engine = make_engine(directory, **flags)
    alone: dict = {}
    for request in requests():
        alone |= told(engine, [request])
    arrivals = [0, 2, 1]
    assert told(engine, requests(), arrivals) == alone
    assert told(engine, requests(), forget=False) == alone and engine.stats().prefix_hits > 0
    engine.runner.graphs = PaddedSteps(engine)
    assert told(engine, requests(), arrivals) == alone
    assert engine.runner.graphs.forms
    chunked = make_engine(directory, **flags, max_num_batched_tokens=7, max_num_seqs=3)
    assert told(chunked, requests(), arrivals) == alone
    scarce = make_engine(directory, **{**flags, "num_kvcache_blocks": 7, "max_model_len": 80})
    assert told(scarce, requests()) == alone and scarce.stats().num_preemptions > 0


def test_what_each_precision_changes(directory):
    """Weights and cache are held in 8 bits where that is asked for, and log-probabilities move by no more than that."""
    prompt = requests()[2]
    scores = {}
    for name, precision in PRECISIONS.items():
        engine = make_engine(directory, **SIZES, **precision)
        assert any(p.dtype == E4M3 for p in engine.runner.model.parameters()) == ("quantization" in precision)
        cache_bytes = sum(t.nbytes for cache in engine.runner.caches for t in cache if t is not None)
        assert (cache_bytes < engine.num_pages * 16 * 2000) == ("kv_cache_dtype" in precision)
        _, _, [given] = told(engine, [prompt])[prompt.id]
        scores[name] = torch.tensor([score.logprob for score in given[1:]])
    for name in ("weights", "cache", "both"):
        moved = (scores[name] - scores["plain"]).abs()
        assert 0 < moved.mean() < 0.2, name


def test_a_demo_is_found_once_its_folder_is_there(trained, tmp_path, monkeypatch):
    for name in NAMES:
        directory = trained(name)
        monkeypatch.setattr(catalog, "DEMOS", tmp_path)
        with pytest.raises(ConfigError, match=f"There is no demo:{name}. .*There are: "):
            catalog.locate(f"demo:{name}")
        monkeypatch.setattr(catalog, "DEMOS", directory.parent)
        assert f"demo:{name}" in catalog.available()
        with LLM(f"demo:{name}", device="cpu", log_level="error", **SIZES) as llm:
            [output] = llm.chat([{"role": "user", "content": "1+1=?"}], SamplingParams(temperature=0, max_tokens=4))
            assert 0 < len(output.outputs[0].token_ids) <= 4
        size = sum(path.stat().st_size for path in directory.iterdir())
        assert size < 6e6, f"{name}: {size} bytes"


def test_compiled_layers_answer_the_same(directory):
    """Once for one token and once for more, for each kind of layer, whatever the steps."""
    engine = make_engine(directory, **SIZES, max_num_batched_tokens=20)
    wanted = {id: tokens for id, (tokens, _, _) in told(engine, requests()).items()}
    counter = CompileCounter()
    torch._dynamo.reset()
    engine.runner.model.compile_layers(backend=counter)
    got = told(engine, requests(), arrivals=[0, 3, 15])
    assert {id: tokens for id, (tokens, _, _) in got.items()} == wanted
    assert counter.frame_count == 2 * len({type(layer.mlp) for layer in engine.runner.model.model.layers})


@pytest.mark.slow
def test_served_as_offline(directory):
    """`nanodeploy serve` with every saving on answers what the offline engine answers."""
    flags = {"deterministic": True, **SIZES, **PRECISIONS["both"]}
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with LLM(str(directory), device="cpu", log_level="error", **flags) as llm:
        [wanted] = llm.generate([TEXT], params, use_tqdm=False)
    shown = ["--kv_cache_dtype", "fp8", "--quantization", "fp8", "--deterministic", "--device", "cpu"]
    shown += ["--max_model_len", "256", "--num_kvcache_blocks", "80", "--served_model_name", "tiny", "--port", "0"]
    command = [sys.executable, "-m", "nanodeploy.serve", str(directory), *shown]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            found = next(filter(None, map(READY.search, process.stdout)))
            url = f"http://{found[1]}:{found[2]}"
            body = {"model": "tiny", "prompt": TEXT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
            head = {"Content-Type": "application/json"}
            asked = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
            with urllib.request.urlopen(asked, timeout=60) as reply:
                answer = json.load(reply)
            with urllib.request.urlopen(f"{url}/server_info", timeout=60) as reply:
                config = json.load(reply)["engine"]["config"]
        finally:
            process.terminate()
    assert (config["quantization"], config["kv_cache_dtype"], config["deterministic"]) == ("fp8", "fp8", True)
    assert answer["choices"][0]["text"] == wanted.outputs[0].text
    assert answer["usage"]["completion_tokens"] == 20
