"""Tokens to text: stop strings, UTF-8, tokenizers; the same answer however the stream is cut."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import make_tokenizer

from nanodeploy.errors import CheckpointError
from nanodeploy.sampling import SamplingParams
from nanodeploy.serve.stops import StopMatcher
from nanodeploy.serve.text import TextStream
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import Logprobs, TokenEvent

few_letters = st.text("ab")
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)


def cut(data: st.DataObject, items):
    """The items in pieces, at any places."""
    places = sorted(data.draw(st.lists(st.integers(0, len(items)), max_size=6)))
    return [items[a:b] for a, b in zip([0, *places], [*places, len(items)], strict=True)]


def truth(text: str, stops: list[str], include: bool) -> tuple[str, bool]:
    """The match that ends first; of those that end there, the longest."""
    for end in range(1, len(text) + 1):
        here = [stop for stop in stops if text[:end].endswith(stop)]
        if here:
            return text[: end if include else end - max(map(len, here))], True
    return text, False


@settings(max_examples=400)  # each takes microseconds
@given(few_letters, stop_lists, st.booleans(), st.data())
def test_stop_strings_are_found_at_every_split(text: str, stops: list[str], include: bool, data: st.DataObject) -> None:
    matcher = StopMatcher(tuple(stops), include)
    shown = "".join(map(matcher.feed, cut(data, text)))
    shown += matcher.flush()
    assert (shown, matcher.matched) == truth(text, stops, include)


@settings(max_examples=400)
@given(few_letters, stop_lists)
def test_no_more_is_held_back_than_a_stop_string_could_need(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(tuple(stops))
    shown = ""
    for i, char in enumerate(text):
        shown += matcher.feed(char)
        if matcher.matched:
            return
        tails = [n for stop in stops for n in range(len(stop)) if text[: i + 1].endswith(stop[:n])]
        assert shown == text[: i + 1 - max(tails)]


def test_stop_matching_is_linear() -> None:
    matcher = StopMatcher(tuple("a" * (1000 - i) + "b" for i in range(64)))
    began = time.perf_counter()
    for _ in range(1000):
        matcher.feed("a" * 200)
    assert time.perf_counter() - began < 3  # 200,000 characters; a quadratic matcher needs minutes
    assert len(matcher.flush()) == 1000


@pytest.fixture(scope="module", params=["byte_level", "generic"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp(request.param)
    make_tokenizer(directory, request.param)
    return Tokenizer(directory)


ids = st.lists(st.integers(0, 620), max_size=30)  # some that the tokenizer does not have


@settings(max_examples=200)
@given(ids=ids, skip=st.booleans())
def test_decoding_is_the_tokenizers_own(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    if tokenizer._byte_level:
        expected = tokenizer._tokenizer.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("text", ["Grüße 😀😀 日本語!", "hello  world\n\n  x", "<|im_start|>user\nhi<|im_end|>", ""])
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=True)
    expected = text
    if not tokenizer._byte_level:
        expected = tokenizer._tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == expected


def test_a_character_is_shown_whole_or_not_at_all(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    letters = {
        bytes([b]): i for i in range(600) if len(tokenizer.token_bytes(i)) == 1 for b in tokenizer.token_bytes(i)
    }
    stream = tokenizer.detokenizer()
    pieces = [stream.feed(letters[bytes([byte])]) for byte in "a😀é".encode()]
    assert pieces == ["a", "", "", "", "😀", "", "é"] and stream.flush() == ""
    for byte in "😀".encode()[:3]:
        assert stream.feed(letters[bytes([byte])]) == ""
    assert stream.flush() == "\ufffd"


def test_token_texts(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    by_text = {tokenizer.token_text(i): i for i in range(520)}
    assert tokenizer.token_bytes(by_text[" world"]) == b" world"
    assert "<|im_end|>" in by_text and "bytes:\\xe2" in by_text
    assert tokenizer.token_bytes(10**9) == b""


@settings(max_examples=200)
@given(ids=ids, data=st.data())
def test_an_answer_does_not_depend_on_how_its_events_were_cut(
    tokenizer: Tokenizer, ids: list[int], data: st.DataObject
) -> None:
    """Stop strings are pieces of the text, or go on where it ends."""
    text = tokenizer.decode(ids, skip_special_tokens=data.draw(st.booleans())) + "xy"
    places = st.integers(0, len(text) - 1)
    spans = data.draw(st.lists(st.tuples(places, st.integers(1, 4)), max_size=3))
    stops = [text[start : start + length] for start, length in spans]
    params = SamplingParams(
        stop=stops,
        include_stop_str_in_output=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
        min_tokens=data.draw(st.integers(0, 4)),
        max_tokens=100,
        logprobs=0,
    )

    def answer(pieces: list[list[int]]):
        stream = TextStream(tokenizer, params)
        text, tokens, offsets = "", [], []
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            logprobs = [Logprobs(t, -1.0, 1, [], []) for t in piece]
            delta = stream.feed(
                TokenEvent(id="x", token_ids=piece, logprobs=logprobs, finish_reason="length" if last else None)
            )
            text, tokens, offsets = text + delta.text, tokens + delta.token_ids, offsets + delta.offsets
            assert [p.token_id for p in delta.logprobs] == delta.token_ids
        return text, tokens, offsets, stream.finish_reason, stream.num_tokens

    whole = answer([ids])
    assert answer(cut(data, ids)) == whole
    free = tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
    if not stops:
        assert whole[0] == free
    elif params.min_tokens == 0:
        assert whole[0] == truth(free, stops, params.include_stop_str_in_output)[0]
    assert free.startswith(whole[0])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 1}'])
def test_a_damaged_tokenizer_is_the_operators_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
