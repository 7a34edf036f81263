"""The engine on FP8 weights: --quantization fp8 at start-up, and the laws of --deterministic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_deterministic import told
from tiny import VOCAB, make_engine, make_model

from nanodeploy.ops.layouts import E4M3
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    make_model().to(torch.bfloat16).save_pretrained(directory)
    return directory


def quantised(directory, **flags):
    return make_engine(directory, quantization="fp8", **flags)


@pytest.fixture(scope="module")
def engines(directory):
    whole = quantised(directory, deterministic=True)
    return whole, quantised(directory, deterministic=True, max_num_batched_tokens=7, max_num_seqs=3)


def test_weights_are_counted_as_they_are_held(directory):
    engine = quantised(directory)
    parameters = list(engine.runner.model.parameters())
    assert {p.dtype for p in parameters} == {torch.float32, E4M3}
    held = sum(p.numel() * p.itemsize for p in parameters)
    assert engine.info["weights_bytes"] == held < make_engine(directory).info["weights_bytes"]
    assert engine.info["config"]["quantization"] == "fp8"


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_greedy_alone_batched_and_in_chunks(engines, data):
    """To the bit, tokens and log-probabilities."""
    whole, in_chunks = engines
    requests = []
    for i in range(data.draw(st.integers(2, 5))):
        length, shift = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 1))
        tokens = [(7 * j * j + 3 * j + shift) % (VOCAB - 1) for j in range(length)]
        params = SamplingParams(temperature=0, max_tokens=data.draw(st.integers(1, 10)), ignore_eos=True, logprobs=2)
        requests.append(GenerateRequest(str(i), tokens, params))
    arrivals = [data.draw(st.integers(0, 6)) for _ in requests]
    alone: dict = {}
    for request in requests:
        alone |= told(whole, [request])
    assert told(whole, requests, arrivals) == alone
    assert told(in_chunks, requests, arrivals) == alone
