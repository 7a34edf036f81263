"""What a kernel does to a step: four layers of Qwen3-8B with random weights, compiled and captured as the engine does.

The whole step is extrapolated: layers x 36 / 4, plus the output layer. (The embedding and the last norm are counted
with the layers; they are under 1 % of them.)
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from bench.gate import forced
from bench.timing import graph_time, stream_time
from nanodeploy import catalog
from nanodeploy.errors import ConfigError
from nanodeploy.models import registry
from nanodeploy.models.batch import Batch
from nanodeploy.ops.layouts import KVCache
from nanodeploy.ops.paged_attention import Rows
from nanodeploy.ops.registry import OPS

MODEL = "demo:random-qwen3-8b"
NUM_LAYERS = 4  # of the slice
PAGE_SIZE = 64
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Scenario:
    """One step of a server: `num_seqs` sequences of `context` tokens decode one more, or bring whole prompts."""

    num_seqs: int
    context: int
    decode: bool

    def __str__(self) -> str:
        what = "decode" if self.decode else "prefill"
        return f"{what} {self.num_seqs} x {self.context}"


SCENARIOS = (Scenario(64, 4096, True), Scenario(8, 4096, True), Scenario(1, 8192, False))


@dataclass(frozen=True)
class StepTime:
    """The slice with one choice of kernel. `step_ms` is extrapolated to the whole model."""

    kernel: str
    scenario: str
    slice_us: float
    head_us: float
    step_ms: float


def make_batch(scenario: Scenario, device: torch.device) -> Batch:
    """Its Batch, as the runner would make it; every sequence's pages lie shuffled in the pool."""
    num_seqs, context = scenario.num_seqs, scenario.context
    g = torch.Generator(device).manual_seed(0)
    pages = torch.randperm(num_seqs * context // PAGE_SIZE, generator=g, device=device).view(num_seqs, -1)
    positions = torch.arange(context - 1 if scenario.decode else 0, context, device=device).repeat(num_seqs)
    rows = torch.arange(num_seqs, device=device).repeat_interleave(len(positions) // num_seqs)
    q_len = 0 if scenario.decode else context
    counts = [num_seqs, 0, 0] if scenario.decode else [0, num_seqs, 0]
    lens = torch.full((num_seqs,), context, dtype=torch.int32, device=device)
    table = pages.int()
    last_rows = torch.arange(1, num_seqs + 1, device=device) * (len(positions) // num_seqs) - 1
    return Batch(
        tokens=torch.randint(10000, positions.shape, generator=g, device=device),
        positions=positions,
        slots=pages[rows, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
        rows=Rows(
            decode_table=table,
            decode_lens=lens,
            prefixes=torch.zeros((num_seqs, 2), dtype=torch.int32, device=device),
            chunk_table=table,
            chunk_lens=lens,
            cu_q_lens=torch.arange(num_seqs + 1, dtype=torch.int32, device=device) * q_len,
            counts=torch.tensor(counts, dtype=torch.int32),
        ),
        logit_rows=last_rows,
    )


class Model:
    """The slice of the model, and how long its steps take."""

    def __init__(self, device: torch.device, *, compiled: bool = True, **overrides: Any):
        """`overrides` replace entries of config.json."""
        files = catalog.locate(MODEL)
        self.full_layers: int = files.config["num_hidden_layers"]
        config = {**files.config, "num_hidden_layers": NUM_LAYERS, **overrides}
        self.device = device
        self.model: Any = registry.build(
            dataclasses.replace(files, config=config), dtype=DTYPE, device=device, load_format="dummy", seed=0
        )
        if compiled:
            self.model.compile_layers()

    def caches(self, scenario: Scenario) -> list[KVCache]:
        num_pages = scenario.num_seqs * scenario.context // PAGE_SIZE
        layouts = [need.layout(PAGE_SIZE, DTYPE) for need in self.model.cache_needs()]
        caches = [layout.empty(num_pages, self.device) for layout in layouts]
        for cache in caches:
            cache.pages.normal_()
        return caches

    @torch.inference_mode()
    def compare(self, op_name: str, kernels: list[str]) -> tuple[list[StepTime], list[str]]:
        """(the step with the op's own choice and with each kernel forced, remarks on what could not be timed).

        Each kernel is timed in the first scenario whose step calls the op and that the kernel takes.
        """
        times: list[StepTime] = []
        remarks = []
        left = list(kernels)
        for scenario in SCENARIOS:
            if not left:
                break
            batch, caches = make_batch(scenario, self.device), self.caches(scenario)
            with forced(OPS[op_name], None):
                self.model.forward(batch, caches)
                chosen = sorted({choice.name for choice in OPS[op_name].decided.values()})
                if not chosen:
                    continue
                own_choice = self._time(f"as chosen ({', '.join(chosen)})", scenario, batch, caches)
            here = []
            for kernel in left:
                with forced(OPS[op_name], kernel):
                    try:
                        self.model.logits(self.model.forward(batch, caches))
                    except ConfigError:
                        continue  # not for this scenario; the next may suit it
                    if scenario.decode and not OPS[op_name].kernels[kernel].capturable:
                        remarks.append(f"{kernel} cannot be captured; a decode step wants that")
                    else:
                        here.append(self._time(kernel, scenario, batch, caches))
                left = [k for k in left if k != kernel]
            times += [own_choice, *here] if here else []
        return times, remarks + [f"{kernel}: no step of {MODEL} here calls it" for kernel in left]

    def _time(self, name: str, scenario: Scenario, batch: Batch, caches: list[KVCache]) -> StepTime:
        hidden = self.model.forward(batch, caches)
        timer = graph_time if scenario.decode else stream_time
        slice_us = timer([lambda: self.model.forward(batch, caches)]).us
        head_us = timer([lambda: self.model.logits(hidden)]).us
        step_ms = (slice_us * self.full_layers / NUM_LAYERS + head_us) / 1e3
        return StepTime(name, str(scenario), slice_us, head_us, step_ms)
