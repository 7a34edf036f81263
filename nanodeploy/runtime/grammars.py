"""Grammars in the engine: compiled beside the loop, one matcher per sequence, one mask per step and sequence.

How this goes with overlapping steps. Step n+1 is launched while step n runs, but the mask of a constrained sequence
needs its token of step n here. So of a step that has such a sequence only the forward pass is launched ahead, which
needs no mask. The host then waits for step n, as it does in every step; takes its tokens into the matchers; fills the
masks, while the device is busy with the forward pass of n+1; and launches the masks and the sampling behind that.
A step without constrained sequences is launched whole, as if there were no grammars.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np

from nanodeploy.errors import ConfigError, RequestError
from nanodeploy.matcher import Grammar, MaskFiller, Matcher, Vocabulary, failed
from nanodeploy.runtime.request import Phase, Request

MAX_COMPILED = 128  # grammars kept for the next request that brings the same
NUM_THREADS = 2
PATIENCE_S = 0.002  # of a loop that has nothing to do but wait for a grammar
NO_TOKENIZER = "This model has no tokenizer, which grammars need."

Failure = tuple[Request, str]  # and what to tell its user


class Grammars:
    def __init__(self, tokenizer_json: Path | None, vocab_size: int, eos_ids: Iterable[int]):
        """Compiles nothing yet. `vocab_size` is the width of the logits."""
        self.tokenizer_json = tokenizer_json
        self.vocab_size, self.eos_ids = vocab_size, sorted(eos_ids)
        self.matchers: dict[str, Matcher] = {}  # request id -> where its answer stands, until it ends
        self._waiting: dict[str, tuple[Request, Future[Grammar]]] = {}
        self._compiled: OrderedDict[str, Future[Grammar]] = OrderedDict()
        self._threads = ThreadPoolExecutor(NUM_THREADS, "grammar")
        self._filler: MaskFiller | None = None
        self._vocabulary: Vocabulary | None = None
        self._unusable = "" if tokenizer_json else NO_TOKENIZER
        self._lock = threading.Lock()  # of the vocabulary

    def check(self) -> None:
        """Raises RequestError if this model can follow no grammar."""
        if self._unusable:
            raise RequestError(self._unusable, param="grammar")

    def add(self, request: Request) -> None:
        """Begin to compile what the request brings. It is in `ready` when that is over."""
        text = request.params.grammar
        assert text is not None
        future = self._compiled.get(text)
        if future is None:
            future = self._compiled[text] = self._threads.submit(self._compile, text)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(text)
        self._waiting[request.id] = request, future

    def ready(self) -> Iterator[tuple[Request, str]]:
        """The requests whose grammars are compiled, or have failed with that message. Returns at once."""
        for id, (request, future) in list(self._waiting.items()):
            if not future.done():
                continue
            del self._waiting[id]
            try:
                self.matchers[id] = future.result().matcher()
            except (RequestError, ConfigError) as error:
                yield request, f"The grammar cannot be used: {error}"
            else:
                yield request, ""

    def wait(self) -> None:
        """Until one of the grammars is compiled, for a moment at most."""
        wait([future for _, future in self._waiting.values()], PATIENCE_S, "FIRST_COMPLETED")

    def withdraw(self, id: str) -> Request | None:
        """A request that waits for its grammar needs it no longer."""
        request, _ = self._waiting.pop(id, (None, None))
        return request

    def prepare(self) -> None:
        """Read the vocabulary before it is wanted: that takes up to a second, and no other thread of Python runs."""
        if self._vocabulary is None and not self._unusable:
            try:
                self._read_vocabulary()
            except ConfigError as error:
                self._unusable = str(error)

    def follow(self, sampled: Sequence[Request], tokens: Sequence[int]) -> Iterator[Failure]:
        """Take a settled step's tokens into the matchers. What ended with its token needs no more of its matcher."""
        for request, token in zip(sampled, tokens):
            matcher = self.matchers.get(request.id)
            if matcher is None or request.phase is Phase.FINISHED:
                continue
            try:
                if not matcher.accept(token):
                    yield request, "No token was left that the grammar and the sampling parameters allow."
            except RequestError as error:
                yield request, f"The grammar grew over its limits: {error}"

    def constrains(self, sampled: Sequence[Request]) -> bool:
        """Whether a step needs masks."""
        return bool(self.matchers) and any(request.id in self.matchers for request in sampled)

    def fill(self, sampled: Sequence[Request], masks: np.ndarray) -> tuple[list[int], list[Failure]]:
        """Write the mask of each sequence that has one to the next row of `masks`, [rows, words] int32.

        Returns whose they are, as indices into `sampled`, and whose grammar failed.
        """
        if self._filler is None:
            self._filler = MaskFiller()
        whose = [i for i, r in enumerate(sampled) if r.id in self.matchers and r.phase is not Phase.FINISHED]
        self._filler.fill([(self.matchers[sampled[i].id], row) for row, i in enumerate(whose)], masks)
        failures = []
        for row, i in enumerate(whose):
            request = sampled[i]
            if message := failed(self.matchers[request.id]):
                failures.append((request, f"The grammar grew over its limits: {message}"))
            # The token sampled now is number num_tokens, for it is counted as pending already.
            elif request.num_tokens - request.num_prompt <= request.params.min_tokens:
                forbid(masks[row], request.stop_ids)
        return whose, failures

    def forget(self, ids: Iterable[str]) -> None:
        """These requests have ended."""
        if self.matchers:
            for id in ids:
                self.matchers.pop(id, None)

    @property
    def are_compiling(self) -> bool:
        return bool(self._waiting)

    @property
    def num_words(self) -> int:
        """int32 of a mask."""
        return -(-self.vocab_size // 32)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _compile(self, text: str) -> Grammar:
        return Grammar(self._read_vocabulary(), text)

    def _read_vocabulary(self) -> Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                assert self.tokenizer_json is not None
                text = self.tokenizer_json.read_text(encoding="utf-8")
                self._vocabulary = Vocabulary(text, self.vocab_size, self.eos_ids)
            return self._vocabulary


def forbid(mask: np.ndarray, token_ids: Iterable[int]) -> None:
    """Take the tokens out of a mask, [words] int32, unless nothing would be left: then the grammar is done."""
    less = mask.view(np.uint32).copy()
    for token in token_ids:
        less[token // 32] &= np.uint32(~(1 << token % 32) & 0xFFFFFFFF)
    if less.any():
        mask[:] = less.view(np.int32)
