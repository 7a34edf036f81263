"""Loading is strict both ways, and a damaged checkpoint is one clear error."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, change_config, hf_model, save
from torch import nn

from nanodeploy import catalog
from nanodeploy.errors import CheckpointError, ConfigError
from nanodeploy.models import checkpoint, qwen3, registry
from nanodeploy.models.layers.experts import Router, Routing
from nanodeploy.models.layers.linear import Linear

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(hf_model(), tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def saved_shards(tmp_path_factory):
    directory = save(hf_model(), tmp_path_factory.mktemp("shards"), max_shard_size="60KB")
    assert len(list(directory.glob("*.safetensors"))) > 3
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def copy_shards(saved_shards, tmp_path):
    return shutil.copytree(saved_shards, tmp_path / "model")


def edit(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def same(model, other) -> bool:
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def test_every_tensor_reaches_its_place(saved):
    model, tensors = build(saved), load_file(saved / "model.safetensors")
    state = dict(model.named_parameters())
    heads = "model.layers.1.self_attn."
    stacked = [tensors[f"{heads}{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(state[f"{heads}qkv.weight"], torch.cat(stacked))
    stacked = [tensors[f"model.layers.2.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(state["model.layers.2.mlp.gate_up.weight"], torch.cat(stacked))
    for name in state.keys() & tensors.keys():
        assert torch.equal(state[name], tensors[name])
    assert sum(p.numel() for p in state.values()) == sum(t.numel() for t in tensors.values())
    assert not any(p.requires_grad or p.is_meta for p in state.values()) and not model.training


def test_shards_are_the_same_model(saved, saved_shards):
    assert same(build(saved_shards), build(saved))
    model = build(saved)
    for parameter in model.parameters():
        parameter.zero_()
    assert not same(model, build(saved))  # the comparison sees what differs


def test_shards_without_an_index(copy_shards, saved):
    (copy_shards / INDEX).unlink()
    assert same(build(copy_shards), build(saved))


def test_links_are_followed_as_hub_caches_are_made_of_them(copy, tmp_path, saved):
    os.replace(copy / "model.safetensors", tmp_path / "blob")
    (copy / "model.safetensors").symlink_to(tmp_path / "blob")
    assert same(build(copy), build(saved))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_converted(tmp_path, stored, wanted):
    model = build(save(hf_model(), tmp_path, stored), wanted)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert tensors[name].dtype == stored and {p.dtype for p in model.parameters()} == {wanted}
    assert torch.equal(model.get_parameter(name), tensors[name].to(wanted))
    assert model.model.cos_sin.dtype == torch.float32


def test_tied_embeddings(tmp_path):
    directory = save(hf_model(tie_word_embeddings=True), tmp_path)
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    model = build(directory)
    assert model.lm_head is None
    edit(directory, lambda t: t.update({"lm_head.weight": torch.ones_like(t["model.embed_tokens.weight"])}))
    assert same(build(directory), model)


def test_everything_that_does_not_fit_is_listed_at_once(copy):
    def change(tensors):
        for layer in range(3):
            for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm"):
                tensors.pop(f"model.layers.{layer}.self_attn.{part}.weight")
        tensors["model.rotary.inv_freq"] = torch.ones(3)
        tensors["model.norm.weight"] = torch.ones(7)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].t().contiguous()
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    edit(copy, change)
    with pytest.raises(CheckpointError) as error:
        build(copy)
    text = str(error.value)
    assert "15 missing: model.layers.0.self_attn.q_proj.weight" in text and "and 5 more" in text
    assert "1 unknown: model.rotary.inv_freq" in text
    assert "3 of the wrong form" in text and "model.norm.weight is [7], wanted [48]" in text
    assert "model.layers.0.mlp.up_proj.weight is [48, 80], wanted [80, 48]" in text
    assert "lm_head.weight is I8" in text


def test_parts_of_a_stack_cannot_make_up_for_each_other(copy):
    def change(tensors):
        q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
        tensors[q], tensors[k] = tensors[k], tensors[q]

    edit(copy, change)
    with pytest.raises(CheckpointError, match=r"q_proj.weight is \[32, 48\], wanted \[64, 48\]"):
        build(copy)


def test_a_tensor_in_two_shards(copy_shards):
    (copy_shards / INDEX).unlink()
    first = sorted(copy_shards.glob("*.safetensors"))[0]
    shutil.copy(first, copy_shards / "zz.safetensors")
    with pytest.raises(CheckpointError, match="there twice"):
        build(copy_shards)


def test_a_missing_shard(copy_shards):
    gone = sorted(copy_shards.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"{gone.name}, which is not there"):
        build(copy_shards)
    (copy_shards / INDEX).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        build(copy_shards)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(copy, kept):
    path = copy / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * kept))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        build(copy)


def test_garbage_instead_of_a_file(copy):
    (copy / "model.safetensors").write_bytes(b"\xff" * 5000)
    with pytest.raises(CheckpointError, match="is damaged"):
        build(copy)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "model.bin"])
def test_an_index_cannot_point_out_of_the_directory(copy_shards, saved, name):
    shutil.copy(saved / "model.safetensors", copy_shards.parent / "secret.safetensors")
    index = json.loads((copy_shards / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = name
    (copy_shards / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="beside it"):
        build(copy_shards)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index_is_named(copy_shards, text):
    (copy_shards / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        build(copy_shards)


def test_safetensors_only(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.* safetensors only"):
        build(copy)
    (copy / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors"):
        build(copy)


def test_dummy_weights_come_from_the_seed(copy):
    (copy / "model.safetensors").unlink()
    model = build(copy, load_format="dummy", seed=3)
    assert same(model, build(copy, load_format="dummy", seed=3))
    assert not same(model, build(copy, load_format="dummy", seed=4))
    assert (model.model.norm.weight == 1).all() and (model.model.layers[1].self_attn.q_norm.weight == 1).all()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            assert abs(parameter.std().item() - 0.02) < 0.002


def test_the_caller_hears_what_is_going_on(copy):
    heard = []
    build(copy, progress=heard.append)
    build(copy, load_format="dummy", progress=heard.append)
    assert heard == ["loading weights", "drawing random weights"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method is 'awq'"),
        ({"quant_method": "fp8"}, "weight_block_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [64, 128]}, r"weight_block_size is \[64, 128\]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt is 'e5m2'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"}, "is 'static'"),
        ("fp8", "quantization_config is 'fp8'"),
    ],
)
def test_other_quantisations_are_refused(copy, given, complaint):
    change_config(copy, quantization_config=given)
    with pytest.raises(ConfigError, match=complaint):
        build(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "layer_types": None}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "sliding"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type is 'llama3'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "no factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "x"}}, "rope_theta is 'x'"),
        ({"rope_scaling": [1]}, "rope_scaling is"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_its_own_words(copy, change, complaint):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=complaint.replace("[", r"\[")):
        build(copy)


def test_windows_that_are_switched_off_are_no_obstacle():
    config = {**catalog.locate("demo:random-qwen3-8b").config, "sliding_window": 4096}
    shape = qwen3.Shape.from_hf(config)
    assert (shape.num_layers, shape.head_dim, shape.rope.theta, shape.rope.max_len) == (36, 128, 1e6, 40960)
    assert qwen3.Shape.from_hf({**config, "use_sliding_window": True, "max_window_layers": 36}) == shape


@pytest.mark.parametrize("name", [name for name in catalog.available() if "random-qwen3" in name])
def test_shipped_shapes_have_the_size_their_name_says(name):
    model = registry.skeleton(catalog.locate(name))
    assert all(p.is_meta for p in model.parameters())
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    said = float(name.removeprefix("demo:random-qwen3-").partition("b")[0])
    assert said * 0.95 < billions < said * 1.11


def test_a_declaration_without_a_parameter_is_our_own_bug():
    module = nn.Module()
    module.qkv = Linear(2, 2, 2)
    module.checkpoint = {"qvk.weight": checkpoint.Stack("q.weight", "k.weight")}
    with pytest.raises(AssertionError, match=r"qvk\.weight"):
        checkpoint.destinations(module)


@pytest.fixture(scope="module")
def saved_moe(tmp_path_factory):
    return save(hf_model(family="qwen3_moe", mlp_only_layers=[0]), tmp_path_factory.mktemp("moe"), torch.bfloat16)


def test_every_expert_reaches_its_place(saved_moe):
    state, tensors = dict(build(saved_moe).named_parameters()), load_file(saved_moe / "model.safetensors")
    assert not any("layers.0.mlp.experts" in name for name in tensors)
    for layer in (1, 2):
        mlp = f"model.layers.{layer}.mlp"
        gate_up, down = state[f"{mlp}.experts.gate_up"], state[f"{mlp}.experts.down"]
        assert gate_up.shape == (16, 48, 48) and down.shape == (16, 48, 24)
        for expert in range(16):
            parts = [tensors[f"{mlp}.experts.{expert}.{part}_proj.weight"].float() for part in ("gate", "up", "down")]
            assert torch.equal(gate_up[expert], torch.cat(parts[:2])) and torch.equal(down[expert], parts[2])
    assert sum(p.numel() for p in state.values()) == sum(t.numel() for t in tensors.values())


def test_an_expert_too_many_or_too_few(saved_moe, tmp_path):
    directory = shutil.copytree(saved_moe, tmp_path / "model")
    change_config(directory, num_local_experts=17)
    with pytest.raises(CheckpointError, match=r"missing: .*layers.1.mlp.experts.16.gate_proj.weight"):
        build(directory)
    change_config(directory, num_local_experts=15)
    with pytest.raises(CheckpointError, match=r"unknown: .*layers.1.mlp.experts.15.down_proj.weight"):
        build(directory)


class Weights(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.a = Linear(300, 130)
        self.b = Linear(64, 64)
        if dtype:
            self.a.weight.data = self.a.weight.data.to(dtype)


def scaled(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(130, 300, generator=generator).to(torch.float8_e4m3fn), torch.rand(2, 3, generator=generator)


def written(directory, **shards):
    for name, tensors in shards.items():
        dotted = {key.replace("_weight", ".weight"): tensor for key, tensor in tensors.items()}
        save_file(dotted, directory / f"{name}.safetensors")
    return sorted(directory.glob("*.safetensors"))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_an_fp8_weight_is_multiplied_out_where_its_parameter_is_not_fp8(tmp_path, stored):
    """The scales may lie in another shard, before the weight or behind it."""
    weight, scales = scaled()
    scales = scales.to(stored)
    paths = written(tmp_path, a={"a_weight_scale_inv": scales, "b_weight": torch.eye(64)}, b={"a_weight": weight})
    model = Weights()
    checkpoint.check(model, paths)
    for order in (paths, paths[::-1]):
        model.a.weight.zero_()
        checkpoint.load(model, order)
        for row, column in ((0, 0), (127, 127), (128, 127), (129, 299), (0, 256)):
            wanted = weight[row, column].float() * scales[row // 128, column // 128].float()
            assert model.a.weight[row, column] == wanted
    assert torch.equal(model.b.weight, torch.eye(64))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"a_weight_scale_inv": None}, r"a.weight is F8_E4M3 without a.weight_scale_inv"),
        ({"a_weight_scale_inv": torch.ones(2, 2)}, r"a.weight_scale_inv is F32 \[2, 2\], wanted \[2, 3\]"),
        ({"a_weight_scale_inv": torch.ones(2, 3, dtype=torch.int32)}, r"a.weight_scale_inv is I32 \[2, 3\], wanted"),
        ({"a_weight": torch.ones(130, 300)}, r"unknown: a.weight_scale_inv"),
        ({"b_weight_scale_inv": torch.ones(1, 1)}, r"unknown: b.weight_scale_inv"),
        ({"a_weight": torch.ones(130, 300).to(torch.float8_e5m2)}, r"a.weight is F8_E5M2, wanted one of"),
    ],
)
def test_scales_that_do_not_fit(tmp_path, change, complaint):
    weight, scales = scaled()
    tensors = {"a_weight": weight, "a_weight_scale_inv": scales, "b_weight": torch.eye(64), **change}
    paths = written(tmp_path, a={name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(CheckpointError, match=complaint):
        checkpoint.check(Weights(), paths)


def test_names_to_ignore_are_patterns(tmp_path):
    tensors = {"a_weight": torch.zeros(130, 300), "b_weight": torch.eye(64), "x.7.inv_freq": torch.ones(3)}
    paths = written(tmp_path, a={**tensors, "x.7.other": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"1 unknown: x\.7\.other"):
        checkpoint.check(Weights(), paths, ("x.*.inv_freq",))
    checkpoint.check(Weights(), paths, ("x.*.inv_freq", "x.7.*"))


def test_parameters_that_stay_in_fp32(tmp_path):
    with torch.device("meta"):
        model = nn.ModuleList([Weights(torch.float8_e4m3fn), Router(48, Routing(6, 2, has_bias=True))])
    num_bytes = checkpoint.num_bytes(model, torch.bfloat16)
    checkpoint.materialise(model, torch.bfloat16, torch.device("cpu"))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes == {
        "0.a.weight": torch.float8_e4m3fn,
        "0.b.weight": torch.bfloat16,
        "1.weight": torch.bfloat16,
        "1.e_score_correction_bias": torch.float32,
    }
    assert num_bytes == sum(p.nbytes for p in model.parameters())
