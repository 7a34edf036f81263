"""From logits to tokens, on the device: penalties, logit_bias, min_tokens, grammars' masks, then ops.sample; and
log-probabilities.

The plain case is ops.sample and one scatter; everything else costs only where it is asked for. The host does not know
the newest tokens here, so what depends on them is counted on the device, per state row.
Axes: S sampled sequences, R state rows, V vocabulary, n some of the sequences, k likeliest tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanodeploy import ops
from nanodeploy.runtime.request import Request
from nanodeploy.runtime.step import Fields
from nanodeploy.sampling import SamplingParams
from nanodeploy.wire import Logprobs

SLICE = 64  # rows of logits that are worked on in fp32 at once, which bounds the memory


class Sampler:
    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device):
        self.device = device
        self.num_rows, self.vocab_size = max_num_seqs, vocab_size
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)  # the last is padding's
        self.penalties = torch.zeros(3, max_num_seqs, device=device)  # repetition, presence, frequency
        self.num_outputs: Tensor | None = None  # [R, V] int32, how often it was generated; from the first use on
        self.in_prompt: Tensor | None = None  # [R, V] bool
        self.bias: dict[int, tuple[Tensor, Tensor]] = {}  # state row -> token ids, what to add to their logits
        self.stops: dict[int, Tensor] = {}  # state row -> token ids that may not come before min_tokens
        self.masks: Masks | None = None  # from the first grammar on

    @property
    def penalty_state_bytes(self) -> int:
        """What `num_outputs` and `in_prompt` take once a request asks for penalties."""
        return self.num_rows * self.vocab_size * (torch.int32.itemsize + torch.bool.itemsize)

    def place(self, requests: list[Request]) -> None:
        """State rows changed hands: bring in what the new owners ask for. All their tokens so far are known."""
        for request in requests:
            params, row = request.params, request.row
            if params.logit_bias:
                tokens = np.fromiter(params.logit_bias.keys(), np.int64)
                added = np.fromiter(params.logit_bias.values(), np.float32)
                self.bias[row] = upload(tokens, self.device), upload(added, self.device)
            if params.min_tokens:
                self.stops[row] = upload(np.fromiter(request.stop_ids, np.int64), self.device)
            if penalised(params):
                if self.num_outputs is None or self.in_prompt is None:
                    shape = (self.num_rows, self.vocab_size)
                    self.num_outputs = torch.zeros(shape, dtype=torch.int32, device=self.device)
                    self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=self.device)
                values = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
                self.penalties[:, row] = upload(np.array(values, np.float32), self.device)
                known = upload(np.array(request.tokens), self.device)
                prompt, outputs = known[: request.num_prompt], known[request.num_prompt :]
                self.in_prompt[row].zero_().index_fill_(0, prompt, True)
                self.num_outputs[row].zero_().index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.int32))

    def masks_to_fill(self) -> np.ndarray:
        """[R, ceil(V / 32)] int32, as ops.mask_logits takes them. The step that read them last must be over."""
        if self.masks is None:
            self.masks = Masks(self.num_rows, -(-self.vocab_size // 32), self.device)
        return self.masks.host.numpy()

    def sample(
        self, requests: list[Request], logits: Tensor, fields: Fields[Tensor], masked: Sequence[int] = ()
    ) -> tuple[Tensor, "Scores | None"]:
        """logits [S, V] of `requests` -> their tokens [S] int64, which are left in last_tokens too, and the scores of
        those that ask for log-probabilities, in their order. Nothing has to be waited for.

        `masked` are indices into `requests`: row i of masks_to_fill() was filled for masked[i].
        """
        num_seqs = len(requests)
        special = [(index, request) for index, request in enumerate(requests) if not request.plain]
        penalised_ones = [index for index, request in special if penalised(request.params)]
        indices = upload(np.array(penalised_ones, np.int64), self.device) if penalised_ones else None
        num_top = {index: r.params.logprobs for index, r in special if r.params.logprobs is not None}
        edited = self.edit(special, logits, indices, fields.rows)
        if masked and self.masks is not None:
            if edited is logits and num_top:
                edited = logits.clone()  # the raw logits are needed for log-probabilities
            ops.mask_logits(edited, self.masks.send(len(masked)), upload(np.array(masked, np.int64), self.device))
        tokens = ops.sample(
            edited,
            fields.temperature[:num_seqs],
            fields.top_k[:num_seqs],
            fields.top_p[:num_seqs],
            fields.min_p[:num_seqs],
            fields.seeds[:num_seqs],
            fields.sample_positions[:num_seqs],
        )
        self.last_tokens.index_copy_(0, fields.rows[:num_seqs], tokens)
        if indices is not None and self.num_outputs is not None:
            self.num_outputs[fields.rows[indices], tokens[indices]] += 1  # each row once
        if not num_top:
            return tokens, None
        wanted = upload(np.fromiter(num_top, np.int64), self.device)
        return tokens, score(lambda part: logits[wanted[part]], tokens[wanted], max(num_top.values()))

    def edit(
        self, special: list[tuple[int, Request]], logits: Tensor, penalised_ones: Tensor | None, rows: Tensor
    ) -> Tensor:
        """The logits that the sampler sees: a copy in fp32 if any are to change, else `logits` themselves."""
        special = [(index, request) for index, request in special if request.row >= 0]  # the others ended meanwhile
        biased = [(index, request.row) for index, request in special if request.params.logit_bias]
        # The token sampled now is number num_tokens, for it is counted as pending already.
        early = [
            (index, request.row)
            for index, request in special
            if request.num_tokens - request.num_prompt <= request.params.min_tokens
            and request.params.grammar is None  # else its mask knows, for the grammar has the last word on the end
        ]
        if penalised_ones is None and not biased and not early:
            return logits
        logits = logits.to(torch.float32, copy=True)
        if penalised_ones is not None:
            for part in slices(len(penalised_ones)):
                self.penalise(logits, penalised_ones[part], rows)
        for index, row in biased:
            logits[index].index_add_(0, *self.bias[row])
        for index, row in early:
            logits[index].index_fill_(0, self.stops[row], -torch.inf)
        return logits

    def penalise(self, logits: Tensor, indices: Tensor, rows: Tensor) -> None:
        """In place, at `indices` [n]. Repetition (arXiv:1909.05858, section 4.1) counts the prompt too."""
        assert self.num_outputs is not None and self.in_prompt is not None
        rows = rows[indices]
        repetition, presence, frequency = self.penalties[:, rows, None]
        counts, x = self.num_outputs[rows], logits[indices]
        seen = self.in_prompt[rows] | (counts > 0)
        x = torch.where(seen, torch.where(x > 0, x / repetition, x * repetition), x)
        logits[indices] = x - frequency * counts - presence * (counts > 0)


class Masks:
    """Masks on their way to the device: pinned on the host, copied beside the forward pass that they wait behind."""

    def __init__(self, num_rows: int, num_words: int, device: torch.device):
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(num_rows, num_words, dtype=torch.int32, pin_memory=on_gpu)
        self.device = torch.zeros_like(self.host, device=device) if on_gpu else self.host
        self.beside = torch.cuda.Stream(device) if on_gpu else None

    def send(self, num_masks: int) -> Tensor:
        """The first masks on the device, for what is launched from here on. Returns at once."""
        masks = self.device[:num_masks]
        if self.beside is not None:
            with torch.cuda.stream(self.beside):
                masks.copy_(self.host[:num_masks], non_blocking=True)
            torch.cuda.current_stream().wait_stream(self.beside)
        return masks


@dataclass
class Scores:
    """Log-probabilities of some tokens. They are those of the model: before penalties, biases and temperature."""

    tokens: Tensor  # [n] int64
    logprobs: Tensor  # [n] fp32
    ranks: Tensor  # [n] int64, 1 is the likeliest
    top_ids: Tensor  # [n, k] int64
    top_logprobs: Tensor  # [n, k] fp32, falling

    def to_host(self) -> "Scores":
        """On the way there; to be read once the step is over."""
        return Scores(*(download(tensor) for tensor in vars(self).values()))

    def messages(self, num_top: list[int]) -> list[Logprobs]:
        """`num_top`: how many of the likeliest each token's request asked for."""
        columns = [tensor.tolist() for tensor in vars(self).values()]
        return [
            Logprobs(token, logprob, rank, top_ids[:k], top_logprobs[:k])
            for k, token, logprob, rank, top_ids, top_logprobs in zip(num_top, *columns, strict=True)
        ]


def score(logits: Callable[[slice], Tensor], tokens: Tensor, num_top: int) -> Scores:
    """Score tokens [n], given a function that makes some rows of their logits [n, V]."""
    parts = []
    for part in slices(len(tokens)):
        logprobs = logits(part).float().log_softmax(dim=-1)
        own = logprobs.gather(1, tokens[part, None])
        top = logprobs.topk(min(num_top, logprobs.shape[1]), dim=-1)
        parts.append((own[:, 0], (logprobs > own).sum(dim=-1) + 1, top.indices, top.values))
    return Scores(tokens, *(torch.cat(column) for column in zip(*parts)))


def penalised(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)


def slices(num_rows: int) -> Iterator[slice]:
    return (slice(start, min(start + SLICE, num_rows)) for start in range(0, num_rows, SLICE))


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """To the device without waiting for it. The host's copy is torch's, which keeps it until it was read."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def download(tensor: Tensor) -> Tensor:
    """To the host without waiting; to be read after an event that is recorded later."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
