"""Token events of one sequence to text: detokenized, stop strings cut off, log-probabilities kept beside it."""

from dataclasses import dataclass, field

from nanodeploy.sampling import SamplingParams
from nanodeploy.serve.parsers import Event
from nanodeploy.serve.stops import StopMatcher
from nanodeploy.serve.tokenizer import Tokenizer
from nanodeploy.wire import Logprobs, TokenEvent


@dataclass(slots=True)
class Delta:
    """What became known of one sequence. Text may lag behind the tokens: unfinished characters and possible stop
    strings are held back."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)  # beside token_ids, if asked for
    offsets: list[int] = field(default_factory=list)  # beside logprobs: where each token's text begins, in characters
    finish_reason: str | None = None
    events: list[Event] = field(default_factory=list)  # what a parser made of the text, if there is one


class TextStream:
    """Feeds on the events of one sequence. The deltas add up to the same answer however the events were cut."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        offset: int = 0,
        shown: frozenset[str] = frozenset(),
    ):
        """Without a tokenizer all text is empty. `offset` is where the text begins (behind an echoed prompt).

        `shown` are special tokens that are text even if special tokens are skipped.
        """
        skip = params.skip_special_tokens
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=skip, shown=shown) if tokenizer else None
        self._stops = StopMatcher(tuple(params.stop), params.include_stop_str_in_output)
        self._min_tokens = params.min_tokens
        self._offset = offset
        self.num_tokens = 0  # generated, the token that stopped it included
        self.finish_reason: str | None = None

    def feed(self, event: TokenEvent) -> Delta:
        """The next event. Its finish_reason, if any, is the engine's, unless a stop string comes first."""
        delta = Delta()
        if self.finish_reason is not None:
            return delta
        for position, token_id in enumerate(event.token_ids):
            self.num_tokens += 1
            delta.token_ids.append(token_id)
            if position < len(event.logprobs):
                delta.logprobs.append(event.logprobs[position])
                delta.offsets.append(self._offset)
            if self._detokenizer is not None:
                delta.text += self._show(self._detokenizer.feed(token_id))
            if self._stops.matched:
                break
        if event.finish_reason is not None and not self._stops.matched:
            self.num_tokens += event.stop_token_id is not None
            self.finish_reason = event.finish_reason
            if self._detokenizer is not None:
                delta.text += self._show(self._detokenizer.flush())
            if not self._stops.matched:
                delta.text += self._stops.flush()
        if self._stops.matched:
            self.finish_reason = "stop"
        delta.finish_reason = self.finish_reason
        return delta

    def _show(self, text: str) -> str:
        self._offset += len(text)
        # Stop strings count only in text of tokens beyond min_tokens.
        return text if self.num_tokens <= self._min_tokens else self._stops.feed(text)
