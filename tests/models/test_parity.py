"""Our models equal transformers' ones, however a prompt is cut into steps and wherever its pages lie."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_runner import PagedRunner, relative_error
from tiny_models import FAMILIES, VOCAB, YARN, build, hf_model, load_hf, prompt, reference, save

from nanodeploy.errors import ConfigError
from nanodeploy.models.layers.experts import Router
from nanodeploy.ops.layouts import E4M3

SHAPES = {
    "qwen3": {
        "gqa 2": {},
        "gqa 1, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
        "gqa 8, head_dim 32": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32},
        "head_dim 64 in a narrow model": {"head_dim": 64, "hidden_size": 40, "num_hidden_layers": 2},
        "odd vocabulary and widths": {"vocab_size": 257, "hidden_size": 37, "intermediate_size": 51},
        "head_dim 6, one layer, tied": {"head_dim": 6, "num_hidden_layers": 1, "tie_word_embeddings": True},
        "another epsilon and theta": {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 1e6}},
        "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    },
    "qwen3_moe": {
        "16 experts": {},
        "every second layer dense, tied": {"decoder_sparse_step": 2, "tie_word_embeddings": True},
        "a dense layer by name": {"mlp_only_layers": [1], "norm_topk_prob": False},
    },
    "deepseek_v3": {
        "4 groups": {},
        "no q_lora, all layers dense": {"q_lora_rank": None, "first_k_dense_replace": 3},
        "no yarn, 2 shared experts": {"rope_parameters": {"rope_theta": 1e4}, "n_shared_experts": 2},
        "two mscales, no renormalising": {
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
        },
    },
    "kimi_k2": {"1 group": {}},
}
PAIRS = [(family, name) for family, shapes in SHAPES.items() for name in shapes]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: ", ".join(pair))
def pair(request, tmp_path_factory):
    """transformers' model and ours, fp32 on the CPU, and the size of their vocabulary."""
    family, name = request.param
    change = SHAPES[family][name]
    theirs = hf_model(family=family, **change)
    ours = build(save(theirs, tmp_path_factory.mktemp("model")))
    return theirs, ours, change.get("vocab_size", VOCAB)


@pytest.mark.parametrize(("length", "page_size"), [(1, 1), (15, 16), (16, 16), (17, 16), (40, 3)])
def test_prefill(pair, length, page_size):
    theirs, ours, vocab = pair
    tokens = prompt(length, vocab)
    got = PagedRunner(ours, page_size=page_size).step(chunks={"a": tokens})["a"]
    assert got.shape == (length, vocab)
    assert relative_error(got, reference(theirs, tokens)) < 1e-4


def test_64_greedy_tokens(pair):
    theirs, ours, vocab = pair
    tokens = prompt(9, vocab)
    wanted = theirs.generate(torch.tensor([tokens]), max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 9:]
    runner, got = PagedRunner(ours, page_size=7), []
    logits = runner.step(chunks={"a": tokens})["a"]
    while len(got) < 64:
        got.append(logits[-1].argmax().item())
        logits = runner.step(decodes={"a": got[-1]})["a"]
    assert got == wanted.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_checkpoint_stored_in_half_precision(tmp_path, family, dtype):
    save(hf_model(family=family), tmp_path, dtype, max_shard_size="30KB")
    tokens = prompt(20)
    got = PagedRunner(build(tmp_path), page_size=4).step(chunks={"a": tokens})["a"]
    assert relative_error(got, reference(load_hf(tmp_path, family=family), tokens)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_near_to_fp32_as_theirs(tmp_path, family, dtype):
    save(hf_model(family=family), tmp_path, dtype)
    tokens = prompt(60)
    wanted = reference(load_hf(tmp_path, family=family), tokens)
    theirs = reference(load_hf(tmp_path, dtype, family), tokens)
    got = PagedRunner(build(tmp_path, dtype), page_size=16).step(chunks={"a": tokens})["a"]
    assert 0 < typical_error(got, wanted) < 1.3 * typical_error(theirs, wanted)


def test_positions_reach_as_far_as_the_model_says(pair):
    theirs, ours, vocab = pair
    runner = PagedRunner(ours, page_size=16, max_len=ours.max_model_len, num_pages=64)
    tokens = prompt(300, vocab)[: ours.max_model_len]
    assert relative_error(runner.step(chunks={"a": tokens})["a"], reference(theirs, tokens)) < 1e-4


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request, tmp_path_factory):
    theirs = hf_model(family=request.param)
    return theirs, build(save(theirs, tmp_path_factory.mktemp("plain")))


@settings(max_examples=12, deadline=None)
@given(
    page_size=st.integers(1, 16),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_however_the_work_is_cut_the_logits_are_the_same(plain, page_size, lengths, seed, data):
    """Several sequences advance by decodes and chunks of any length, mixed in one step and padded."""
    theirs, ours = plain
    prompts = {str(i): prompt(length, seed=seed + i) for i, length in enumerate(lengths)}
    runner = PagedRunner(ours, page_size=page_size, num_pages=200, seed=seed)
    got: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}
    left = {name: list(tokens) for name, tokens in prompts.items()}
    while left:
        decodes, chunks = {}, {}
        chosen = data.draw(st.lists(st.sampled_from(sorted(left)), unique=True, min_size=1))
        for name in chosen:
            length = data.draw(st.integers(1, len(left[name])))
            if length == 1 and name in runner.lengths:
                decodes[name] = left[name][0]
            else:
                chunks[name] = left[name][:length]
            left[name] = left[name][length:]
        for name, logits in runner.step(decodes, chunks, padding=data.draw(st.integers(0, 3))).items():
            got[name].append(logits)
        left = {name: tokens for name, tokens in left.items() if tokens}
    for name, tokens in prompts.items():
        assert relative_error(torch.cat(got[name]), reference(theirs, tokens)) < 1e-4


def typical_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of the median row: where a choice of experts turns on a rounding, a whole row moves, in theirs or in ours."""
    return (got - wanted).norm(dim=-1).median().item()


qwen3_shapes = {
    "num_key_value_heads": st.integers(1, 3),
    "group": st.integers(1, 8),
    "head_dim": st.integers(1, 20).map(lambda n: 2 * n),
    "hidden_size": st.integers(2, 70),
    "intermediate_size": st.integers(1, 70),
    "vocab_size": st.integers(1, 90),
    "tie_word_embeddings": st.booleans(),
}


def with_heads(shape: dict) -> dict:
    """Query heads from kv heads and how many share one."""
    group = shape.pop("group")
    return {**shape, "num_attention_heads": shape["num_key_value_heads"] * group}


def qwen3_moe_shape(shape: dict) -> dict:
    return {**with_heads(shape), "num_experts_per_tok": min(shape["num_experts_per_tok"], shape["num_experts"])}


def deepseek_shape(shape: dict) -> dict:
    """As many experts as fill the groups, two in each at least, and no more of them chosen than are kept."""
    group, num_groups = shape.pop("group_size"), shape["n_group"]
    top_groups = min(shape["topk_group"], num_groups)
    return {
        **shape,
        "num_key_value_heads": shape["num_attention_heads"],
        "n_routed_experts": group * num_groups,
        "topk_group": top_groups,
        "num_experts_per_tok": min(shape["num_experts_per_tok"], group * top_groups),
    }


deepseek_shapes = {
    "num_attention_heads": st.integers(1, 5),
    "hidden_size": st.integers(2, 70),
    "q_lora_rank": st.none() | st.integers(1, 40),
    "kv_lora_rank": st.integers(1, 40),
    "qk_nope_head_dim": st.integers(1, 24),
    "qk_rope_head_dim": st.integers(1, 12).map(lambda n: 2 * n),
    "v_head_dim": st.integers(1, 40),
    "moe_intermediate_size": st.integers(2, 40),
    "first_k_dense_replace": st.integers(0, 2),
    "n_shared_experts": st.integers(0, 2),
    "n_group": st.integers(1, 4),
    "group_size": st.integers(2, 6),
    "topk_group": st.integers(1, 4),
    "num_experts_per_tok": st.integers(1, 8),
    "norm_topk_prob": st.booleans(),
}
ANY_SHAPE = {
    "qwen3": st.fixed_dictionaries(qwen3_shapes).map(with_heads),
    "qwen3_moe": st.fixed_dictionaries(
        {
            **qwen3_shapes,
            "moe_intermediate_size": st.integers(2, 40),
            "num_experts": st.integers(2, 20),
            "num_experts_per_tok": st.integers(1, 8),
            "norm_topk_prob": st.booleans(),
            "decoder_sparse_step": st.integers(1, 3),
            "mlp_only_layers": st.lists(st.integers(0, 2), max_size=2),
        }
    ).map(qwen3_moe_shape),
    "deepseek_v3": st.fixed_dictionaries(deepseek_shapes).map(deepseek_shape),
    "kimi_k2": st.fixed_dictionaries({**deepseek_shapes, "n_group": st.just(1)}).map(deepseek_shape),
}


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), page_size=st.integers(1, 16), length=st.integers(1, 20))
def test_any_shape(family, data, page_size, length):
    shape = data.draw(ANY_SHAPE[family])
    theirs = hf_model(family=family, **shape, num_hidden_layers=2)
    with tempfile.TemporaryDirectory() as directory:
        ours = build(save(theirs, Path(directory)))
    tokens = prompt(length + 3, shape.get("vocab_size", VOCAB))
    runner = PagedRunner(ours, page_size=page_size)
    got = [runner.step(chunks={"a": tokens[:length]})["a"]]
    got += [runner.step(decodes={"a": token})["a"] for token in tokens[length:]]
    assert relative_error(torch.cat(got), reference(theirs, tokens)) < 1e-4


def test_only_the_rows_asked_for(plain):
    _, ours = plain
    tokens = prompt(12)
    everything = PagedRunner(ours, page_size=4).step(chunks={"a": tokens})["a"]
    runner = PagedRunner(ours, page_size=4)
    batch = runner.batch({}, {"a": tokens})
    batch = type(batch)(**{**vars(batch), "logit_rows": torch.tensor([11, 3])})
    hidden = ours(batch, runner.caches)
    assert hidden.shape == (2, 48)
    torch.testing.assert_close(ours.logits(hidden), everything[[11, 3]])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_fp8_cache_is_near_and_however_the_work_is_cut_the_same(tmp_path, family):
    """What attention reads is what the cache holds, of a step's own tokens too: so a chunk's length changes nothing."""
    sizes = {} if family.startswith("qwen3") else {"kv_lora_rank": 128}
    theirs = hf_model(family=family, **sizes)
    ours = build(save(theirs, tmp_path))
    tokens = prompt(50)
    whole = PagedRunner(ours, page_size=16, kv_dtype=E4M3).step(chunks={"a": tokens})["a"]
    errors = (whole - reference(theirs, tokens)).norm(dim=-1) / reference(theirs, tokens).norm(dim=-1)
    assert 1e-3 < errors.median() < 0.2
    runner = PagedRunner(ours, page_size=16, kv_dtype=E4M3)
    parts = [runner.step(chunks={"a": tokens[:17]}), runner.step(chunks={"a": tokens[17:40]}, padding=2)]
    parts += [runner.step(decodes={"a": token}) for token in tokens[40:]]
    apart = (torch.cat([part["a"] for part in parts]) - whole).norm(dim=-1) / whole.norm(dim=-1)
    # A last bit may round a cached value another way, and rarely an expert is chosen otherwise for that.
    assert apart.median() < 1e-4


def test_latents_that_have_no_fp8_pages(tmp_path):
    ours = build(save(hf_model(family="deepseek_v3"), tmp_path))
    with pytest.raises(ConfigError, match=r"latents have 32 values \(kv_lora_rank\).* multiples of 128"):
        PagedRunner(ours, page_size=16, kv_dtype=E4M3)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_padding_goes_to_no_expert(tmp_path, family):
    """Nor does it cost weights that are read for nothing; who is a token goes to as many as the model says."""
    ours = build(save(hf_model(family=family), tmp_path))
    routed = []
    for module in ours.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda module, args, out: routed.append(out[0]))
    runner = PagedRunner(ours, page_size=4)
    runner.step(chunks={"a": prompt(5)}, padding=3)
    runner.step(decodes={"a": 7}, padding=2)
    for ids, num_tokens in zip(routed, [5] * (len(routed) // 2) + [1] * (len(routed) // 2), strict=True):
        assert (ids[:num_tokens] >= 0).all() and (ids[num_tokens:] == -1).all() and len(ids) > num_tokens
    assert len(routed) == 2 * sum(ours.shape.sparse)


WIDE = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1000, "num_hidden_layers": 4}
WIDE_QWEN3 = {"head_dim": 128, "num_attention_heads": 8, "num_key_value_heads": 2}
WIDE_DEEPSEEK = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 256,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 256},
}
ON_GPU = {
    "head_dim 64": ("qwen3", {**WIDE_QWEN3, "head_dim": 64}),
    "gqa 8": ("qwen3", {**WIDE_QWEN3, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "gqa 1": ("qwen3", {**WIDE_QWEN3, "num_key_value_heads": 8, "vocab_size": 1021}),
    "32 experts, one dense layer": (
        "qwen3_moe",
        {**WIDE_QWEN3, "moe_intermediate_size": 384, "num_experts": 32, "mlp_only_layers": [1]},
    ),
    "latent": ("deepseek_v3", WIDE_DEEPSEEK),
    "latent, one group": ("kimi_k2", {**WIDE_DEEPSEEK, "num_attention_heads": 32, "num_key_value_heads": 32}),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ON_GPU)
def test_bf16_on_the_gpu_is_as_near_to_fp32_as_theirs(tmp_path, name, compiled):
    family, change = ON_GPU[name]
    settings = {**WIDE, **change, "initializer_range": 0.05, "max_position_embeddings": 1024}
    save(hf_model(family=family, **settings), tmp_path, torch.bfloat16)
    ours = build(tmp_path, torch.bfloat16, "cuda")
    if compiled:
        torch._dynamo.reset()
        ours.compile_layers()
    tokens = prompt(300, settings["vocab_size"])
    on_gpu = torch.tensor([tokens], device="cuda")
    wanted = load_hf(tmp_path, family=family).cuda()(on_gpu).logits[0].cpu()
    theirs = load_hf(tmp_path, torch.bfloat16, family).cuda()(on_gpu).logits[0].float().cpu()
    for page_size in (16, 64) if family.startswith("qwen3") else (64,):
        runner = PagedRunner(ours, page_size=page_size, max_len=1024)
        parts = [runner.step(chunks={"a": tokens[:130]}), runner.step(chunks={"a": tokens[130:280]}, padding=5)]
        for i in range(280, 300):
            parts.append(runner.step(decodes={"a": tokens[i]}, chunks={f"b{i % 3}": tokens[:7]}))
        got = torch.cat([part["a"] for part in parts])
        assert 0 < typical_error(got, wanted) < 1.3 * typical_error(theirs, wanted)
