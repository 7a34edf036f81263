"""The typed messages between a front end and an engine. msgpack over ZMQ; a bad frame never becomes an object."""

from typing import Any

import msgspec

from nanodeploy.sampling import SamplingParams

VERSION = 3


class GenerateRequest(msgspec.Struct, frozen=True, tag="generate"):
    """One sequence to generate. `id` is made by the front end; clients' own ids never reach the engine."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # n is the front end's business: one GenerateRequest is one sequence
    cache_salt: str = ""  # requests share cached pages only under the same salt


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish what runs for at most `drain_s` seconds, abort the rest, exit."""

    drain_s: float


ToEngine = GenerateRequest | Abort | Shutdown


class Logprobs(msgspec.Struct, frozen=True):
    """Log-probabilities at one position: the token's own, and the likeliest ones in falling order."""

    token_id: int
    logprob: float
    rank: int  # 1 is the likeliest
    top_ids: list[int]
    top_logprobs: list[float]


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What one step brought for one request. Exactly one event of a request carries a finish_reason, the last."""

    id: str
    token_ids: list[int] = []
    logprobs: list[Logprobs] = []  # beside token_ids, if asked for
    prompt_logprobs: list[Logprobs | None] | None = None  # on the first event, if asked for; None for token 0
    finish_reason: str | None = None  # "stop", "length", "abort", "error"
    stop_token_id: int | None = None  # the token that stopped it, if one did; it is not in token_ids
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens whose KV came from the prefix cache
    error: str | None = None  # beside finish_reason "error": what to tell the user
    error_kind: str | None = None  # "request" (400), "queue_full" (503), "engine" (500)
    error_param: str | None = None


class Stats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and running totals of one engine; also its heartbeat (`num_steps` and `uptime_s` move)."""

    uptime_s: float = 0.0
    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_pages: int = 0
    num_free_pages: int = 0  # free or evictable
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Sent once, when the engine can serve."""

    version: int
    vocab_size: int
    max_model_len: int
    num_pages: int
    page_size: int
    info: dict[str, Any]  # resolved config, device, kernel choices, start-up phases with seconds


class Progress(msgspec.Struct, frozen=True, tag="progress"):
    """A phase of start-up began."""

    phase: str
    elapsed_s: float


class Events(msgspec.Struct, frozen=True, tag="events"):
    events: list[TokenEvent]
    stats: Stats


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    stats: Stats


class LabReport(msgspec.Struct, frozen=True, tag="lab"):
    """News of the kernel lab (--lab)."""

    lines: list[str]  # for the log
    state: dict[str, Any]  # the whole state, as /lab shows it


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot go on. `kind`: config (the operator's) or internal (ours)."""

    kind: str
    message: str


FromEngine = Ready | Progress | Events | Heartbeat | LabReport | Fatal

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_from_engine = msgspec.msgpack.Decoder(FromEngine).decode
