"""Which tokens may come next: grammars run by llguidance, token by token, as masks over the vocabulary.

Used by the engine, and by the process that tries a grammar before the engine sees it (serve/grammar_worker.py).
"""

from collections.abc import Sequence

import llguidance
import numpy as np

from nanodeploy.errors import ConfigError, RequestError

MAX_MESSAGE_CHARS = 300


def _limits() -> llguidance.LLParserLimits:
    """Bounds by llguidance's own figures: some 20 ms to begin with, 5 ms a mask, 100 MB of lexer states.

    They do not bound everything (multipleOf a large prime takes 20 s): hence serve/grammar_worker.py.
    """
    return llguidance.LLParserLimits(
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=50_000,
        step_max_items=20_000,
        max_items_in_row=2_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class Vocabulary:
    """A tokenizer's tokens as bytes. Takes about a second to make; one serves all grammars."""

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]):
        """`tokenizer_json` is the text of tokenizer.json, `vocab_size` the width of the logits. Raises ConfigError."""
        ends = [id for id in eos_token_ids if 0 <= id < vocab_size]
        self.ends = frozenset(ends)
        if not ends:
            raise ConfigError("The model names no end token, which structured output needs.")
        try:
            self.tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=ends)
        except ValueError as error:
            raise ConfigError(f"Structured output cannot be used with this tokenizer: {error}.") from error
        self.num_words = (vocab_size + 31) // 32  # uint32 of one mask


class Grammar:
    """A compiled grammar, from which every sequence takes a matcher of its own."""

    def __init__(self, vocabulary: Vocabulary, text: str):
        """Compiles without holding Python's lock. Raises RequestError on a grammar that is wrong or too big."""
        self._vocabulary = vocabulary
        self._matcher = llguidance.LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=_limits())
        _check(self._matcher)

    def matcher(self) -> "Matcher":
        """At the beginning. Matchers of one grammar share what its automaton has learned."""
        return Matcher(self._vocabulary, self._matcher.deep_copy())


class Matcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, vocabulary: Vocabulary, matcher: llguidance.LLMatcher):
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._past_end = 0  # end tokens behind the sentence, of which llguidance keeps no count

    def mask(self) -> bytes:
        """The tokens that may come next, as packed uint32: bit i % 32 of word i // 32. Only end tokens when it is done.

        Raises RequestError when the grammar grows over the limits here.
        """
        mask = self._matcher.compute_bitmask()
        _check(self._matcher)
        return mask[: self._vocabulary.num_words * 4]

    def accept(self, token_id: int) -> bool:
        """Go on by one token. False if it may not stand here; then nothing has changed.

        Raises RequestError when the grammar grows over the limits here.
        """
        if self._matcher.try_consume_tokens([token_id]) == 1:
            return True
        _check(self._matcher)
        ends = self.is_done and token_id in self._vocabulary.ends
        self._past_end += ends
        return ends

    def accepted(self, token_ids: Sequence[int]) -> int:
        """How many of a draft's tokens may follow. Nothing changes."""
        return self._matcher.validate_tokens(list(token_ids))

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens that were accepted."""
        past_end = min(num_tokens, self._past_end)
        self._past_end -= past_end
        done = self._matcher.rollback(num_tokens - past_end)
        assert done, self._matcher.get_error()

    @property
    def may_end(self) -> bool:
        """Whether the text so far is a whole sentence of the grammar."""
        return self._matcher.is_accepting()

    @property
    def is_done(self) -> bool:
        """Whether nothing but an end token may follow."""
        return self._matcher.is_stopped()


class MaskFiller:
    """Fills the masks of a batch in parallel, without Python's lock."""

    def __init__(self, num_threads: int | None = None):
        self._executor = llguidance.LLExecutor(num_threads)

    def fill(self, rows: Sequence[tuple[Matcher, int]], masks: np.ndarray) -> None:
        """Write each matcher's mask into its row of `masks`, [rows, words] int32, C-contiguous.

        A matcher that is over its limits gets only end tokens: ask `failed`.
        """
        if rows:
            each = [(matcher._matcher, row) for matcher, row in rows]
            num_rows, num_words = self._shape(masks)
            self._executor.unsafe_compute_mask_ptr(each, masks.ctypes.data, num_words * 4, num_rows)

    def fill_drafts(self, rows: Sequence[tuple[Matcher, int, list[int]]], masks: np.ndarray) -> None:
        """The same for drafts of at least one token: row for the first, and a row behind it after each token."""
        if rows:
            each = [(matcher._matcher, row, draft) for matcher, row, draft in rows]
            num_rows, num_words = self._shape(masks)
            assert all(row + len(draft) < num_rows for _, row, draft in rows)
            self._executor.unsafe_compute_mask_ptr_with_draft_token(each, masks.ctypes.data, num_words * 4, num_rows)

    @staticmethod
    def _shape(masks: np.ndarray) -> tuple[int, int]:
        assert masks.dtype == np.int32 and masks.flags.c_contiguous and masks.ndim == 2
        return masks.shape[0], masks.shape[1]


def failed(matcher: Matcher) -> str:
    """What went wrong with a matcher; "" if nothing did."""
    return _message(matcher._matcher)


def _message(matcher: llguidance.LLMatcher) -> str:
    if not matcher.is_error():
        return ""
    return matcher.get_error().partition("\n")[0][:MAX_MESSAGE_CHARS] or "unknown error"


def _check(matcher: llguidance.LLMatcher) -> None:
    if message := _message(matcher):
        raise RequestError(message)
