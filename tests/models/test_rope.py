from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config, Qwen3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanodeploy import catalog
from nanodeploy.models.layers.rope import Rope

CONFIGS = Path(__file__).parent / "configs"

POSITIVE = st.floats(0.5, 64.0)
EXTRAS = st.fixed_dictionaries(
    {"factor": st.floats(1.0, 40.0)},
    optional={
        "original_max_position_embeddings": st.integers(16, 4000),
        "beta_fast": st.floats(8.0, 64.0),
        "beta_slow": st.floats(0.5, 4.0),
        "attention_factor": st.floats(0.1, 2.0),
        "mscale": POSITIVE,
        "mscale_all_dim": POSITIVE,
        "truncate": st.booleans(),
    },
)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["default", "linear", "yarn"]),
    extras=EXTRAS,
    theta=st.sampled_from([1e4, 1e6, 5e6]),
    head_dim=st.sampled_from([6, 16, 64, 128]),
    max_len=st.integers(16, 3000),
    old_form=st.booleans(),
)
def test_the_table_is_what_transformers_computes(kind, extras, theta, head_dim, max_len, old_form):
    if kind != "yarn":
        extras = {"factor": extras["factor"]}
    parameters = {} if kind == "default" else {**extras, "rope_type": kind}
    sizes = {"head_dim": head_dim, "max_position_embeddings": max_len}
    theirs = Qwen3RotaryEmbedding(
        Qwen3Config(**sizes, rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters})
    )
    if old_form:
        config = {**sizes, "rope_theta": theta, "rope_scaling": parameters or None}
    else:
        config = {**sizes, "rope_parameters": {**parameters, "rope_theta": theta}}
    rope = Rope.from_hf(config, head_dim)
    table = rope.table()
    assert table.shape == (rope.max_len, head_dim) and table.dtype == torch.float32 and rope.max_len >= max_len
    cos, sin = theirs(torch.zeros(1), torch.arange(len(table))[None])
    # One ulp of the frequency, times the position, is what two orders of the same arithmetic may differ by.
    tolerance = {"rtol": 1e-5, "atol": 2e-7 * len(table) * rope.gain + 1e-6}
    torch.testing.assert_close(
        table, torch.cat((cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]), -1), **tolerance
    )


def test_yarn_as_the_model_cards_turn_it_on():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = {"max_position_embeddings": 40960, "rope_theta": 1000000, "rope_scaling": scaling}
    rope = Rope.from_hf(config, 128)
    assert rope.max_len == 131072
    assert abs(rope.gain - 1.1386) < 1e-4
    plain = Rope.from_hf({**config, "rope_scaling": None}, 128)
    assert plain.max_len == 40960 and plain.gain == 1.0
    assert not torch.allclose(rope.table()[:100], plain.table()[:100])


@settings(max_examples=30, deadline=None)
@given(
    extras=EXTRAS,
    dim=st.sampled_from([4, 8, 64]),
    theta=st.sampled_from([1e4, 5e4]),
    kind=st.sampled_from(["default", "yarn"]),
)
def test_latent_attention_turns_fewer_dims_and_scales_all(extras, dim, theta, kind):
    parameters = {"rope_theta": theta, "rope_type": kind, **(extras if kind == "yarn" else {})}
    sizes = {"qk_rope_head_dim": dim, "max_position_embeddings": 300}
    config = DeepseekV3Config(**sizes, rope_parameters=dict(parameters), num_attention_heads=1, num_key_value_heads=1)
    rope = Rope.from_hf({**sizes, "rope_parameters": parameters}, dim)
    cos, sin = DeepseekV3RotaryEmbedding(config)(torch.zeros(1), torch.arange(rope.max_len)[None])
    wanted = torch.cat((cos[0, :, : dim // 2], sin[0, :, : dim // 2]), -1)
    torch.testing.assert_close(rope.table(), wanted, rtol=1e-5, atol=2e-7 * rope.max_len * rope.gain + 1e-6)
    with torch.device("meta"):
        scaling = DeepseekV3Attention(config, 0).scaling
    assert scaling == pytest.approx((128 + dim) ** -0.5 * rope.logit_gain)


def test_the_logit_gains_of_published_models():
    gains = {
        name: Rope.from_hf(catalog.read_json(CONFIGS / f"{name}.json"), 64)
        for name in ("DeepSeek-V3", "Kimi-K2-Instruct")
    }
    assert [round(rope.logit_gain**0.5, 4) for rope in gains.values()] == [1.3689, 1.3466]
    assert all(rope.gain == 1 for rope in gains.values())
    assert [rope.max_len for rope in gains.values()] == [163840, 131072]
    # With both betas 1 a pair is slowed by all of the factor or by nothing.
    assert set(gains["Kimi-K2-Instruct"]._slowed().tolist()) == {0.0, 1.0}
