"""Every family with experts or latents on the GPU: as near to fp32 as transformers' bf16, and the engine's laws there.

Sizes are those of the real models where kernels depend on them (heads, ranks, groups, blocks), else small.
"""

import copy
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import FAMILIES, PaddedSteps, poison, run
from transformers import PreTrainedModel

from nanodeploy.config import Config
from nanodeploy.errors import ConfigError
from nanodeploy.ops.registry import OPS
from nanodeploy.runtime.engine import Engine
from nanodeploy.runtime.graphs import Graphs
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest

pytestmark = pytest.mark.gpu

VOCAB = 1000
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 3,
    "initializer_range": 0.05,
}
LATENT = {
    **SIZES,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 32,
    "n_group": 4,
    "topk_group": 2,
}
CHANGES = {
    "qwen3_moe": {**SIZES, "head_dim": 128, "num_attention_heads": 8, "num_experts": 32},
    "deepseek_v3": LATENT,
    "kimi_k2": {**LATENT, "num_attention_heads": 32, "num_key_value_heads": 32, "n_group": 1, "topk_group": 1},
}
PRECISIONS = {
    "bf16": {},
    "fp8 weights": {"quantization": "fp8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
    "fp8": {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}
FLAGS = {"max_num_seqs": 16, "max_num_batched_tokens": 512, "num_kvcache_blocks": 200, "max_model_len": 1024}
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=1)


@pytest.fixture(scope="module", params=CHANGES)
def saved(request, tmp_path_factory) -> tuple[PreTrainedModel, str]:
    """transformers' model in fp32, whose weights are bf16's, and where it is saved in bf16."""
    model_class, config_class, settings = FAMILIES[request.param]
    torch.manual_seed(1)
    config = config_class(**{**settings, **CHANGES[request.param]})
    config._experts_implementation = "eager"
    model: PreTrainedModel = model_class(config).eval().requires_grad_(False)
    for name, tensor in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1)
        elif name.endswith(".gate.weight"):
            tensor.normal_(0, 0.2)  # routers that are sure of their choice
        tensor.copy_(tensor.bfloat16())
    directory = tmp_path_factory.mktemp(request.param)
    copy.deepcopy(model).bfloat16().save_pretrained(directory)
    return model, str(directory)


@pytest.fixture(scope="module")
def engine_of(saved):
    """Flags -> an engine on the saved model; the last four are kept.

    --deterministic is the whole process's: an engine with it is made last in its test, and used in no other.
    """

    @functools.lru_cache(maxsize=4)
    def make(**flags) -> Engine:
        engine = Engine(Config(model=saved[1], device="cuda", **{**FLAGS, **flags}))
        poison(engine)
        return engine

    yield make
    make.cache_clear()


def prompt(length: int, shift: int = 0) -> list[int]:
    return [(7 * j * j + 3 * j + shift) % VOCAB for j in range(length)]


def told(engine: Engine, requests: list[GenerateRequest], arrivals=None, forget: bool = True) -> dict:
    """id -> (tokens, Logprobs of each, those of the prompt)."""
    if forget:
        engine.reset_prefix_cache()
    answers = run(engine, requests, arrivals)
    scores = {id: [e.prompt_logprobs for e in a.events if e.prompt_logprobs is not None] for id, a in answers.items()}
    return {id: (answer.tokens, answer.logprobs, scores[id]) for id, answer in answers.items()}


def prompt_logprobs(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """The log-probabilities of all but the first token, given those before it."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    _, _, [scores] = told(engine, [GenerateRequest("a", tokens, params)])["a"]
    return torch.tensor([score.logprob for score in scores[1:]])


def reference_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    given = torch.tensor([tokens], device=model.device)
    rows = model(given).logits[0].float().log_softmax(-1)
    return rows[:-1].gather(1, given[0, 1:, None])[:, 0].cpu()


def typical(errors: torch.Tensor) -> float:
    """The median: where a choice of experts hangs on a rounding a token's scores move far, in theirs as in ours."""
    return errors.abs().median().item()


def in_bf16(model: PreTrainedModel) -> PreTrainedModel:
    """Not `.to(bfloat16)` alone, which would round rotary frequencies and routers' biases too."""
    small = copy.deepcopy(model).bfloat16()
    buffers = dict(model.named_buffers())
    for name, buffer in small.named_buffers():
        if name.endswith(("inv_freq", "e_score_correction_bias")):
            buffer.data = buffers[name].data.clone()
    return small


@pytest.mark.parametrize("precision", PRECISIONS)
def test_as_near_to_fp32_as_transformers_in_bf16(saved, engine_of, precision):
    """In bf16 within 1.3 times its error; e4m3 has 4 bits less than bf16, so rounds 16 times as coarsely."""
    tokens = prompt(700)
    with torch.inference_mode():
        exact = reference_logprobs(saved[0].cuda(), tokens)
        theirs = typical(reference_logprobs(in_bf16(saved[0]), tokens) - exact)
    saved[0].cpu()
    engine = engine_of(**PRECISIONS[precision])
    ours = typical(prompt_logprobs(engine, tokens) - exact)
    print(f"{precision}: {ours:.4f}, transformers' bf16 {theirs:.4f}")
    assert theirs > 0
    if precision == "bf16":
        assert 0 < ours < 1.3 * theirs
    else:
        assert theirs < ours < 30 * theirs


@contextmanager
def other_graphs(engine: Engine, graphs: Graphs | None) -> Iterator[None]:
    kept, engine.runner.graphs = engine.runner.graphs, graphs
    try:
        yield
    finally:
        engine.runner.graphs = kept


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("num_requests", [1, 2, 5, 8])
def test_graph_equals_eager(engine_of, precision, num_requests):
    """Steps of decodes, as graphs and as they are, of the same padded forms: so the same kernels, to the token.

    Five sequences are padded to eight. Steps with chunks are not graphs here: their padding may take other kernels.
    """
    engine = engine_of(**PRECISIONS[precision])
    graphs = engine.runner.graphs
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)
    requests = [GenerateRequest(str(i), prompt(40 * i + 5, i), params) for i in range(num_requests)]
    as_they_are = PaddedSteps(engine)
    as_they_are.decode_sizes, as_they_are.mixed_sizes = graphs.decode_sizes, []
    mixed_sizes, graphs.mixed_sizes = graphs.mixed_sizes, []
    try:
        with_graphs = told(engine, requests)
        again = told(engine, requests)
        with other_graphs(engine, as_they_are):
            assert told(engine, requests) == with_graphs == again
    finally:
        graphs.mixed_sizes = mixed_sizes
    assert all(len(tokens) == 40 for tokens, _, _ in with_graphs.values())
    assert as_they_are.forms and any(not form.num_chunks for form in graphs.captured)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_padding_of_a_graph_goes_nowhere(engine_of, precision):
    """Chunks and decodes in padded graphs: the padding reaches no expert and no page, and no answer feels it.

    Other numbers of rows may take other kernels, so scores of first tokens are compared, not bits."""
    engine = engine_of(**PRECISIONS[precision])
    requests = [GenerateRequest(str(i), prompt(60 * i + 9, i), GREEDY) for i in range(5)]
    padded = told(engine, requests)
    with other_graphs(engine, None):
        eager = told(engine, requests)
    for id in padded:
        assert len(padded[id][0]) == 24
        assert all(math.isfinite(score.logprob) for score in padded[id][1])
        assert padded[id][1][0].logprob == pytest.approx(
            eager[id][1][0].logprob, abs=0.6 if precision == "fp8" else 0.2
        )


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_deterministic_to_the_bit(engine_of, precision):
    """Alone, batched, from the prefix cache, in chunks, preempted, with graphs and without."""
    in_use = engine_of(**PRECISIONS[precision]).info["kernels"]
    if free := [name for name in in_use if not OPS[name].one_order(on_gpu=True)]:
        with pytest.raises(ConfigError, match=free[0]):
            engine_of(deterministic=True, **PRECISIONS[precision])
        pytest.skip(f"{', '.join(free)}: no kernel whose sums do not depend on the batch")
    flags = {"deterministic": True, **PRECISIONS[precision]}
    engine = engine_of(**flags)
    requests = [
        GenerateRequest(str(i), prompt(length, i % 2), GREEDY) for i, length in enumerate((200, 180, 33, 5, 77))
    ]
    alone: dict = {}
    for request in requests:
        alone |= told(engine, [request])
    assert told(engine, requests, [0, 2, 0, 5, 1]) == alone
    assert told(engine, requests, forget=False) == alone and engine.stats().prefix_hits > 0
    with other_graphs(engine, None):
        assert told(engine, requests) == alone
    page_size = engine.info["config"]["kvcache_block_size"]
    few = {"max_model_len": 256, "num_kvcache_blocks": -(-256 // page_size) + 2}
    scarce = engine_of(**flags, **few, max_num_batched_tokens=48)
    assert told(scarce, requests) == alone


def test_every_op_has_a_kernel_of_the_gpu(engine_of):
    for precision in ("bf16", "fp8"):
        chosen = engine_of(**PRECISIONS[precision]).info["kernels"]
        assert {"moe_gemm", "moe_route", "moe_logits"} <= set(chosen)
        assert not any("reference" in choice for choice in chosen.values()), chosen


def test_what_no_kernel_takes_is_said_before_weights_load(saved, monkeypatch):
    monkeypatch.setattr("nanodeploy.models.checkpoint.load", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match="on a GPU there are kernels for --dtype bfloat16"):
        Engine(Config(model=saved[1], device="cuda", dtype="float32", **FLAGS))
