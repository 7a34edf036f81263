"""What the sampler does to logits, and the log-probabilities it reports, against the slow way, logit by logit."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import edited

from nanodeploy.runtime import sampler as sampler_module
from nanodeploy.runtime.request import Request
from nanodeploy.runtime.sampler import Sampler, score
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest

VOCAB, NUM_ROWS = 9, 5
EOS = VOCAB - 1
token_ids = st.integers(0, VOCAB - 1)
asked = st.tuples(
    st.lists(token_ids, min_size=1, max_size=5),  # prompt
    st.lists(token_ids, max_size=5),  # generated already
    st.builds(
        SamplingParams,
        presence_penalty=st.sampled_from([0.0, 1.5, -1.0]),
        frequency_penalty=st.sampled_from([0.0, 0.8]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
        logit_bias=st.none() | st.dictionaries(token_ids, st.sampled_from([-100.0, -3.0, 4.0]), max_size=4),
        stop_token_ids=st.lists(token_ids, max_size=2),
        ignore_eos=st.booleans(),
        min_tokens=st.integers(0, 5),
        max_tokens=st.just(20),
    ),
)


def made(prompt, out, params, row):
    message = GenerateRequest(str(row), prompt, params)
    request = Request.of(message, eos_ids=frozenset([EOS]), seed=0, max_model_len=100)
    request.tokens.extend(out)
    request.num_pending = 1  # as the scheduler leaves it: the token to be sampled is counted
    request.row = row
    return request


@given(batches=st.lists(st.lists(asked, min_size=1, max_size=NUM_ROWS), min_size=1, max_size=3), data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edited_logits(dtype, batches, data):
    """Rows change hands from batch to batch, and what the last owner left must not be seen."""
    sampler = Sampler(NUM_ROWS, VOCAB, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "SLICE", 2)
        for number, batch in enumerate(batches):
            rows = data.draw(st.permutations(range(NUM_ROWS)))[: len(batch)]
            requests = [made(*one, row) for one, row in zip(batch, rows)]
            sampler.place(requests)
            raw = 3 * torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(number))
            raw = raw.to(dtype)
            before = raw.clone()
            special = [(i, r) for i, r in enumerate(requests) if not r.plain]
            penalised = [i for i, r in special if sampler_module.penalised(r.params)]
            indices = torch.tensor(penalised) if penalised else None
            got = sampler.edit(special, raw, indices, torch.tensor(rows))
            assert torch.equal(raw, before), "the raw logits are needed for log-probabilities"
            for row, (prompt, out, params), request in zip(range(len(batch)), batch, requests):
                wanted = edited(raw[row].float(), prompt, out, params, request.stop_ids)
                torch.testing.assert_close(got[row].float(), wanted, atol=1e-5, rtol=1e-5)


def test_plain_requests_cost_no_copy():
    sampler = Sampler(NUM_ROWS, VOCAB, torch.device("cpu"))
    request = made([1], [], SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=1), 0)
    assert request.plain
    logits = torch.randn(1, VOCAB)
    assert sampler.edit([], logits, None, torch.tensor([0])) is logits
    sampler.place([request])
    assert sampler.num_outputs is None and sampler.in_prompt is None


def test_tokens_are_left_for_the_next_step_and_counted():
    sampler = Sampler(NUM_ROWS, VOCAB, torch.device("cpu"))
    greedy = {"temperature": 0, "max_tokens": 9}
    requests = [
        made([1], [], SamplingParams(**greedy), 3),
        made([1], [], SamplingParams(**greedy, presence_penalty=1.0), 0),
    ]
    sampler.place(requests)
    logits = torch.zeros(2, VOCAB)
    logits[0, 4] = logits[1, 6] = 1
    zeros = torch.zeros(NUM_ROWS)
    fields = SimpleNamespace(
        rows=torch.tensor([3, 0, NUM_ROWS]),
        temperature=zeros,
        top_k=zeros.int(),
        top_p=zeros + 1,
        min_p=zeros,
        seeds=zeros.long(),
        sample_positions=zeros.long(),
    )
    tokens, scores = sampler.sample(requests, logits, fields)
    assert tokens.tolist() == [4, 6] and scores is None
    assert sampler.last_tokens.tolist() == [6, 0, 0, 4, 0, 0]
    assert sampler.num_outputs.nonzero().tolist() == [[0, 6]]


@given(num_rows=st.integers(1, 5), num_top=st.integers(0, 20), seed=st.integers(0, 9))
def test_scores_are_made_slice_by_slice(num_rows, num_top, seed):
    g = torch.Generator().manual_seed(seed)
    logits, tokens = torch.randn(num_rows, VOCAB, generator=g), torch.randint(VOCAB, (num_rows,), generator=g)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "SLICE", 2)
        sizes = []

        def rows(part):
            sizes.append(part.stop - part.start)
            return logits[part]

        scores = score(rows, tokens, num_top).messages([num_top] * num_rows)
    assert max(sizes) <= 2 and sum(sizes) == num_rows
    raw = logits.log_softmax(-1)
    for got, token, row in zip(scores, tokens.tolist(), raw):
        falling = np.argsort(-row.numpy())
        assert got.top_ids == falling[: min(num_top, VOCAB)].tolist()
        assert got.rank == falling.tolist().index(token) + 1
        assert got.logprob == pytest.approx(row[token].item(), abs=1e-6)
