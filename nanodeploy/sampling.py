"""SamplingParams: what a request may ask of the sampler, under the names vLLM's users know."""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec.structs import force_setattr, replace

from nanodeploy.errors import RequestError

MAX_N = 128
MAX_STOPS = 64
MAX_LOGIT_BIAS = 1024
MAX_GRAMMAR_CHARS = 1 << 20
# What a model's generation_config.json may set where a request says nothing.
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to turn logits into tokens, and when to stop.

    The order is: penalties, logit_bias, min_tokens mask, grammar, temperature, top_k, top_p, min_p, then a Gumbel draw
    that depends on (seed, position) alone. temperature 0 takes the largest logit (the lowest token id of equals).
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 or -1: off
    min_p: float = 0.0
    presence_penalty: float = 0.0  # output tokens
    frequency_penalty: float = 0.0  # output tokens
    repetition_penalty: float = 1.0  # prompt and output tokens, 1 is off
    logit_bias: dict[int, float] | None = None  # token id -> added to its logit
    seed: int | None = None
    stop: list[str] = []
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16  # None: to the end of the context
    ignore_eos: bool = False
    logprobs: int | None = None  # the sampled token's log-probability plus this many of the likeliest
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    # What the answer must follow, in the language of nanodeploy.matcher.Grammar. It says when the answer may end, so
    # ignore_eos means nothing beside it. A server has it tried in another process first (serve/grammar_check.py).
    grammar: str | None = None

    def __post_init__(self) -> None:
        """As vLLM's users write it: `stop` may be one string, and both lists of stops may be None."""
        if not isinstance(self.stop, list):
            force_setattr(self, "stop", [self.stop] if isinstance(self.stop, str) else list(self.stop or ()))
        if self.stop_token_ids is None:
            force_setattr(self, "stop_token_ids", [])

    def nth(self, index: int) -> "SamplingParams":
        """What the engine sees of one of `n` answers: n=1, a seed of its own, no text; the prompt is scored once."""
        seed = None if self.seed is None else (self.seed + index + 2**63) % 2**64 - 2**63
        prompt_logprobs = self.prompt_logprobs if index == 0 else None
        return replace(self, n=1, seed=seed, stop=[], prompt_logprobs=prompt_logprobs)

    def check(self, *, vocab_size: int, max_logprobs: int) -> None:
        """Raise RequestError naming the first parameter out of range. Called at the edge and again by the engine."""

        def want(ok: bool, param: str, wanted: str) -> None:
            if not ok:
                value = repr(getattr(self, param))
                shown = value if len(value) <= 100 else value[:100] + "..."
                raise RequestError(f"{param} is {shown}; wanted {wanted}.", param=param)

        for name in ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
            want(math.isfinite(getattr(self, name)), name, "a finite number")
        want(1 <= self.n <= MAX_N, "n", f"1 to {MAX_N}")
        want(0 <= self.temperature <= 100, "temperature", "0 to 100")
        want(0 < self.top_p <= 1, "top_p", "more than 0, at most 1")
        want(-1 <= self.top_k <= 2**31 - 1, "top_k", "-1 or 0 (off), or a positive number")
        want(0 <= self.min_p <= 1, "min_p", "0 to 1")
        want(-2 <= self.presence_penalty <= 2, "presence_penalty", "-2 to 2")
        want(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "-2 to 2")
        want(0 < self.repetition_penalty <= 100, "repetition_penalty", "more than 0, at most 100")
        want(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        want(
            len(self.stop) <= MAX_STOPS and all(0 < len(s) <= 1024 for s in self.stop),
            "stop",
            f"at most {MAX_STOPS} strings of 1 to 1024 characters",
        )
        want(
            len(self.stop_token_ids) <= MAX_STOPS and all(0 <= t < vocab_size for t in self.stop_token_ids),
            "stop_token_ids",
            f"at most {MAX_STOPS} token ids below {vocab_size}",
        )
        want(self.max_tokens is None or 1 <= self.max_tokens < 2**31, "max_tokens", "at least 1")
        want(0 <= self.min_tokens <= (self.max_tokens or 2**31), "min_tokens", "0 to max_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            want(value is None or 0 <= value <= max_logprobs, name, f"0 to {max_logprobs}")
        if self.grammar is not None and not 0 < len(self.grammar) <= MAX_GRAMMAR_CHARS:
            raise RequestError(f"grammar: wanted 1 to {MAX_GRAMMAR_CHARS} characters.", param="grammar")
        if self.logit_bias is not None:
            ok = len(self.logit_bias) <= MAX_LOGIT_BIAS and all(
                0 <= token < vocab_size and math.isfinite(bias) and -100 <= bias <= 100
                for token, bias in self.logit_bias.items()
            )
            want(ok, "logit_bias", f"at most {MAX_LOGIT_BIAS} token ids below {vocab_size}, each with -100 to 100")


def model_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters that a model's generation_config.json sets. An explicit do_sample=false means greedy."""
    found = {name: generation_config.get(name) for name in MODEL_DEFAULTS}
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    return {name: value for name, value in found.items() if isinstance(value, int | float)}
