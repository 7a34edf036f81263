"""From a plan to the tensors of a step, in one copy to the device. numpy on the host, vectorised over sequences.

Axes: T tokens, S sequences, N rows whose logits are wanted, R rows of state (one per sequence that runs).
"""

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanodeploy.models.batch import Batch
from nanodeploy.runtime.scheduler import StepPlan

ALIGN = 256  # bytes; kernels and compiled code may load wide words

A = TypeVar("A")


@dataclass(frozen=True)
class Fields(Generic[A]):
    """The arrays of a step: numpy arrays on the host, the same as tensors on the device."""

    tokens: A  # [T] int64; those of decodes are only known on the device, which fills them in
    positions: A  # [T] int64
    slots: A  # [T] int64; -1 in padding
    logit_rows: A  # [N] int64: of the sampled sequences, then those scored for prompt log-probabilities
    rows: A  # [S] int64: state row of each sampled sequence; R, which is nobody's, in padding
    sample_positions: A  # [S] int64: where the sampled token will stand
    seeds: A  # [S] int64
    temperature: A  # [S] fp32
    top_p: A  # [S] fp32
    min_p: A  # [S] fp32
    top_k: A  # [S] int32
    kv_lens: A  # [S] int32; 0 in padding
    cu_q_lens: A  # [S + 1] int32
    page_table: A  # [S, max_pages] int32; the last, for only the rows in use need to travel


class Buffers:
    """The fields cut from one flat buffer, so that they travel in one copy.

    On the device there is one, for steps run in the order of their launch, and graphs want fixed addresses. On the
    host (pinned) there are two in turn: step n+2 is built after step n was settled, long after n's copy was made.
    """

    def __init__(self, num_tokens: int, num_logit_rows: int, num_seqs: int, max_pages: int, device: torch.device):
        i64, i32, f32 = torch.int64, torch.int32, torch.float32
        forms: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            **dict.fromkeys(("tokens", "positions", "slots"), (i64, (num_tokens,))),
            "logit_rows": (i64, (num_logit_rows,)),
            **dict.fromkeys(("rows", "sample_positions", "seeds"), (i64, (num_seqs,))),
            **dict.fromkeys(("temperature", "top_p", "min_p"), (f32, (num_seqs,))),
            **dict.fromkeys(("top_k", "kv_lens"), (i32, (num_seqs,))),
            "cu_q_lens": (i32, (num_seqs + 1,)),
            "page_table": (i32, (num_seqs, max_pages)),
        }
        starts, self.num_bytes = {}, 0
        for name, (dtype, shape) in forms.items():
            self.num_bytes += -self.num_bytes % ALIGN
            starts[name] = self.num_bytes
            self.num_bytes += math.prod(shape) * dtype.itemsize
        self.table_start = starts["page_table"]

        def cut(flat: Tensor) -> Fields[Tensor]:
            return Fields(
                **{
                    name: flat[starts[name] :][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
                    for name, (dtype, shape) in forms.items()
                }
            )

        pin = device.type == "cuda"
        self.flats = [torch.zeros(self.num_bytes, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self.flat = torch.zeros(self.num_bytes, dtype=torch.uint8, device=device)
        self.hosts: list[Fields[np.ndarray]] = [
            Fields(**{name: t.numpy() for name, t in vars(cut(flat)).items()}) for flat in self.flats
        ]
        self.device = cut(self.flat)
        self.turn = 0

    def next_host(self) -> Fields[np.ndarray]:
        """The host's arrays, to be filled for the next step. They hold what an earlier step left there."""
        self.turn = 1 - self.turn
        return self.hosts[self.turn]

    def send(self, num_seqs: int) -> None:
        """Copy the host's arrays to the device, of the page table `num_seqs` rows. Returns at once."""
        end = self.table_start + num_seqs * self.device.page_table[0].nbytes
        self.flat[:end].copy_(self.flats[self.turn][:end], non_blocking=True)

    def batch(self, num_tokens: int, num_logit_rows: int, num_decodes: int, num_chunks: int) -> Batch:
        """What lies on the device, as the model takes it."""
        device = self.device
        return Batch(
            tokens=device.tokens[:num_tokens],
            positions=device.positions[:num_tokens],
            slots=device.slots[:num_tokens],
            page_table=device.page_table,
            kv_lens=device.kv_lens,
            cu_q_lens=device.cu_q_lens,
            counts=torch.tensor((num_decodes, num_chunks), dtype=torch.int32),
            logit_rows=device.logit_rows[:num_logit_rows],
        )


class StepInputs:
    """Writes each step's fields. Keeps, per state row, what stays the same from step to step."""

    def __init__(
        self, *, max_num_seqs: int, max_num_batched_tokens: int, max_pages: int, page_size: int, device: torch.device
    ):
        self.nobody = max_num_seqs  # the state row of padding
        self.page_size = page_size
        self.decode = Buffers(max_num_seqs, max_num_seqs, max_num_seqs, max_pages, device)
        self.mixed = Buffers(
            max_num_batched_tokens, max_num_seqs + max_num_batched_tokens, max_num_seqs, max_pages, device
        )
        self.page_table = np.zeros((max_num_seqs, max_pages), np.int32)
        self.settings: dict[str, np.ndarray] = {  # of the sampler
            "seeds": np.zeros(max_num_seqs, np.int64),
            "temperature": np.zeros(max_num_seqs, np.float32),
            "top_p": np.zeros(max_num_seqs, np.float32),
            "min_p": np.zeros(max_num_seqs, np.float32),
            "top_k": np.zeros(max_num_seqs, np.int32),
        }

    def load(self, plan: StepPlan, num_padded: int = 0) -> tuple[Batch, Fields[Tensor]]:
        """Send a step to the device. Returns its batch, and the fields it is a part of, for the sampler.

        A step of decodes alone is padded to `num_padded` of them.
        """
        self.follow(plan)
        buffers = self.mixed if plan.chunks else self.decode
        host = buffers.next_host()
        num_decodes, num_sampled = len(plan.decodes), len(plan.sampled)
        rows = np.fromiter((request.row for request in plan.sampled), np.int64, num_sampled)
        positions = np.array(plan.positions, np.int64)
        host.rows[:num_sampled] = rows
        for name, values in self.settings.items():
            getattr(host, name)[:num_sampled] = values[rows]
        host.positions[:num_decodes] = positions
        host.slots[:num_decodes] = self.slots(rows[:num_decodes], positions)
        host.kv_lens[:num_decodes] = positions + 1
        host.sample_positions[:num_decodes] = positions + 1
        host.logit_rows[:num_decodes] = np.arange(num_decodes)
        if plan.chunks:
            num_tokens, num_logit_rows = self.write_chunks(plan, host)
            rows = np.append(rows[:num_decodes], [chunk.request.row for chunk in plan.chunks])
        else:
            num_tokens = num_logit_rows = max(num_decodes, num_padded)
            self.write_padding(host, num_decodes, num_tokens)
            num_decodes = num_tokens
        width = -(-int(host.kv_lens[: len(rows)].max()) // self.page_size)
        host.page_table[: len(rows), :width] = self.page_table[rows, :width]
        buffers.send(len(rows))
        return buffers.batch(num_tokens, num_logit_rows, num_decodes, len(plan.chunks)), buffers.device

    def follow(self, plan: StepPlan) -> None:
        """Take note of rows that changed hands and of pages that were added."""
        for request in plan.placed:
            params = request.params
            values = (request.seed, params.temperature, params.top_p, params.min_p, params.top_k)
            for array, value in zip(self.settings.values(), values, strict=True):
                array[request.row] = value
        for row, first, pages in plan.grown:
            self.page_table[row, first : first + len(pages)] = pages

    def slots(self, rows: Any, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at these positions are kept; `rows` one for each, or one for all."""
        page, offset = np.divmod(positions, self.page_size)
        return self.page_table[rows, page].astype(np.int64) * self.page_size + offset

    def write_chunks(self, plan: StepPlan, host: Fields[np.ndarray]) -> tuple[int, int]:
        """The chunks' part of a step, after the decodes'. Returns T and N."""
        num_decodes, num_sampled = len(plan.decodes), len(plan.decodes)
        first = num_decodes
        scored = []
        host.cu_q_lens[0] = 0
        for index, chunk in enumerate(plan.chunks):
            end = first + chunk.num_tokens
            positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            host.tokens[first:end] = chunk.request.tokens[chunk.start : chunk.start + chunk.num_tokens]
            host.positions[first:end] = positions
            host.slots[first:end] = self.slots(chunk.request.row, positions)
            host.kv_lens[num_decodes + index] = chunk.start + chunk.num_tokens
            host.cu_q_lens[index + 1] = end - num_decodes
            if chunk.samples:
                host.sample_positions[num_sampled] = chunk.start + chunk.num_tokens
                host.logit_rows[num_sampled] = end - 1
                num_sampled += 1
            scored.append(np.arange(chunk.scored.start, chunk.scored.stop) - chunk.start + first)
            first = end
        rows = np.concatenate(scored)
        host.logit_rows[num_sampled : num_sampled + len(rows)] = rows
        return first, num_sampled + len(rows)

    def write_padding(self, host: Fields[np.ndarray], first: int, end: int) -> None:
        """Decodes of nobody: they store nothing, attend to nothing, and their hidden states are left unread."""
        host.rows[first:end] = self.nobody
        host.positions[first:end] = 0
        host.slots[first:end] = -1
        host.kv_lens[first:end] = 0
        host.logit_rows[first:end] = np.arange(first, end)
