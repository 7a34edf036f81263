"""Published checkpoints, by their config.json and the names, shapes and dtypes of their tensors, fit our models."""

import math
from pathlib import Path

import hub
import pytest

from nanodeploy import catalog
from nanodeploy.errors import CheckpointError, ConfigError
from nanodeploy.models import checkpoint, registry

CONFIGS = Path(__file__).parent / "configs"
PUBLISHED = {  # name: (its tensors, dtype of the scales, billions of parameters as its card says)
    "Qwen3-30B-A3B-FP8": (hub.qwen3_moe, "BF16", 30.5),
    "Qwen3-235B-A22B": (hub.qwen3_moe, None, 235),
    "Qwen3-Coder-480B-A35B-Instruct": (hub.qwen3_moe, None, 480),
    "DeepSeek-V3": (hub.deepseek_v3, "F32", 671),
    "Kimi-K2-Instruct": (hub.kimi_k2, "F32", 1026),
}


def config_of(name: str) -> dict:
    return catalog.read_json(CONFIGS / f"{name}.json")


def checked(directory: Path):
    """The model of a checkpoint, which fits it."""
    model = registry.skeleton(catalog.locate(str(directory)))
    checkpoint.check(model, checkpoint.shards(directory), model.ignored_tensors)
    return model


def is_model(config: dict, name: str) -> bool:
    drafting = any(name.startswith(f"model.layers.{config['num_hidden_layers'] + i}.") for i in range(3))
    return not (drafting or name.endswith(("inv_freq", "_scale_inv")))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_checkpoint_fits(name, tmp_path):
    tensors_of, scale_dtype, billions = PUBLISHED[name]
    config = config_of(name)
    tensors = tensors_of(config, scale_dtype)
    model = checked(hub.write(tmp_path, config, tensors))
    wanted = sum(math.prod(shape) for name, (_, shape) in tensors.items() if is_model(config, name))
    got = sum(p.numel() for n, p in model.named_parameters() if not n.endswith(("weight_scale_inv", "_scales")))
    assert got == wanted == pytest.approx(billions * 1e9, rel=2e-3)


def test_what_a_published_checkpoint_may_not_lack_nor_have(tmp_path):
    config = {**config_of("DeepSeek-V3"), "num_hidden_layers": 5, "n_routed_experts": 16}
    tensors = hub.deepseek_v3(config, "F32")
    attn, mlp = "model.layers.4.self_attn", "model.layers.4.mlp"
    tensors["model.layers.3.self_attn.rotary_emb.inv_freq"] = ("F32", [32])  # junk of Kimi-K2 alone
    tensors["model.layers.6.enorm.weight"] = ("BF16", [7168])  # one drafting layer more than the config has
    tensors[f"{mlp}.gate.weight_scale_inv"] = ("F32", [1, 56])
    tensors[f"{attn}.kv_b_proj.weight_scale_inv"] = ("F32", [256, 3])
    tensors[f"{mlp}.experts.3.up_proj.weight_scale_inv"] = ("F32", [16, 55])
    del tensors[f"{mlp}.gate.e_score_correction_bias"], tensors[f"{mlp}.experts.15.down_proj.weight"]
    with pytest.raises(CheckpointError) as error:
        checked(hub.write(tmp_path, config, tensors))
    text = str(error.value)
    assert f"2 missing: {mlp}.gate.e_score_correction_bias, {mlp}.experts.15.down_proj.weight" in text
    assert "3 unknown: " in text and "inv_freq" in text and "enorm" in text and "gate.weight_scale_inv" in text
    assert "2 of the wrong form: " in text and "kv_b_proj.weight_scale_inv is F32 [256, 3], wanted [256, 4]" in text
    assert "up_proj.weight_scale_inv is [16, 55], wanted [16, 56]" in text


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("DeepSeek-V3", {"n_routed_experts": 250}, "n_routed_experts 250 is no multiple of n_group 8"),
        ("DeepSeek-V3", {"topk_group": 9}, "topk_group is 9; there are 8 groups"),
        ("DeepSeek-V3", {"topk_group": 0}, "topk_group is 0"),
        ("DeepSeek-V3", {"num_experts_per_tok": 129}, r"num_experts_per_tok is 129; 4 of 8 groups .*keep 128"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("DeepSeek-V3", {"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63"),
        ("DeepSeek-V3", {"q_lora_rank": 0}, "q_lora_rank is 0"),
        ("DeepSeek-V3", {"kv_lora_rank": None}, "no kv_lora_rank"),
        ("DeepSeek-V3", {"num_key_value_heads": 8}, "num_key_value_heads is 8"),
        ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave is False"),
        ("DeepSeek-V3", {"n_shared_experts": -1}, "n_shared_experts is -1"),
        ("DeepSeek-V3", {"first_k_dense_replace": "3"}, "first_k_dense_replace is '3'"),
        ("DeepSeek-V3", {"moe_layer_freq": 0}, "moe_layer_freq is 0"),
        ("DeepSeek-V3", {"norm_topk_prob": 1}, "norm_topk_prob is 1"),
        ("DeepSeek-V3", {"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ("Kimi-K2-Instruct", {"n_group": 7}, "n_routed_experts 384 is no multiple of n_group 7"),
        ("Kimi-K2-Thinking", {}, "compressed-tensors"),
        ("Qwen3-235B-A22B", {"num_experts_per_tok": 129}, "num_experts_per_tok is 129; there are 128"),
        ("Qwen3-235B-A22B", {"num_experts": None}, "no num_experts"),
        ("Qwen3-235B-A22B", {"num_experts": "128"}, "num_experts is '128'"),
        ("Qwen3-235B-A22B", {"mlp_only_layers": [-1]}, r"mlp_only_layers is \[-1\]"),
        ("Qwen3-235B-A22B", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("Qwen3-235B-A22B", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64"),
        ("Qwen3-235B-A22B", {"use_sliding_window": True}, "use_sliding_window is True"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_before_anything_is_read(name, change, words, tmp_path):
    config = {key: value for key, value in {**config_of(name), **change}.items() if value is not None}
    (tmp_path / "config.json").write_text(hub.json.dumps(config))
    with pytest.raises(ConfigError, match=words):
        registry.skeleton(catalog.locate(str(tmp_path)))


def test_the_family_is_told_by_the_model_type_where_an_architecture_has_two():
    assert catalog.family(config_of("Kimi-K2-Instruct")) == "kimi_k2"
    assert catalog.family(config_of("DeepSeek-V3")) == "deepseek_v3"
    assert catalog.family({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "mine"}) == "deepseek_v3"
    assert catalog.family({"model_type": "kimi_k2"}) == "kimi_k2"
