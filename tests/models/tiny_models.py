"""Tiny random models of every family, made by transformers, and ours built from what they save."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from nanodeploy import catalog
from nanodeploy.models import registry

VOCAB = 300

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.12,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 0,
    "eos_token_id": None,
}
QWEN3 = {**COMMON, "num_key_value_heads": 2, "head_dim": 16}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
DEEPSEEK = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_mtp_layers": 0,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}
RECIPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, QWEN3),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**QWEN3, "moe_intermediate_size": 24, "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True},
    ),
    "deepseek_v3": (DeepseekV3ForCausalLM, DeepseekV3Config, DEEPSEEK),
    "kimi_k2": (  # transformers has no class for it; `save` writes its model_type
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            **DEEPSEEK,
            "n_group": 1,
            "topk_group": 1,
            "n_routed_experts": 24,
            "routed_scaling_factor": 2.827,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {**YARN, "beta_fast": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "rope_theta": 50000.0},
        },
    ),
}
FAMILIES = tuple(RECIPES)


def hf_model(seed: int = 0, family: str = "qwen3", **changes) -> PreTrainedModel:
    """A transformers model in fp32 whose every weight matters: norm gains are not 1, projections not near zero, the
    biases of routers not 0, and routers sure of their choice."""
    model_class, config_class, settings = RECIPES[family]
    torch.manual_seed(seed)
    config = config_class(**{**settings, **changes})
    config._experts_implementation = "eager"  # others want sizes of 16 bytes
    model = model_class(config).eval().requires_grad_(False)
    model.family = family
    for name, tensor in model.state_dict().items():
        if name.endswith("norm.weight"):
            tensor.copy_(1 + 0.2 * torch.randn(tensor.shape))
        elif name.endswith(".gate.weight"):
            tensor.normal_(0, 0.4)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0, 0.1)
    return model


def save(model: PreTrainedModel, directory: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """As the hub has it: the biases of routers in fp32 whatever the rest is in, no tensor that is empty."""
    stored = copy.deepcopy(model).to(dtype)
    for module, original in zip(stored.modules(), model.modules(), strict=True):
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = copy.deepcopy(original.e_score_correction_bias)
    state = {name: tensor for name, tensor in stored.state_dict().items() if tensor.numel()}
    stored.save_pretrained(directory, state_dict=state, **options)
    if model.family not in (model.config.model_type, "qwen3"):
        change_config(directory, model_type=model.family)
    return directory


def change_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def load_hf(directory: Path, dtype: torch.dtype = torch.float32, family: str = "qwen3") -> PreTrainedModel:
    """Not `.to(dtype)`, which would round transformers' rotary frequencies too."""
    model_class, config_class, _ = RECIPES[family]
    settings = json.loads((directory / "config.json").read_text())
    settings.pop("model_type")  # as it reads a checkpoint, transformers goes by this; of kimi_k2 it knows nothing
    config = config_class(**settings)
    config._experts_implementation = "eager"
    return model_class.from_pretrained(directory, config=config, dtype=dtype).eval().requires_grad_(False)


def build(directory: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **options):
    options = {"load_format": "auto", "seed": 0, **options}
    return registry.build(catalog.locate(str(directory)), dtype=dtype, device=torch.device(device), **options)


def prompt(length: int, vocab: int = VOCAB, seed: int = 0) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(theirs: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Logits [len(tokens), V] in fp32."""
    return theirs(torch.tensor([tokens])).logits[0].float()
