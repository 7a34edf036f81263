"""The reference sampler: its noise, its filters and its statistics, against specifications written another way."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanodeploy.ops.sample import cases
from nanodeploy.ops.sample.reference import gumbel, philox, sample, survivors

INF = math.inf


def run(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=0, positions=0) -> list[int]:
    """The reference on rows of logits; scalars stand for every row."""
    rows = torch.as_tensor(logits, dtype=torch.float32)
    dtypes = (torch.float32, torch.int32, torch.float32, torch.float32, torch.int64, torch.int64)
    asked = (temperature, top_k, top_p, min_p, seeds, positions)
    columns = [torch.as_tensor(a, dtype=dtype).expand(len(rows)) for a, dtype in zip(asked, dtypes)]
    return sample.reference(rows, *columns).tolist()


def draws(logits, count: int, **asked) -> np.ndarray:
    """How often each token comes up at `count` successive positions of one request."""
    tokens = run(torch.tensor([logits]).expand(count, -1), positions=torch.arange(count), **asked)
    return np.bincount(tokens, minlength=len(logits))


# ---- the specification once more, in numpy and plain loops


def noise_by_hand(seed: int, position: int, token: int) -> float:
    """The Gumbel noise of one token, in Python's own integers."""
    word = 2**32
    counter = [token // 4, 0, position % word, position // word % word]
    key = [seed % word, seed // word % word]
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b // word ^ counter[1] ^ key[0], b % word, a // word ^ counter[3] ^ key[1], a % word]
        key = [(key[0] + 0x9E3779B9) % word, (key[1] + 0xBB67AE85) % word]
    u = np.float32(np.float32(counter[token % 4]) + np.float32(0.5)) * np.float32(2.0**-32)
    return -math.log(-math.log1p(-float(min(u, np.float32(1 - 2.0**-24)))))


def kept_by_hand(x: list[float], t: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """What the filters leave, one token at a time from the likeliest on."""
    order = sorted((i for i in range(len(x)) if x[i] > -INF), key=lambda i: -x[i])
    if top_k > 0:
        order = [i for i in order if x[i] >= x[order[min(top_k, len(order)) - 1]]]
    mass = {i: math.exp((x[i] - x[order[0]]) / t) for i in order}
    if top_p < 1:
        reached, last = 0.0, order[0]
        for i in order:
            if reached >= top_p * math.fsum(mass.values()):
                break
            reached, last = reached + mass[i], i
        order = [i for i in order if x[i] >= x[last]]
    return {i for i in order if mass[i] >= min_p}


def by_hand(x: list[float], t: float, top_k: int, top_p: float, min_p: float, seed: int, position: int) -> int:
    if t < 1e-5:
        return max(range(len(x)), key=lambda i: (x[i], -i))
    kept = kept_by_hand(x, t, top_k, top_p, min_p)
    return max(kept, key=lambda i: (x[i] / t + noise_by_hand(seed, position, i), -i))


# Coarse logits bring ties; odd fractions keep exact thresholds out of rounding's reach.
LOGITS = st.lists(st.sampled_from([-INF, -3.0, -0.5, 0.0, 0.25, 1.0, 2.0, 4.0, 7.5]), min_size=1, max_size=11).filter(
    lambda x: max(x) > -INF
)
ROW = st.tuples(
    LOGITS,
    st.sampled_from([0.0, 1e-6, 0.31, 0.7, 1.0, 3.0]),
    st.sampled_from([-1, 0, 1, 2, 3, 5, 100]),
    st.sampled_from([1e-9, 0.123, 0.4567, 0.789, 0.9876, 1.0]),
    st.sampled_from([0.0, 0.0123, 0.3456, 1.0]),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**40),
)


@settings(max_examples=300, deadline=None)
@given(ROW)
def test_reference_is_the_specification(row):
    x, *asked = row
    names = ("temperature", "top_k", "top_p", "min_p", "seeds", "positions")
    assert run([x], **dict(zip(names, asked))) == [by_hand(*row)]


@settings(max_examples=200, deadline=None)
@given(ROW.filter(lambda row: row[1] > 0.1))
def test_filters_leave_exactly_the_right_set(row):
    x, t, top_k, top_p, min_p, *_ = row
    kept = survivors(
        torch.tensor([x]).double(), torch.tensor([[t]]).double(), *(torch.tensor([v]) for v in (top_k, top_p, min_p))
    )
    possible = {i for i in kept[0].nonzero().squeeze(1).tolist() if x[i] > -INF}
    assert possible == kept_by_hand(x, t, top_k, top_p, min_p)


# ---- the noise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers that Random123 ships for philox4x32-10
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter, key, words):
    def tensors(text):
        return tuple(torch.tensor(int(word, 16)) for word in text.split())

    assert philox(tensors(counter), tensors(key)) == tensors(words)


def test_noise_of_a_token_does_not_depend_on_the_vocabulary():
    seeds, positions = torch.tensor([5, -7]), torch.tensor([3, 2**33 + 1])
    assert torch.equal(gumbel(seeds, positions, 1001)[:, :77], gumbel(seeds, positions, 77))


def test_noise_is_standard_gumbel_and_finite():
    values = gumbel(torch.tensor([1]), torch.tensor([0]), 400_000)[0].numpy()
    assert np.isfinite(values).all()
    assert abs(values.mean() - np.euler_gamma) < 5 * math.pi / math.sqrt(6 * len(values))
    # Kolmogorov-Smirnov: under 1.95 / sqrt(n) with 99.9 % confidence
    expected = np.exp(-np.exp(-np.sort(values)))
    assert np.abs(expected - (np.arange(len(values)) + 0.5) / len(values)).max() < 1.95 / math.sqrt(len(values))


# ---- the statistics


@pytest.mark.parametrize("seed", [0, 1, -(2**62)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(seed, temperature):
    logits = [0.0, 1.0, 2.0, -1.0, 0.5, -INF, 1.5, 0.1, 2.2]
    count = 20_000
    seen = draws(logits, count, temperature=temperature, seeds=seed)
    assert seen[5] == 0
    p = torch.softmax(torch.tensor(logits) / temperature, dim=0).numpy()
    possible = p > 0
    chi_square = (((seen - count * p) ** 2)[possible] / (count * p[possible])).sum()
    assert chi_square < 26.1  # 7 degrees of freedom, 99.95 %


@pytest.mark.parametrize(
    ("asked", "support"),
    [
        ({"top_k": 2}, {1, 2, 4}),  # 4 ties with the second
        ({"top_k": 1}, {2}),
        ({"top_p": 0.6}, {1, 2, 4}),
        ({"top_p": 1e-9}, {2}),
        ({"min_p": 0.3}, {1, 2, 4}),
        ({"min_p": 1.0}, {2}),
        ({"top_k": 3, "top_p": 0.6}, {1, 2, 4}),
        ({"top_k": 3, "top_p": 0.55}, {2}),  # 0.576 of the top three, 0.512 of all
        ({"top_k": 1, "top_p": 0.5, "min_p": 0.01}, {2}),
        ({"top_k": 1000}, {0, 1, 2, 3, 4}),
    ],
)
def test_filtered_draws_follow_the_softmax_of_what_is_left(asked, support):
    logits = [0.0, 1.0, 2.0, -0.5, 1.0]  # softmax 0.07, 0.19, 0.51, 0.04, 0.19
    count = 10_000
    seen = draws(logits, count, **asked)
    assert set(np.flatnonzero(seen)) == support
    kept = sorted(support)
    p = torch.softmax(torch.tensor(logits)[kept], dim=0).numpy()
    assert (((seen[kept] - count * p) ** 2) / (count * p)).sum() < 23.5  # 4 degrees of freedom, 99.99 %


def test_seeds_are_independent_of_each_other_and_of_positions():
    flat = torch.zeros(3000, 2)
    first = np.array(run(flat, seeds=1, positions=torch.arange(3000)))
    for other in (
        run(flat, seeds=2, positions=torch.arange(3000)),
        run(flat, seeds=1, positions=torch.arange(1, 3001)),
    ):
        agreeing = (first == np.array(other)).mean()
        assert abs(agreeing - 0.5) < 0.04  # 4 sigma


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9), st.randoms(use_true_random=False))
def test_a_row_is_the_same_alone_shuffled_and_in_any_company(seed, num_seqs, shuffler):
    args = cases.make(cases.Case(torch.float32, num_seqs, 101), torch.device("cpu"), seed)
    together = sample.reference(*args)
    order = list(range(num_seqs))
    shuffler.shuffle(order)
    assert torch.equal(sample.reference(*(a[order] for a in args)), together[order])
    for row in range(num_seqs):
        assert torch.equal(sample.reference(*(a[row : row + 1] for a in args)), together[row : row + 1])


# ---- the edges


def test_edge_rows():
    nan = math.nan
    assert run([[-INF, -INF, -INF]], temperature=0.0) == [0]
    assert run([[-INF, -INF, -INF]], top_k=2, top_p=0.5, min_p=0.1) == [0]
    assert run([[nan, -1.0, nan, -2.0]], temperature=0.0) == [1]
    assert set(run([[nan, -1.0, nan, -INF]] * 50, positions=torch.arange(50))) == {1}
    assert run([[0.0, INF, 5.0]]) == [1]
    assert run([[3.0, 7.0, 7.0, 1.0]], temperature=0.0) == [1]
    assert run(torch.empty(0, 5)) == []


def test_agrees_rejects_wrong_tokens():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.9], [0.0, 3.0, 1.0, 2.9]])
    temperature, top_k = torch.tensor([0.0, 1.0]), torch.tensor([0, 2], dtype=torch.int32)
    seeds = positions = torch.zeros(2, dtype=torch.int64)
    args = (logits, temperature, top_k, torch.ones(2), torch.zeros(2), seeds, positions)
    case = cases.of(*args)
    right = sample.reference(*args)
    assert cases.agrees(args, right, right, case) is None
    for row in range(2):
        for token in {0, 1, 2, 3, 4, -1} - {int(right[row])}:
            wrong = right.clone()
            wrong[row] = token
            assert cases.agrees(args, wrong, right, case), f"token {token} passed in row {row}"
