"""The runner: the only one that touches the device. It launches a planned step and, later, waits for it."""

import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanodeploy.models.model import LanguageModel
from nanodeploy.ops.layouts import Cache
from nanodeploy.runtime.graphs import Graphs
from nanodeploy.runtime.request import Request
from nanodeploy.runtime.sampler import Sampler, Scores, download, score, upload
from nanodeploy.runtime.scheduler import Chunk, StepPlan, StepResult
from nanodeploy.runtime.step import Fields, Form, StepInputs
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest

MARGIN = 1.2  # the host has more to do in a step than to launch it


@dataclass
class InFlight:
    """A launched step, and what of it is on the way to the host."""

    plan: StepPlan
    logits: Tensor | None  # [len(plan.sampled), V], until tokens are sampled from them; None if none are to be
    fields: Fields[Tensor]
    prompt_scores: list[tuple[Chunk, Scores]]
    done: torch.cuda.Event | None  # recorded after all that; None on a CPU, where everything is done already
    tokens: Tensor | None = None  # [len(plan.sampled)] int64; None if nothing was sampled
    scores: Scores | None = None  # of the sampled tokens whose requests want log-probabilities


class Runner:
    def __init__(
        self,
        model: LanguageModel,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_pages: int,
        page_size: int,
        device: torch.device,
        split_tokens: int = 0,
    ):
        """`caches` are to be set before the first step. `split_tokens` as in StepInputs."""
        self.model = model
        self.device = device
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.caches: list[Cache] = []
        self.graphs: Graphs | None = None
        self.sizes: dict[str, Any] = {
            "max_num_seqs": max_num_seqs,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_pages": max_pages,
            "page_size": page_size,
            "device": device,
            "split_tokens": split_tokens,
        }
        self.inputs = StepInputs(**self.sizes)
        self.sampler = Sampler(max_num_seqs, model.vocab_size, device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan, masked: bool = False) -> InFlight:
        """Start a step. Returns as soon as its work is queued; the tokens it needs from earlier steps may be unborn.

        `masked`: the sampling waits for masks; `sample` is to follow, before the next step.
        """
        self.sampler.place(plan.placed)
        graphs = self.graphs
        form, fields = self.inputs.load(plan, graphs.padded) if graphs else self.inputs.load(plan)
        hidden = graphs.run(form) if graphs and graphs.covers(form) else self.forward(form)
        num_sampled = len(plan.sampled)
        in_flight = InFlight(
            plan,
            self.model.logits(hidden[:num_sampled]) if num_sampled else None,
            fields,
            self.score_prompts(plan, hidden[num_sampled:]),
            torch.cuda.Event() if self.device.type == "cuda" else None,
        )
        if not masked:
            self.sample(in_flight)
        return in_flight

    @torch.inference_mode()
    def sample(self, in_flight: InFlight, masked: Sequence[int] = ()) -> None:
        """The rest of a launch, queued behind it. `masked` as in Sampler.sample."""
        if in_flight.logits is not None:
            sampled = in_flight.plan.sampled
            tokens, scores = self.sampler.sample(sampled, in_flight.logits, in_flight.fields, masked)
            in_flight.tokens, in_flight.scores, in_flight.logits = download(tokens), scores and scores.to_host(), None
        if in_flight.done:
            in_flight.done.record()

    def wait(self, in_flight: InFlight | None) -> StepResult | None:
        """What a launched step brought. Waits for this step alone, not for those launched after it."""
        if in_flight is None:
            return None
        if in_flight.done:
            in_flight.done.synchronize()
        result = StepResult([] if in_flight.tokens is None else in_flight.tokens.tolist())
        if in_flight.scores:
            num_top = {i: r.params.logprobs for i, r in enumerate(in_flight.plan.sampled) if not r.plain}
            wanted = {index: k for index, k in num_top.items() if k is not None}
            result.logprobs = dict(zip(wanted, in_flight.scores.messages(list(wanted.values()))))
        for chunk, scores in in_flight.prompt_scores:
            k = chunk.request.params.prompt_logprobs or 0
            result.prompt_logprobs.append((chunk.request, scores.messages([k] * len(chunk.scored))))
        return result

    @torch.inference_mode()
    def warm_up(self, max_model_len: int) -> int:
        """Run steps of the sizes to come, so that code is compiled and memory is asked for. Returns the most bytes
        that torch held meanwhile, with those the penalties' state may take later. `caches` need no more than one page.
        """
        max_chunk = min(max_model_len - 1, self.max_num_batched_tokens)
        if self.device.type != "cuda":
            self.warm_up_step(0, [min(3, max_chunk)])
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        num_chunks = min(self.max_num_seqs, self.max_num_batched_tokens // max_chunk)
        self.warm_up_step(0, [max_chunk] * num_chunks)
        num_decodes = self.max_num_seqs - 1
        self.warm_up_step(num_decodes, [min(max_chunk, self.max_num_batched_tokens - num_decodes)])
        self.warm_up_step(min(2, num_decodes), [min(3, max_chunk)])  # sizes that no power of two divides
        self.warm_up_masks()
        return torch.cuda.max_memory_reserved() + self.sampler.penalty_state_bytes

    def warm_up_step(self, num_decodes: int, chunk_lens: list[int]) -> None:
        self.wait(self.launch(self.made_up(num_decodes, chunk_lens)))

    def warm_up_masks(self) -> None:
        in_flight = self.launch(self.made_up(0, [1]), masked=True)
        self.sampler.masks_to_fill()[0] = -1  # all tokens are allowed
        self.sample(in_flight, [0])
        self.wait(in_flight)

    def made_up(self, num_decodes: int, chunk_lens: list[int]) -> StepPlan:
        """A step of sequences of nobody, all in page 0."""
        requests = []
        for row in range(num_decodes + len(chunk_lens)):
            message = GenerateRequest("", [0], SamplingParams())
            requests.append(Request.of(message, eos_ids=frozenset(), seed=0, max_model_len=2))
            requests[row].row = row
        plan = StepPlan(decodes=requests[:num_decodes], positions=[0] * num_decodes, sampled=requests, placed=requests)
        for request, num_tokens in zip(requests[num_decodes:], chunk_lens, strict=True):
            request.tokens = array("q", bytes(8 * num_tokens))
            plan.chunks.append(Chunk(request, 0, num_tokens, True, range(0)))
        return plan

    @torch.inference_mode()
    def use_graphs(self) -> None:
        """From here on, steps whose launches cost are captured on their first run and replayed after.

        The largest graph is captured at once, so that later ones find their memory in its pool.
        """
        self.graphs = Graphs(self.forward, self.max_num_seqs, self.launch_bound_tokens())
        self.prepare()

    @torch.inference_mode()
    def prepare(self) -> bool:
        """Capture one more graph ahead of its use. False: all of the decodes' are there."""
        form = self.graphs.missing() if self.graphs else None
        if self.graphs is None or form is None:
            return False
        self.inputs.load_nothing(form)
        self.graphs.run(form)
        return True

    @torch.inference_mode()
    def compile(self) -> None:
        """Have the layers compiled, for one token and for any number of them.

        Compiled and not, the layers launch the same kernels. What is saved is some of the launches' time, in steps that
        are no CUDA graph.
        """
        self.model.compile_layers()
        for form in (Form(64, 8, 2, 4), Form(1, 1, 0, 1)):
            if form.num_tokens <= self.max_num_batched_tokens and form.num_decodes <= self.max_num_seqs:
                self.inputs.load_nothing(form)
                self.model(self.inputs.batch(form), self.caches)

    def recapture(self) -> None:
        """Forget the graphs: the kernels in them have changed."""
        if self.graphs:
            torch.cuda.synchronize()
            self.graphs.forget()

    def release(self) -> None:
        """Let go of what the device holds, now: the graphs know the runner, so it would wait for the garbage collector,
        and an engine started meanwhile would take the memory for its own step's."""
        self.graphs = None
        self.caches.clear()

    def launch_bound_tokens(self) -> int:
        """Up to how many tokens a mixed step takes the host about as long to launch as the device to run: measured."""
        # Many tokens, or launching is all that the device's time would show; chunks no longer than a context may be.
        chunk = min(self.max_num_batched_tokens, self.sizes["max_pages"] * self.sizes["page_size"])
        chunks = [chunk] * min(self.max_num_seqs, self.max_num_batched_tokens // chunk)
        num_tokens = sum(chunks)
        form, _ = self.inputs.load(self.made_up(0, chunks))
        times = [0.0, 1.0]
        for _ in range(2):  # the first may compile
            torch.cuda.synchronize()
            began = time.perf_counter()
            self.forward(form)
            launched = time.perf_counter()
            torch.cuda.synchronize()
            times = [launched - began, time.perf_counter() - began]
        return min(self.max_num_batched_tokens, int(MARGIN * times[0] / times[1] * num_tokens))

    def forward(self, form: Form) -> Tensor:
        """The model on what lies in the buffers, after the decodes' tokens were fetched from where the last step left
        them. Returns hidden states [N, D]. This is what a graph holds.
        """
        batch, num_decodes = self.inputs.batch(form), form.num_decodes
        if num_decodes:
            rows = self.inputs.buffers(form).device.decode_rows[:num_decodes]
            tokens = batch.tokens[:num_decodes]
            if form.num_chunks:  # padding decodes may stand where chunks' tokens lie
                newest = self.sampler.last_tokens[rows]
                tokens.copy_(torch.where(rows < self.inputs.nobody, newest, tokens))
            else:
                torch.index_select(self.sampler.last_tokens, 0, rows, out=tokens)
        return self.model(batch, self.caches)

    def score_prompts(self, plan: StepPlan, hidden: Tensor) -> list[tuple[Chunk, Scores]]:
        """`hidden` are the rows of all chunks' `scored` positions; each is scored on the prompt token that follows."""
        results, first = [], 0
        for chunk in plan.chunks:
            if chunk.scored:
                rows = hidden[first : first + len(chunk.scored)]
                first += len(chunk.scored)
                following = np.array(chunk.request.tokens[chunk.scored.start + 1 : chunk.scored.stop + 1])
                num_top = chunk.request.params.prompt_logprobs or 0
                scores = self.score_prompt(rows, upload(following, self.device), num_top)
                results.append((chunk, scores.to_host()))
        return results

    def score_prompt(self, hidden: Tensor, following: Tensor, num_top: int) -> Scores:
        return score(lambda part: self.model.logits(hidden[part]), following, num_top)
