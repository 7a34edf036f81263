import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from nanodeploy.models.layers.rope import Rope

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
