"""The scheduler: who runs in the next step, with how many tokens, in which pages. Pure Python.

The policy: one token budget per step. Running decodes first, then prefill chunks, then new requests in order of
arrival, mixed in one step. When pages run out the youngest is preempted: it gives up its pages and later computes its
tokens again. Whoever waits is younger than whoever runs, so the oldest always gets on and nobody starves.

Step n+1 is planned and launched while step n runs, so the tokens of step n are unknown here. What a plan needs, it can
count: each sequence that samples has one token pending. Only a stop is not foreseen: then step n+1 has computed one
token too many for that sequence, and settle() drops it. Its pages and its row are free at once nevertheless, for the
device runs steps in the order of their launch: whoever gets them writes in step n+2 or later.
"""

import itertools
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from nanodeploy.runtime.pages import PagePool, extend_digests
from nanodeploy.runtime.request import Phase, Request
from nanodeploy.wire import Abort, Logprobs, TokenEvent


@dataclass(slots=True)
class Chunk:
    """Known tokens of one sequence whose KV this step computes."""

    request: Request
    start: int  # position of the first
    num_tokens: int
    samples: bool  # it reaches the end of the sequence, so its last row gives the next token
    scored: range  # positions whose logits give the next prompt token's log-probability, if those were asked for


@dataclass(slots=True)
class StepPlan:
    """One step. In the batch, the decodes stand before the chunks."""

    decodes: list[Request] = field(default_factory=list)  # each computes its newest token, which the device knows
    positions: list[int] = field(default_factory=list)  # of those tokens
    chunks: list[Chunk] = field(default_factory=list)
    sampled: list[Request] = field(default_factory=list)  # the decodes, then the chunks that sample: one token each
    placed: list[Request] = field(default_factory=list)  # got a row in this plan
    grown: list[tuple[int, int, list[int]]] = field(default_factory=list)  # row, pages it had, pages it got
    num_preempted: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(slots=True)
class StepResult:
    """What a step brought, in the order of its plan."""

    tokens: Sequence[int]  # beside plan.sampled
    logprobs: dict[int, Logprobs] = field(default_factory=dict)  # index into plan.sampled -> if asked for
    prompt_logprobs: list[tuple[Request, list[Logprobs]]] = field(default_factory=list)


class Scheduler:
    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        prefix_caching: bool,
    ) -> None:
        assert max_num_batched_tokens >= max_num_seqs, "every running sequence needs its token in every step"
        self.pool = pool
        self.page_size = page_size
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.prefix_caching = prefix_caching
        self.requests: dict[str, Request] = {}  # all that have not ended
        self.waiting: OrderedDict[str, Request] = OrderedDict()  # oldest first
        self.running: list[Request] = []  # oldest first
        self.free_rows = list(range(max_num_seqs - 1, -1, -1))
        self.events: list[TokenEvent] = []  # of requests that ended outside a step
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0

    def admit(self, inbox: deque[Request | Abort]) -> None:
        """Empty the inbox: new requests join the queue, aborted ones end wherever they are. Unknown ids are skipped."""
        while inbox:
            message = inbox.popleft()
            if isinstance(message, Request):
                self.requests[message.id] = message
                self.waiting[message.id] = message
            else:
                for request_id in message.ids:
                    if request := self.requests.get(request_id):
                        self.events.append(self.end(request, "abort"))

    def plan(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute. Counts it as launched: the caller launches it."""
        plan = StepPlan()
        budget = self.max_num_batched_tokens
        for request in self.running:  # oldest first; preempt() takes from the other end
            self.publish(request)
            if request.num_tokens == request.limit:
                continue  # its last token is in flight
            if not self.grow(request, plan):
                break  # it was the youngest itself
            budget -= self.schedule(request, budget, plan)
        while self.waiting and budget and len(self.running) < self.max_num_seqs and not plan.num_preempted:
            request = next(iter(self.waiting.values()))
            if not self.place(request, plan):
                break
            budget -= self.schedule(request, budget, plan)
        plan.sampled = plan.decodes + [chunk.request for chunk in plan.chunks if chunk.samples]
        if not plan.decodes and not plan.chunks:
            return None
        self.num_steps += 1
        return plan

    def settle(self, plan: StepPlan | None, result: StepResult | None) -> list[TokenEvent]:
        """Append what a finished step sampled, end what is over, and return what there is to tell.

        Plan n must be settled before plan n+2 is made. A request that was preempted in between takes its token as any
        other; one that ended leaves it.
        """
        events, self.events = self.events, []
        if plan is None or result is None:
            return events
        for request, scores in result.prompt_logprobs:
            if request.prompt_logprobs is not None:
                request.prompt_logprobs += scores
        for index, (request, token) in enumerate(zip(plan.sampled, result.tokens)):
            if request.phase is Phase.FINISHED:
                continue
            request.num_pending -= 1
            request.tokens.append(token)
            self.num_generated_tokens += 1
            if token in request.stop_ids:
                events.append(self.end(request, "stop", stop_token_id=token))
                continue
            logprobs = [result.logprobs[index]] if index in result.logprobs else []
            if len(request.tokens) == request.limit:
                events.append(self.end(request, "length", [token], logprobs))
            else:
                events.append(event(request, [token], logprobs))
        return events

    # The moves of a request.

    def place(self, request: Request, plan: StepPlan) -> bool:
        """WAITING -> RUNNING: a row, and pages for all its tokens, as many as possible from the prefix cache.

        Its last token is computed in any case, for its logits are wanted; so are all if their log-probabilities are.
        One page per running sequence must be left to grow into, or the next step would preempt again.
        """
        assert not request.num_pending, "a preempted request is placed after its last step was settled"
        num_tokens = len(request.tokens)
        num_reusable = 0
        if self.prefix_caching:
            unscored = request.prompt_logprobs is not None and request.num_scored < request.num_prompt - 1
            num_reusable = (request.num_scored if unscored else num_tokens - 1) // self.page_size
            extend_digests(request.digests, request.tokens, num_reusable, self.page_size, request.salt)
        wanted = itertools.islice(request.digests, num_reusable)
        taken = self.pool.acquire(wanted, -(-num_tokens // self.page_size), spare=len(self.running))
        if taken is None:
            return False
        request.pages, request.num_published = taken
        request.num_computed = request.num_published * self.page_size
        request.decoding = False
        request.row = self.free_rows.pop()
        request.phase = Phase.RUNNING
        del self.waiting[request.id]
        self.running.append(request)
        plan.placed.append(request)
        plan.grown.append((request.row, 0, list(request.pages)))
        if request.num_cached is None:
            request.num_cached = request.num_computed
            self.num_prompt_tokens += num_tokens
            self.num_prefix_queries += num_tokens
            self.num_prefix_hits += request.num_cached
        return True

    def grow(self, request: Request, plan: StepPlan) -> bool:
        """A page for its next token, if it needs one. Preempts the youngest until there is one; False if that is it."""
        if request.num_computed < len(request.pages) * self.page_size:
            return True
        while not self.pool.num_available:
            youngest = self.running[-1]
            self.preempt(youngest, plan)
            if youngest is request:
                return False
        pages = self.pool.allocate(1)
        plan.grown.append((request.row, len(request.pages), pages))
        request.pages += pages
        return True

    def schedule(self, request: Request, budget: int, plan: StepPlan) -> int:
        """Give a running request as many of its tokens as the budget allows. Returns how many."""
        start = request.num_computed
        if request.decoding:
            plan.decodes.append(request)
            plan.positions.append(start)
            request.num_computed = start + 1
            request.num_pending += 1
            return 1
        num_tokens = min(len(request.tokens) - start, budget)
        request.num_computed = end = start + num_tokens
        scored = range(0)
        if request.prompt_logprobs is not None:
            scored = range(max(start, request.num_scored), min(end, request.num_prompt - 1))
            request.num_scored = max(request.num_scored, scored.stop)
        request.decoding = end == len(request.tokens)
        request.num_pending += request.decoding
        plan.chunks.append(Chunk(request, start, num_tokens, request.decoding, scored))
        return num_tokens

    def preempt(self, request: Request, plan: StepPlan) -> None:
        """RUNNING -> WAITING, ahead of the others. A token in flight stays valid and arrives with settle()."""
        self.release(request)
        self.waiting[request.id] = request
        self.waiting.move_to_end(request.id, last=False)
        request.phase = Phase.WAITING
        plan.num_preempted += 1
        self.num_preemptions += 1

    def end(
        self,
        request: Request,
        reason: str,
        token_ids: list[int] | None = None,
        logprobs: list[Logprobs] | None = None,
        stop_token_id: int | None = None,
    ) -> TokenEvent:
        """Any phase -> FINISHED. Returns its last event."""
        if request.phase is Phase.RUNNING:
            self.release(request)
        else:
            del self.waiting[request.id]
        del self.requests[request.id]
        request.phase = Phase.FINISHED
        return event(request, token_ids or [], logprobs or [], reason, stop_token_id)

    def release(self, request: Request) -> None:
        """Take a running request's row and pages. What it computed stays to be found, as long as pages last."""
        self.publish(request)
        self.running.remove(request)
        self.free_rows.append(request.row)
        self.pool.release(request.pages)
        request.row = -1
        request.pages = []

    def publish(self, request: Request) -> None:
        """Let others find its pages that are full and computed.

        Computed means: by a step that is launched. A request placed now reads them in a later step, and the device
        runs steps in order, so it reads what was written. The step being planned is not launched yet: plan() comes
        here before it schedules a request, and places new ones, which could find the pages, after that.
        """
        num_full = min(request.num_computed, len(request.tokens)) // self.page_size
        if num_full <= request.num_published or not self.prefix_caching:
            return
        extend_digests(request.digests, request.tokens, num_full, self.page_size, request.salt)
        for page in range(request.num_published, num_full):
            self.pool.publish(request.pages[page], request.digests[page])
        request.num_published = num_full


def event(
    request: Request,
    token_ids: list[int],
    logprobs: list[Logprobs],
    finish_reason: str | None = None,
    stop_token_id: int | None = None,
) -> TokenEvent:
    """What to tell of one request. Its prompt's log-probabilities go with the first event."""
    prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
    return TokenEvent(
        id=request.id,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish_reason=finish_reason,
        stop_token_id=stop_token_id,
        num_prompt_tokens=request.num_prompt,
        num_cached_tokens=request.num_cached or 0,
    )
