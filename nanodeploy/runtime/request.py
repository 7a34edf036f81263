"""A request inside the engine: its tokens, and how far they have come. Only the scheduler writes one."""

import enum
from array import array
from dataclasses import dataclass, field

from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest, Logprobs


class Phase(enum.Enum):
    """Where a request stands. Disaggregation will add ARRIVING (its KV is on the way) and HELD (awaits collection)."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(eq=False, slots=True)
class Request:
    """One sequence. Lengths are in tokens.

    A step is planned before the tokens of the step before it are known, so three numbers say where a sequence stands:
    `len(tokens)` are known here, `num_pending` more are sampled but still on the device, and the KV of the first
    `num_computed` is in the cache for every step launched from now on.
    """

    id: str
    tokens: array  # int64: the prompt, then what was generated
    num_prompt: int
    params: SamplingParams
    salt: str
    seed: int
    stop_ids: frozenset[int]
    limit: int  # length at which it ends with "length"
    plain: bool  # nothing is asked of the sampler but ops.sample

    phase: Phase = Phase.WAITING
    row: int = -1  # of the device's per-sequence state, while it runs
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    decoding: bool = False  # its newest token lies in last_tokens[row] on the device
    digests: list[bytes] = field(default_factory=list)  # of its full pages, as far as they were needed
    num_published: int = 0  # leading pages that the prefix cache knows
    num_cached: int | None = None  # prompt tokens found in the prefix cache when it first ran
    num_scored: int = 0  # leading positions whose prompt log-probabilities are launched
    prompt_logprobs: list[Logprobs | None] | None = None  # gathered for its first event

    @classmethod
    def of(cls, message: GenerateRequest, *, eos_ids: frozenset[int], seed: int, max_model_len: int) -> "Request":
        """`seed` serves a request that brings none."""
        params = message.params
        num_prompt = len(message.prompt_token_ids)
        ends = not params.ignore_eos or params.grammar is not None
        max_tokens = max_model_len if params.max_tokens is None else params.max_tokens
        return cls(
            id=message.id,
            tokens=array("q", message.prompt_token_ids),
            num_prompt=num_prompt,
            params=params,
            salt=message.cache_salt,
            seed=seed if params.seed is None else params.seed,
            stop_ids=frozenset(params.stop_token_ids) | (eos_ids if ends else frozenset()),
            limit=min(num_prompt + max_tokens, max_model_len),
            plain=(
                (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
                and not params.logit_bias
                and params.min_tokens == 0
                and params.logprobs is None
                and params.grammar is None
            ),
            prompt_logprobs=None if params.prompt_logprobs is None else [None],
        )

    @property
    def num_tokens(self) -> int:
        """Its length, the token in flight included."""
        return len(self.tokens) + self.num_pending
