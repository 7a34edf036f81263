"""From a plan to the tensors of a step, in one copy to the device. numpy on the host, vectorised over sequences.

Axes: T tokens, S sequences, N rows whose logits are wanted, R rows of state (one per sequence that runs).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanodeploy.models.batch import Batch
from nanodeploy.ops.paged_attention import Rows
from nanodeploy.runtime.scheduler import StepPlan

ALIGN = 256  # bytes; kernels and compiled code may load wide words
MIN_GROUP = 4  # sequences on one prefix, and tokens in it, from which attention reads it for all of them at once
MIN_PREFIX_TOKENS = 1024

A = TypeVar("A")


@dataclass(frozen=True)
class Fields(Generic[A]):
    """The arrays of a step: numpy arrays on the host, the same as tensors on the device."""

    tokens: A  # [T] int64; those of decodes are only known on the device, which fills them in
    positions: A  # [T] int64
    slots: A  # [T] int64; -1 in padding
    logit_rows: A  # [N] int64: of the sampled sequences, then those scored for prompt log-probabilities
    rows: A  # [S] int64: state row of each sampled sequence
    decode_rows: A  # [S] int64: state row of each decode, whose newest token lies there; R, nobody's, in padding
    sample_positions: A  # [S] int64: where the sampled token will stand
    seeds: A  # [S] int64
    temperature: A  # [S] fp32
    top_p: A  # [S] fp32
    min_p: A  # [S] fp32
    top_k: A  # [S] int32
    decode_lens: A  # [S] int32; 0 in padding
    prefixes: A  # [S, 2] int32
    chunk_lens: A  # [S] int32
    cu_q_lens: A  # [S + 1] int32
    decode_table: A  # [S, max_pages] int32; the tables are the last, for only the rows in use need to travel
    chunk_table: A  # [S, max_pages] int32


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
            **dict.fromkeys(("rows", "decode_rows", "sample_positions", "seeds"), (i64, (num_seqs,))),
            **dict.fromkeys(("temperature", "top_p", "min_p"), (f32, (num_seqs,))),
            **dict.fromkeys(("top_k", "decode_lens", "chunk_lens"), (i32, (num_seqs,))),
            "prefixes": (i32, (num_seqs, 2)),
            "cu_q_lens": (i32, (num_seqs + 1,)),
            **dict.fromkeys(("decode_table", "chunk_table"), (i32, (num_seqs, max_pages))),
        }
        starts, self.num_bytes = {}, 0
        for name, (dtype, shape) in forms.items():
            self.num_bytes += -self.num_bytes % ALIGN
            starts[name] = self.num_bytes
            self.num_bytes += math.prod(shape) * dtype.itemsize
        self.table_starts = starts["decode_table"], starts["chunk_table"]
        self.num_tokens, self.num_seqs = num_tokens, num_seqs

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

    def send(self, num_decodes: int, num_chunks: int) -> None:
        """Copy the host's arrays to the device, of the page tables so many rows. Returns at once."""
        (decodes, chunks), row_bytes = self.table_starts, self.device.decode_table[0].nbytes
        spans = [(0, decodes + num_decodes * row_bytes)]
        if num_chunks:
            spans.append((chunks, chunks + num_chunks * row_bytes))
        for begin, end in spans:
            self.flat[begin:end].copy_(self.flats[self.turn][begin:end], non_blocking=True)

    def batch(self, form: "Form", split_tokens: int, num_context: int) -> Batch:
        """What lies on the device, as the model takes it."""
        device = self.device
        counts = (form.num_decodes, form.num_chunks, int(form.shared), num_context)
        return Batch(
            tokens=device.tokens[: form.num_tokens],
            positions=device.positions[: form.num_tokens],
            slots=device.slots[: form.num_tokens],
            rows=Rows(
                decode_table=device.decode_table,
                decode_lens=device.decode_lens,
                prefixes=device.prefixes,
                chunk_table=device.chunk_table,
                chunk_lens=device.chunk_lens,
                cu_q_lens=device.cu_q_lens,
                counts=torch.tensor(counts, dtype=torch.int32),
                split_tokens=split_tokens,
            ),
            logit_rows=device.logit_rows[: form.num_logit_rows],
        )


@dataclass(frozen=True)
class Form:
    """The sizes of a step, padding included. Steps of one form can be replayed from one CUDA graph."""

    num_tokens: int
    num_decodes: int
    num_chunks: int
    num_logit_rows: int
    shared: bool = False  # attention reads prefixes that several decodes share once for them all


class StepInputs:
    """Writes each step's fields. Keeps, per state row, what stays the same from step to step."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_pages: int,
        page_size: int,
        device: torch.device,
        split_tokens: int = 0,
    ):
        """`split_tokens` not 0: attention sums in stretches of so many tokens, and prefixes are read one by one."""
        self.nobody = max_num_seqs  # the state row of padding
        self.num_context = 0  # of the step loaded last: tokens of its chunks' contexts, all together
        self.page_size, self.split_tokens = page_size, split_tokens
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

    def buffers(self, form: Form) -> Buffers:
        return self.mixed if form.num_chunks else self.decode

    def batch(self, form: Form) -> Batch:
        """The fields of a step of this form where they lie on the device."""
        return self.buffers(form).batch(form, self.split_tokens, self.num_context)

    def load(self, plan: StepPlan, padded: Callable[[Form], Form] = lambda form: form) -> tuple[Form, Fields[Tensor]]:
        """Send a step to the device. Returns its form, and its fields for the sampler.

        `padded` may enlarge the form: what is added stores nothing, attends to nothing, and is left unread.
        """
        self.follow(plan)
        num_decodes, num_sampled = len(plan.decodes), len(plan.sampled)
        buffers = self.mixed if plan.chunks else self.decode
        host = buffers.next_host()
        rows = np.fromiter((request.row for request in plan.sampled), np.int64, num_sampled)
        host.rows[:num_sampled] = rows
        for name, values in self.settings.items():
            getattr(host, name)[:num_sampled] = values[rows]
        positions = np.array(plan.positions, np.int64)
        host.sample_positions[:num_decodes] = positions + 1
        rows = rows[:num_decodes]
        order, shared = (None, False) if plan.chunks or self.split_tokens else self.find_prefixes(rows, positions, host)
        host.logit_rows[:num_decodes] = np.arange(num_decodes)
        if order is not None:
            host.logit_rows[order] = np.arange(num_decodes)
            rows, positions = rows[order], positions[order]
        host.decode_rows[:num_decodes] = rows
        host.positions[:num_decodes] = positions
        host.slots[:num_decodes] = self.slots(rows, positions)
        host.decode_lens[:num_decodes] = positions + 1
        self.fill_table(host.decode_table, rows, host.decode_lens[:num_decodes])
        num_tokens, num_logit_rows = self.write_chunks(plan, host) if plan.chunks else (num_decodes, num_decodes)
        self.num_context = int(host.chunk_lens[: len(plan.chunks)].sum())
        form = Form(num_tokens, num_decodes, len(plan.chunks), num_logit_rows, shared)
        larger = padded(form)
        self.write_padding(host, form, larger)
        buffers.send(num_decodes, len(plan.chunks))
        return larger, buffers.device

    def load_nothing(self, form: Form) -> None:
        """Send a step of padding alone."""
        self.num_context = 0
        buffers = self.buffers(form)
        host = buffers.next_host()
        host.cu_q_lens[0] = 0
        self.write_padding(host, Form(0, 0, 0, 0), form)
        buffers.send(0, 0)

    def follow(self, plan: StepPlan) -> None:
        """Take note of rows that changed hands and of pages that were added."""
        for request in plan.placed:
            params = request.params
            values = (request.seed, params.temperature, params.top_p, params.min_p, params.top_k)
            for array, value in zip(self.settings.values(), values, strict=True):
                array[request.row] = value
        for row, first, pages in plan.grown:
            self.page_table[row, first : first + len(pages)] = pages

    def find_prefixes(
        self, rows: np.ndarray, positions: np.ndarray, host: Fields[np.ndarray]
    ) -> tuple[np.ndarray | None, bool]:
        """Decodes that hold the same pages from the first on, as prefix caching leaves them: writes `prefixes`.

        Returns an order of the rows in which such groups are adjacent, and whether there are any.
        """
        if not len(rows):
            return None, False
        firsts = self.page_table[rows, 0]
        order = np.argsort(firsts, kind="stable")
        begins = np.flatnonzero(np.diff(firsts[order], prepend=-1))
        sizes = np.diff(begins, append=len(rows))
        if sizes.max() < MIN_GROUP:
            return None, False
        host.prefixes[: len(rows), 0] = np.arange(len(rows))
        host.prefixes[: len(rows), 1] = 0
        found = False
        for begin, size in zip(begins[sizes >= MIN_GROUP], sizes[sizes >= MIN_GROUP]):
            members = order[begin : begin + size]
            num_pages = int(positions[members].min()) // self.page_size  # whole pages, each row's own token left out
            tables = self.page_table[rows[members], :num_pages]
            differs = (tables != tables[0]).any(axis=0)
            num_shared = int(differs.argmax()) if differs.any() else num_pages
            if num_shared * self.page_size >= MIN_PREFIX_TOKENS:
                host.prefixes[begin : begin + size] = begin, num_shared * self.page_size
                found = True
        return (order, True) if found else (None, False)

    def fill_table(self, table: np.ndarray, rows: np.ndarray, lens: np.ndarray) -> None:
        """The page table's rows of these state rows, as wide as the longest needs."""
        width = -(-int(lens.max(initial=0)) // self.page_size)
        table[: len(rows), :width] = self.page_table[rows, :width]

    def slots(self, rows: Any, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at these positions are kept; `rows` one for each, or one for all."""
        page, offset = np.divmod(positions, self.page_size)
        return self.page_table[rows, page].astype(np.int64) * self.page_size + offset

    def write_chunks(self, plan: StepPlan, host: Fields[np.ndarray]) -> tuple[int, int]:
        """The chunks' part of a step, after the decodes'. Returns the numbers of tokens and of logit rows."""
        first = num_sampled = len(plan.decodes)
        scored = []
        host.cu_q_lens[0] = first
        for index, chunk in enumerate(plan.chunks):
            end = first + chunk.num_tokens
            positions = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            host.tokens[first:end] = chunk.request.tokens[chunk.start : chunk.start + chunk.num_tokens]
            host.positions[first:end] = positions
            host.slots[first:end] = self.slots(chunk.request.row, positions)
            host.chunk_lens[index] = chunk.start + chunk.num_tokens
            host.cu_q_lens[index + 1] = end
            if chunk.samples:
                host.sample_positions[num_sampled] = chunk.start + chunk.num_tokens
                host.logit_rows[num_sampled] = end - 1
                num_sampled += 1
            scored.append(np.arange(chunk.scored.start, chunk.scored.stop) - chunk.start + first)
            first = end
        rows = np.concatenate(scored)
        host.logit_rows[num_sampled : num_sampled + len(rows)] = rows
        chunk_rows = np.fromiter((chunk.request.row for chunk in plan.chunks), np.int64, len(plan.chunks))
        self.fill_table(host.chunk_table, chunk_rows, host.chunk_lens[: len(plan.chunks)])
        return first, num_sampled + len(rows)

    def write_padding(self, host: Fields[np.ndarray], form: Form, larger: Form) -> None:
        """Tokens of nobody: they store nothing, attend to nothing, and their hidden states are left unread."""
        tokens = slice(form.num_tokens, larger.num_tokens)
        host.tokens[tokens] = 0
        host.positions[tokens] = 0
        host.slots[tokens] = -1
        decodes = slice(form.num_decodes, larger.num_decodes)
        host.decode_rows[decodes] = self.nobody
        host.decode_lens[decodes] = 0
        host.prefixes[decodes, 0] = np.arange(form.num_decodes, larger.num_decodes)
        host.prefixes[decodes, 1] = 0
        if larger.num_chunks:
            host.chunk_lens[form.num_chunks : larger.num_chunks] = 0
            host.cu_q_lens[form.num_chunks + 1 : larger.num_chunks + 1] = form.num_tokens
        host.logit_rows[form.num_logit_rows : larger.num_logit_rows] = 0
