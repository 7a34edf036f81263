"""Our Qwen3 equals transformers' Qwen3, however a prompt is cut into steps and wherever its pages lie."""

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qwen3 import VOCAB, PagedRunner, build, hf_model, load_hf, relative_error, save

SHAPES = {
    "gqa 2": {},
    "gqa 1, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "gqa 8, head_dim 32": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32},
    "head_dim 64 in a narrow model": {"head_dim": 64, "hidden_size": 40, "num_hidden_layers": 2},
    "odd vocabulary and widths": {"vocab_size": 257, "hidden_size": 37, "intermediate_size": 51},
    "head_dim 6, one layer, tied": {"head_dim": 6, "num_hidden_layers": 1, "tie_word_embeddings": True},
    "another epsilon and theta": {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_theta": 1e6}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
}
VOCAB_OF = {name: change.get("vocab_size", VOCAB) for name, change in SHAPES.items()}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """transformers' model and ours, fp32 on the CPU, and the size of their vocabulary."""
    theirs = hf_model(**SHAPES[request.param])
    ours = build(save(theirs, tmp_path_factory.mktemp("model")))
    return theirs, ours, VOCAB_OF[request.param]


def prompt(length: int, vocab: int = VOCAB, seed: int = 0) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(theirs, tokens: list[int]) -> torch.Tensor:
    return theirs(torch.tensor([tokens])).logits[0].float()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_checkpoint_stored_in_half_precision(tmp_path, dtype):
    save(hf_model(), tmp_path, dtype, max_shard_size="30KB")
    tokens = prompt(20)
    got = PagedRunner(build(tmp_path), page_size=4).step(chunks={"a": tokens})["a"]
    assert relative_error(got, reference(load_hf(tmp_path), tokens)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_near_to_fp32_as_theirs(tmp_path, dtype):
    save(hf_model(), tmp_path, dtype)
    tokens = prompt(60)
    wanted = reference(load_hf(tmp_path), tokens)
    their_error = (reference(load_hf(tmp_path, dtype), tokens) - wanted).norm()
    got = PagedRunner(build(tmp_path, dtype), page_size=16).step(chunks={"a": tokens})["a"]
    assert 0 < (got - wanted).norm() < 1.3 * their_error


def test_positions_reach_as_far_as_the_model_says(pair):
    theirs, ours, vocab = pair
    runner = PagedRunner(ours, page_size=16, max_len=ours.max_model_len, num_pages=64)
    tokens = prompt(300, vocab)[: ours.max_model_len]
    assert relative_error(runner.step(chunks={"a": tokens})["a"], reference(theirs, tokens)) < 1e-4


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    theirs = hf_model()
    return theirs, build(save(theirs, tmp_path_factory.mktemp("plain")))


@settings(max_examples=25, deadline=None)
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


@settings(max_examples=10, deadline=None)
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.integers(1, 20).map(lambda n: 2 * n),
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
    vocab=st.integers(1, 90),
    tied=st.booleans(),
    page_size=st.integers(1, 16),
    length=st.integers(1, 20),
)
def test_any_shape(kv_heads, group, head_dim, hidden, inner, vocab, tied, page_size, length):
    theirs = hf_model(
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * group,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=inner,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        num_hidden_layers=2,
    )
    with tempfile.TemporaryDirectory() as directory:
        ours = build(save(theirs, Path(directory)))
    tokens = prompt(length, vocab)
    got = PagedRunner(ours, page_size=page_size).step(chunks={"a": tokens})["a"]
    assert relative_error(got, reference(theirs, tokens)) < 1e-4


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


def test_a_cache_holds_what_the_layer_says_it_needs(plain):
    _, ours = plain
    runner = PagedRunner(ours, page_size=4, num_pages=10)
    runner.step(chunks={"a": prompt(6)}, padding=2)
    first, second = runner.pages["a"]
    for cache in runner.caches:
        written = ~cache.pages.isnan().any(-1).any(-1)  # [P, 2, page_size]
        wanted = torch.zeros_like(written)
        wanted[first, :, :] = wanted[second, :, :2] = True
        assert torch.equal(written, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    "change",
    [
        {"head_dim": 64},
        {"head_dim": 128, "num_key_value_heads": 1, "tie_word_embeddings": True},
        {"head_dim": 128, "num_key_value_heads": 8, "vocab_size": 1021},
    ],
    ids=["head_dim 64", "gqa 8", "gqa 1"],
)
def test_bf16_on_the_gpu_is_as_near_to_fp32_as_theirs(tmp_path, change, compiled):
    settings = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8, "vocab_size": 1000, **change}
    made = hf_model(**settings, num_hidden_layers=4, initializer_range=0.05, max_position_embeddings=1024)
    save(made, tmp_path, torch.bfloat16)
    ours = build(tmp_path, torch.bfloat16, "cuda")
    if compiled:
        torch._dynamo.reset()
        ours.compile_layers()
    tokens = prompt(300, settings["vocab_size"])
    on_gpu = torch.tensor([tokens], device="cuda")
    wanted = load_hf(tmp_path).cuda()(on_gpu).logits[0].cpu()
    their_error = (load_hf(tmp_path, torch.bfloat16).cuda()(on_gpu).logits[0].float().cpu() - wanted).norm()
    for page_size in (16, 64):
        runner = PagedRunner(ours, page_size=page_size, max_len=1024)
        parts = [runner.step(chunks={"a": tokens[:130]}), runner.step(chunks={"a": tokens[130:280]}, padding=5)]
        for i in range(280, 300):
            parts.append(runner.step(decodes={"a": tokens[i]}, chunks={f"b{i % 3}": tokens[:7]}))
        got = torch.cat([part["a"] for part in parts])
        assert 0 < (got - wanted).norm() < 1.3 * their_error
