"""The runner: the only one that touches the device. It launches a planned step and, later, waits for it."""

from array import array
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanodeploy.models.batch import Batch
from nanodeploy.models.model import LanguageModel
from nanodeploy.runtime.graphs import DecodeGraphs
from nanodeploy.runtime.request import Request
from nanodeploy.runtime.sampler import Sampler, Scores, download, score, upload
from nanodeploy.runtime.scheduler import Chunk, StepPlan, StepResult
from nanodeploy.runtime.step import StepInputs
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import GenerateRequest


@dataclass
class InFlight:
    """A launched step, and what of it is on the way to the host."""

    plan: StepPlan
    tokens: Tensor | None  # [len(plan.sampled)] int64; None if nothing was sampled
    scores: Scores | None  # of the sampled tokens whose requests want log-probabilities
    prompt_scores: list[tuple[Chunk, Scores]]
    done: torch.cuda.Event | None  # recorded after all that; None on a CPU, where everything is done already


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
    ):
        """`caches` are to be set before the first step."""
        self.model = model
        self.device = device
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.caches: list[Tensor] = []
        self.graphs: DecodeGraphs | None = None
        self.inputs = StepInputs(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_pages=max_pages,
            page_size=page_size,
            device=device,
        )
        self.sampler = Sampler(max_num_seqs, model.vocab_size, device)

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> InFlight:
        """Start a step. Returns as soon as its work is queued; the tokens it needs from earlier steps may be unborn."""
        self.sampler.place(plan.placed)
        size = self.graphs.size_for(len(plan.decodes)) if self.graphs and not plan.chunks else 0
        batch, fields = self.inputs.load(plan, size)
        if self.graphs and size:
            hidden = self.graphs.replay(size)
        else:
            hidden = self.forward(batch, fields.rows, len(plan.decodes))
        num_sampled = len(plan.sampled)
        tokens, scores = None, None
        if num_sampled:
            logits = self.model.logits(hidden[:num_sampled])
            tokens, scores = self.sampler.sample(plan.sampled, logits, fields)
        prompt_scores = self.score_prompts(plan, hidden[num_sampled:])
        in_flight = InFlight(
            plan,
            None if tokens is None else download(tokens),
            scores and scores.to_host(),
            [(chunk, scores.to_host()) for chunk, scores in prompt_scores],
            torch.cuda.Event() if self.device.type == "cuda" else None,
        )
        if in_flight.done:
            in_flight.done.record()
        return in_flight

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
        return torch.cuda.max_memory_reserved() + self.sampler.penalty_state_bytes

    def warm_up_step(self, num_decodes: int, chunk_lens: list[int]) -> None:
        """A step of made-up sequences, all in page 0."""
        requests = []
        for row in range(num_decodes + len(chunk_lens)):
            message = GenerateRequest("", [0], SamplingParams())
            requests.append(Request.of(message, eos_ids=frozenset(), seed=0, max_model_len=2))
            requests[row].row = row
        plan = StepPlan(decodes=requests[:num_decodes], positions=[0] * num_decodes, sampled=requests, placed=requests)
        for request, num_tokens in zip(requests[num_decodes:], chunk_lens, strict=True):
            request.tokens = array("q", bytes(8 * num_tokens))
            plan.chunks.append(Chunk(request, 0, num_tokens, True, range(0)))
        self.wait(self.launch(plan))

    @torch.inference_mode()
    def capture_graphs(self) -> None:
        """From here on, steps of decodes alone are replayed."""
        buffers = self.inputs.decode

        def decode(size: int) -> Tensor:
            return self.forward(buffers.batch(size, size, size, 0), buffers.device.rows, size)

        self.graphs = DecodeGraphs(decode, self.max_num_seqs)

    def forward(self, batch: Batch, rows: Tensor, num_decodes: int) -> Tensor:
        """The model on what lies in the buffers, after the decodes' tokens were fetched from where the last step left
        them. Returns hidden states [N, D]. This is what a decode graph holds.
        """
        if num_decodes:
            torch.index_select(self.sampler.last_tokens, 0, rows[:num_decodes], out=batch.tokens[:num_decodes])
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
                results.append((chunk, self.score_prompt(rows, upload(following, self.device), num_top)))
        return results

    def score_prompt(self, hidden: Tensor, following: Tensor, num_top: int) -> Scores:
        return score(lambda part: self.model.logits(hidden[part]), following, num_top)
