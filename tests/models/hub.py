"""The tensors of published checkpoints, name by name, from what the hub lists; written down apart from our models.

{name: (dtype as safetensors writes it, shape)}. A file of them can be made without its bytes: a sparse one.
"""

import json
import math
import os
from pathlib import Path

Tensors = dict[str, tuple[str, list[int]]]
WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
SHARD_BYTES = 3 * 2**30


def qwen3_moe(c: dict, scale_dtype: str | None) -> Tensors:
    heads, kv, e, d = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"], c["hidden_size"]
    found = embeddings(c)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found |= norms(f"{prefix}.input_layernorm", d) | norms(f"{prefix}.post_attention_layernorm", d)
        attn = f"{prefix}.self_attn"
        found |= norms(f"{attn}.q_norm", e) | norms(f"{attn}.k_norm", e)
        rows = {"q_proj": heads * e, "k_proj": kv * e, "v_proj": kv * e}
        for name, size in rows.items():
            found |= matrix(f"{attn}.{name}", size, d, scale_dtype)
        found |= matrix(f"{attn}.o_proj", d, heads * e, scale_dtype)
        found |= matrix(f"{prefix}.mlp.gate", c["num_experts"], d, None)
        for expert in range(c["num_experts"]):
            found |= mlp(f"{prefix}.mlp.experts.{expert}", c["moe_intermediate_size"], d, scale_dtype)
    return found


def deepseek_v3(c: dict, scale_dtype: str | None) -> Tensors:
    found, d, num_layers = embeddings(c), c["hidden_size"], c["num_hidden_layers"]
    for layer in range(num_layers + c["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}"
        found |= latent_layer(c, prefix, layer >= c["first_k_dense_replace"], scale_dtype)
        if layer >= num_layers:
            found |= matrix(f"{prefix}.embed_tokens", c["vocab_size"], d, None)
            found |= matrix(f"{prefix}.shared_head.head", c["vocab_size"], d, None)
            found |= matrix(f"{prefix}.eh_proj", d, 2 * d, None)
            for name in ("enorm", "hnorm", "shared_head.norm"):
                found |= norms(f"{prefix}.{name}", d)
    return found


def kimi_k2(c: dict, scale_dtype: str | None) -> Tensors:
    junk = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": ("F32", [c["qk_rope_head_dim"] // 2])
        for layer in range(c["num_hidden_layers"])
    }
    return deepseek_v3(c, scale_dtype) | junk


def latent_layer(c: dict, prefix: str, sparse: bool, scale_dtype: str | None) -> Tensors:
    d, heads, rank, q_rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"], c["q_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    attn = f"{prefix}.self_attn"
    found = norms(f"{prefix}.input_layernorm", d) | norms(f"{prefix}.post_attention_layernorm", d)
    found |= norms(f"{attn}.q_a_layernorm", q_rank) | norms(f"{attn}.kv_a_layernorm", rank)
    found |= matrix(f"{attn}.q_a_proj", q_rank, d, scale_dtype)
    found |= matrix(f"{attn}.q_b_proj", heads * (nope + rope), q_rank, scale_dtype)
    found |= matrix(f"{attn}.kv_a_proj_with_mqa", rank + rope, d, scale_dtype)
    found |= matrix(f"{attn}.kv_b_proj", heads * (nope + value), rank, scale_dtype)
    found |= matrix(f"{attn}.o_proj", d, heads * value, scale_dtype)
    if not sparse:
        return found | mlp(f"{prefix}.mlp", c["intermediate_size"], d, scale_dtype)
    found |= matrix(f"{prefix}.mlp.gate", c["n_routed_experts"], d, None)
    found[f"{prefix}.mlp.gate.e_score_correction_bias"] = ("F32", [c["n_routed_experts"]])
    inner = c["moe_intermediate_size"]
    found |= mlp(f"{prefix}.mlp.shared_experts", c["n_shared_experts"] * inner, d, scale_dtype)
    for expert in range(c["n_routed_experts"]):
        found |= mlp(f"{prefix}.mlp.experts.{expert}", inner, d, scale_dtype)
    return found


def embeddings(c: dict) -> Tensors:
    found = norms("model.norm", c["hidden_size"])
    for name in ("model.embed_tokens", "lm_head"):
        found |= matrix(name, c["vocab_size"], c["hidden_size"], None)
    return found


def norms(name: str, dim: int) -> Tensors:
    return {f"{name}.weight": ("BF16", [dim])}


def mlp(name: str, inner: int, dim: int, scale_dtype: str | None) -> Tensors:
    found = matrix(f"{name}.gate_proj", inner, dim, scale_dtype) | matrix(f"{name}.up_proj", inner, dim, scale_dtype)
    return found | matrix(f"{name}.down_proj", dim, inner, scale_dtype)


def matrix(name: str, rows: int, columns: int, scale_dtype: str | None) -> Tensors:
    """With scales beside it where it is quantised, one for each block of 128 x 128."""
    if scale_dtype is None:
        return {f"{name}.weight": ("BF16", [rows, columns])}
    return {
        f"{name}.weight": ("F8_E4M3", [rows, columns]),
        f"{name}.weight_scale_inv": (scale_dtype, [math.ceil(rows / 128), math.ceil(columns / 128)]),
    }


def write(directory: Path, config: dict, tensors: Tensors) -> Path:
    """A checkpoint of these tensors that takes no room on the disk: all but the headers of its shards are holes."""
    shards: list[dict] = [{}]
    end = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = math.prod(shape) * WIDTHS[dtype]
        if end + num_bytes > SHARD_BYTES:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    for index, header in enumerate(shards):
        text = json.dumps(header).encode()
        path = directory / f"model-{index}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 8 + len(text) + max(tensor["data_offsets"][1] for tensor in header.values()))
    (directory / "config.json").write_text(json.dumps(config))
    return directory
