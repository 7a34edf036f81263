"""Where a step's time goes: every kernel beside its floor, the gaps between kernels, and the sum.

    python -m bench.step demo:random-qwen3-8b --batch 64 --context 1024
    python -m bench.step demo:random-qwen3-8b --prefill 8x960
    python -m bench.step demo:random-qwen3-8b --batch 64 --context 1024 --prefill 1x2048

A steady state is timed by the clock, then some of its steps run under the profiler (CUPTI's records of kernels, those
inside CUDA graphs too). Which op launched a kernel is learnt, not guessed: one step runs eagerly with a mark before and
after each op. An op's floor is its room's `cost` over the measured limits; it stands at the op's longest kernel.
With programmatic dependent launch a kernel is there, waiting, before the one ahead has ended. So each moment belongs to
the kernel that was started first among those running, and busy time is the union of all. The profiler slows the
launches: gaps count only as far as the step by the clock has room for them.
Flags that are not its own go to the engine.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import header, machine, receipt
from bench.offline import MAX_TOKEN, Prompts, Work, result_path, sampling
from nanodeploy import LLM, flags
from nanodeploy.config import Config
from nanodeploy.ops import machine as device
from nanodeploy.ops.registry import OPS, Choice, Op
from nanodeploy.runtime.engine import Engine
from nanodeploy.runtime.graphs import Graphs
from nanodeploy.runtime.step import Form
from nanodeploy.wire import GenerateRequest

NUM_STEPS, NUM_PREFILL_STEPS = 64, 8  # by the clock, before the profile and again after it
NUM_PROFILED = 10
SETTLED = 4  # decode steps before the first is timed
MARK = "spin_kernel"  # what torch.cuda._sleep launches; it stands before and after each op of the marked step
WORTH_MARKING = 0.03  # of the step
WORTH_A_LINE = 0.003
Label = tuple[str, ...]


# ---- pure: from the profiler's records to a table


@dataclass(frozen=True)
class Record:
    """One kernel, copy or fill on the device; microseconds."""

    name: str
    start: float
    end: float
    stream: int = 0


@dataclass(frozen=True)
class Call:
    """One call of an op within a step."""

    op: str
    kernel: str  # its name in the registry
    shape: str  # "" or what tells it from the op's other calls: "4096x12288"
    floor_us: float
    num_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Place:
    """A kernel of the marked step and the call that launched it, an index; None: no op did."""

    name: str
    call: int | None


@dataclass(frozen=True)
class Time:
    """What of the time line falls to one record."""

    own_us: float  # from when all that were started before it had ended
    gap_us: float  # before it, nothing ran
    overlap_us: float  # it was there while others, started before, still ran


@dataclass
class Item:
    """One line: all kernels that stand at the same place of a layer. Times are per step."""

    op: str | None
    shape: str
    kernel: str
    calls: float
    mean_us: float  # of one, from its start to its end, the wait included
    us: float
    floor_us: float
    gap_us: float
    num_bytes: float = 0.0
    flops: float = 0.0

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, self.shape))) if self.op else self.kernel

    @property
    def lost_us(self) -> float:
        return self.us - self.floor_us


@dataclass
class Sum:
    """A step as a sum, microseconds: step = floor + lost + gaps + unexplained."""

    step_us: float  # by the clock
    floor_us: float
    lost_us: float  # by kernels, over their floors
    gaps_us: float
    unexplained_us: float
    scale: float  # of the kernels' times; below 1 where they took longer under the profiler than the step without
    busy_us: float  # union of the kernels under the profiler
    profiled_gaps_us: float
    largest_gap_us: float
    largest_gap_before: str
    overlap_us: float


def records(trace: dict[str, Any]) -> list[Record]:
    """Everything that ran on the device, in order of start, from a Chrome trace."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace["traceEvents"] if e.get("cat") in kinds and e.get("ph") == "X"]
    found = [Record(e["name"], e["ts"], e["ts"] + e["dur"], e.get("args", {}).get("stream", 0)) for e in events]
    return sorted(found, key=lambda r: (r.start, r.end))


def places(marked: Sequence[Record]) -> list[Place]:
    """The marked step without its marks: the kernels between marks 2i and 2i + 1 are those of call i."""
    found: list[Place] = []
    num_marks = 0
    for record in marked:
        if MARK in record.name:
            num_marks += 1
        else:
            found.append(Place(record.name, num_marks // 2 if num_marks % 2 else None))
    assert num_marks % 2 == 0, f"{num_marks} marks: one was lost"
    return found


def split(ran: Sequence[Record], num_steps: int, first: Sequence[str]) -> list[list[Record]]:
    """The records of several steps, step by step; `first` are the names a step is known to begin with.

    Equal parts if these hold the same names; else a step begins wherever enough of `first` is found.
    """
    names = [r.name for r in ran]
    length, rest = divmod(len(ran), num_steps)
    if not rest and names == names[:length] * num_steps:
        return [list(ran[i * length : (i + 1) * length]) for i in range(num_steps)]
    for num_first in range(1, len(first) + 1):
        wanted = list(first[:num_first])
        starts = [i for i in range(len(names)) if names[i : i + num_first] == wanted]
        if len(starts) == num_steps:
            return [list(ran[a:b]) for a, b in itertools.pairwise([*starts, len(ran)])]
    return [list(ran)]  # as one: per step the sums are right all the same


def align(names: Sequence[str], marked: Sequence[str]) -> list[int | None]:
    """For each name of a step, its index in the marked step; None for one that is not there in this order."""
    if list(names) == list(marked):
        return list(range(len(names)))
    found: list[int | None] = [None] * len(names)
    for block in difflib.SequenceMatcher(None, marked, names, autojunk=False).get_matching_blocks():
        for i in range(block.size):
            found[block.b + i] = block.a + i
    return found


def time_line(ran: Sequence[Record]) -> list[Time]:
    """Share out the time: each moment to the record that was started first among those running. In order of start."""
    found: list[Time] = []
    reached = ran[0].start if ran else 0.0
    for record in ran:
        own = max(0.0, record.end - max(record.start, reached))
        gap, overlap = max(0.0, record.start - reached), max(0.0, min(reached, record.end) - record.start)
        found.append(Time(own, gap, overlap))
        reached = max(reached, record.end)
    return found


def period(labels: Sequence[Label]) -> tuple[int, int, int]:
    """(first, length, end): labels[first:end] repeats a stretch of `length`; the one that covers most, of equals the
    shortest. (0, 0, 0) if nothing repeats over half of it: then there are no layers.
    """
    best = (0, 0, 0)
    covered = len(labels) // 2
    for length in range(1, len(labels) // 2 + 1):
        run = 0
        for i in range(len(labels) - length + 1):
            if i < len(labels) - length and labels[i] == labels[i + length]:
                run += 1
                continue
            if run >= length and run + length > covered:
                covered, best = run + length, (i - run, length, i + length)
            run = 0
    return best


def groups(labels: Sequence[Label]) -> list[Label]:
    """For each place of the step, the name of its group: the place within a layer, or its label outside of them."""
    first, length, end = period(labels)
    return [
        (*label, str((i - first) % length)) if first <= i < end else (*label, "")
        for i, label in enumerate(labels)
    ]  # fmt: skip


def items(
    steps: Sequence[Sequence[Record]], marked: Sequence[Place], calls: Sequence[Call], num_steps: int
) -> list[Item]:
    """All kernels of these steps, grouped by place; in the order of a step, what has no place there last."""
    labels = [label(place, calls) for place in marked]
    keys = groups(labels)
    heads = {i: calls[marked[i].call or 0] for i in longest([r for step in steps for r in step], marked)}
    of_name: dict[str, set[Label]] = defaultdict(set)
    for place, key in zip(marked, keys):
        of_name[place.name].add(key)
    alone = {name: next(iter(found)) for name, found in of_name.items() if len(found) == 1}
    ran = [record for step in steps for record in step]
    sums: dict[Label, list[float]] = defaultdict(lambda: [0.0] * 7)
    for record, time_, index in zip(ran, time_line(ran), aligned(steps, marked), strict=True):
        key = keys[index] if index is not None else alone.get(record.name, (record.name, "", ""))
        call = heads.get(index) if index is not None else None
        of_call = (call.floor_us, call.num_bytes, call.flops) if call else (0.0, 0.0, 0.0)
        values = (1.0, record.end - record.start, time_.own_us, time_.gap_us, *of_call)
        sums[key] = [a + b for a, b in zip(sums[key], values, strict=True)]
    order = list(dict.fromkeys([*(k for k in keys if k in sums), *sums]))
    found = []
    for key in order:
        count, whole, *others = sums[key]
        own, gap, floor, num_bytes, flops = (value / num_steps for value in others)
        calls_per_step, mean_us = count / num_steps, whole / count
        item = Item(key[1] or None, key[2], short(key[0]), calls_per_step, mean_us, own, floor, gap, num_bytes, flops)
        found.append(item)
    return found


def aligned(steps: Sequence[Sequence[Record]], marked: Sequence[Place]) -> list[int | None]:
    """For each record of these steps, its place in the marked step."""
    names = [place.name for place in marked]
    return [index for step in steps for index in align([record.name for record in step], names)]


def label(place: Place, calls: Sequence[Call]) -> Label:
    if place.call is None:
        return (place.name, "", "")
    call = calls[place.call]
    return (place.name, call.op, call.shape)


def longest(ran: Sequence[Record], marked: Sequence[Place]) -> set[int]:
    """Of each call's kernels, the place of the one whose name takes longest on average: there the floor stands."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for record in ran:
        by_name[record.name].append(record.end - record.start)
    mean = {name: sum(times) / len(times) for name, times in by_name.items()}
    heads: dict[int, int] = {}
    for i, place in enumerate(marked):
        if place.call is not None:
            head = heads.setdefault(place.call, i)
            if mean.get(place.name, 0.0) > mean.get(marked[head].name, 0.0):
                heads[place.call] = i
    return set(heads.values())


def add_up(found: Sequence[Item], ran: Sequence[Record], step_us: float, num_steps: int) -> tuple[Sum, list[Item]]:
    """The step by the clock as a sum, and the items with their times on the clock's scale.

    Kernels take as long as under the profiler, unless all together take longer than the step: then each is scaled
    down. Gaps get what the step then has left, up to what they were under the profiler.
    """
    line = time_line(ran)
    busy_us = sum(t.own_us for t in line) / num_steps
    profiled_gaps_us = sum(t.gap_us for t in line) / num_steps
    largest = max(range(len(ran)), key=lambda i: line[i].gap_us)
    scale = min(1.0, step_us / busy_us)
    gaps_us = min(profiled_gaps_us, step_us - scale * busy_us)
    shrink = gaps_us / profiled_gaps_us if profiled_gaps_us else 1.0
    scaled = [dataclasses.replace(i, us=i.us * scale, gap_us=i.gap_us * shrink) for i in found]
    floor_us = sum(i.floor_us for i in scaled)
    return Sum(
        step_us=step_us,
        floor_us=floor_us,
        lost_us=scale * busy_us - floor_us,
        gaps_us=gaps_us,
        unexplained_us=step_us - scale * busy_us - gaps_us,
        scale=scale,
        busy_us=busy_us,
        profiled_gaps_us=profiled_gaps_us,
        largest_gap_us=line[largest].gap_us,
        largest_gap_before=short(ran[largest].name),
        overlap_us=sum(t.overlap_us for t in line) / num_steps,
    ), scaled


def short(name: str) -> str:
    """A kernel's name without what its compiler added: return type, namespaces, template and call arguments."""
    text = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    head = re.split(r"[<(]", text, maxsplit=1)[0].strip() if not text.startswith("Mem") else text
    return head.rpartition("::")[2] or text


def table(found: Sequence[Item], total: Sum) -> str:
    """The items of a step, those under 0.3 % of it as one line; * marks what loses over 3 % of it."""
    heads = ["", "kernel", "calls", "mean us", "us/step", "floor", "lost", "of step", "gaps before"]
    small = [i for i in found if i.us + i.gap_us < WORTH_A_LINE * total.step_us]
    lines = [heads]
    for item in [i for i in found if i not in small]:
        marked = max(item.lost_us, item.gap_us) > WORTH_MARKING * total.step_us
        lines.append(
            [
                ("* " if marked else "  ") + item.name[:40],
                item.kernel[:36] if item.op else "",
                f"{item.calls:g}",
                f"{item.mean_us:.2f}",
                f"{item.us:.1f}",
                f"{item.floor_us:.1f}" if item.op else "",
                f"{item.lost_us:.1f}",
                f"{item.us / total.step_us:.1%}",
                f"{item.gap_us:.1f}",
            ]
        )
    if small:
        us, gap, floor = (sum(getattr(i, name) for i in small) for name in ("us", "gap_us", "floor_us"))
        calls = sum(i.calls for i in small)
        cells = [f"{calls:g}", "", f"{us:.1f}", f"{floor:.1f}", f"{us - floor:.1f}", f"{us / total.step_us:.1%}"]
        lines.append([f"  {len(small)} small ones", "", *cells, f"{gap:.1f}"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    pads = [str.ljust] * 2 + [str.rjust] * (len(heads) - 2)
    return "\n".join("  ".join(pad(c, w) for pad, c, w in zip(pads, line, widths)).rstrip() for line in lines)


def sum_lines(total: Sum, profiled_us: float, whole_floor_us: float) -> str:
    """The sum and what to know about it."""
    step = total.step_us
    parts = {"floor": total.floor_us, "lost in kernels": total.lost_us, "gaps": total.gaps_us}
    parts["unexplained"] = total.unexplained_us
    line = " + ".join(f"{name} {us:.0f} ({us / step:.1%})" for name, us in parts.items())
    scaled = f"; kernel times scaled by {total.scale:.3f} to fit the clock's step" if total.scale < 1 else ""
    return (
        f"step by the clock {step:.0f} us = {line}\n"
        f"floor of the whole step's bytes and flops {whole_floor_us:.0f} us: {step / whole_floor_us:.2f}x\n"
        f"under the profiler {profiled_us:.0f} us: busy {total.busy_us:.0f} (union), gaps "
        f"{total.profiled_gaps_us:.0f}, largest {total.largest_gap_us:.1f} before {total.largest_gap_before}; "
        f"overlap {total.overlap_us:.0f}{scaled}"
    )


# ---- on the GPU: steady steps of an engine


@dataclass(frozen=True)
class Scenario:
    """`batch` sequences of about `context` tokens decode; `chunks` prompts of `chunk_len` tokens come in each step."""

    batch: int
    context: int
    chunks: int = 0
    chunk_len: int = 0

    def __str__(self) -> str:
        parts = [f"{self.batch} decodes at {self.context} tokens"] if self.batch else []
        return " + ".join(parts + ([f"{self.chunks} prompts of {self.chunk_len}"] if self.chunks else []))

    @property
    def key(self) -> str:
        """For file names."""
        parts = [f"b{self.batch}-c{self.context}"] if self.batch else []
        return "-".join(parts + ([f"p{self.chunks}x{self.chunk_len}"] if self.chunks else []))


class Steady:
    """An engine kept in a scenario: every step decodes one token of each sequence, and takes `chunks` new prompts."""

    def __init__(self, engine: Engine, scenario: Scenario, num_steps: int):
        """Brings it there. Raises SystemExit for what the engine has no room for."""
        self.engine, self.scenario = engine, scenario
        config, rng = engine.config, random.Random(1)
        rows, tokens = scenario.batch + 2 * scenario.chunks, scenario.batch + scenario.chunks * scenario.chunk_len
        if rows > config.max_num_seqs:
            sys.exit(f"{scenario}: takes {rows} rows (prompts twice); --max_num_seqs is {config.max_num_seqs}.")
        if tokens > config.max_num_batched_tokens:
            sys.exit(
                f"{scenario}: {tokens} tokens a step; --max_num_batched_tokens is {config.max_num_batched_tokens}."
            )
        max_token = min(MAX_TOKEN, engine.vocab_size - 1)
        self.prompt = functools.partial(rng.choices, range(max_token + 1))
        self.num_prompts = 0
        self.waiting: Prompts = []
        # Half of the steps come before the profile, so there the context is what was asked for.
        num_tokens = 2 * num_steps + NUM_PROFILED + 3 * SETTLED
        lead = num_steps + 2 * SETTLED + scenario.batch * scenario.context // config.max_num_batched_tokens // 2
        self.ids = [f"step-decode-{i}" for i in range(scenario.batch)]
        for name in self.ids:
            prompt = self.prompt(k=max(1, scenario.context - lead))
            engine.submit(GenerateRequest(name, prompt, sampling(num_tokens + 2 * lead + scenario.batch)))
        counts = dict.fromkeys(self.ids, 0)
        while counts and min(counts.values()) < SETTLED:
            for event in engine.step():
                counts[event.id] += len(event.token_ids)
        self.draw(2)
        for _ in range(2):  # from now on one step is in flight, and brings as much as any
            self.step(check=False)

    def draw(self, num_steps: int) -> None:
        """Make the prompts of the next steps, ahead of time."""
        self.waiting += [self.prompt(k=self.scenario.chunk_len) for _ in range(num_steps * self.scenario.chunks)]

    def step(self, check: bool = True) -> None:
        for _ in range(self.scenario.chunks):
            self.engine.submit(GenerateRequest(f"step-prompt-{self.num_prompts}", self.waiting.pop(), sampling(1)))
            self.num_prompts += 1
        num_events = len(self.engine.step())
        wanted = self.scenario.batch + self.scenario.chunks
        assert not check or num_events == wanted, f"{num_events} events; a steady step brings {wanted}"

    def run(self, num_steps: int) -> float:
        """Seconds per step, by the clock."""
        self.draw(num_steps)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / num_steps

    def profile(self, num_steps: int) -> tuple[float, list[Record]]:
        """(seconds per step under the profiler, what ran)."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step_s = self.run(num_steps)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return step_s, records(json.loads(path.read_text()))

    def marked(self, limits: machine.Limits) -> tuple[list[Place], list[Call]]:
        """One step without graphs, with a mark around each op: its kernels, and its calls with their floors."""
        with marks(self.engine.runner.graphs) as calls:
            self.run(1)  # what is loaded on first use shall not be in the record
            calls.clear()
            _, ran = self.profile(1)
        return places(ran), [call_of(*call, limits) for call in calls]

    def close(self) -> None:
        for name in self.ids:
            self.engine.abort(name)
        while self.engine.busy():
            self.engine.step()


Noted = tuple[Op, str, Any, dict[str, Tensor]]  # an op, its kernel, the case, the lengths where they lie


@contextmanager
def marks(graphs: Graphs | None) -> Iterator[list[Noted]]:
    """While open, steps run eagerly, padded and with the kernels chosen as for a graph where one would be replayed;
    each call of an op is noted, and launches a mark before and after itself.
    """
    calls: list[Noted] = []
    in_graph = in_call = False

    def run(form: Form) -> Tensor:
        nonlocal in_graph
        assert graphs is not None
        in_graph = True
        try:
            return graphs.forward(form)
        finally:
            in_graph = False

    def marking(op: Op) -> Any:
        original = op.choose

        def choose(case: Any, *, on_gpu: bool, capturing: bool = False) -> Choice:
            choice = original(case, on_gpu=on_gpu, capturing=capturing or in_graph)
            if choice.kernel is None:
                return choice
            fn, name = choice.kernel.fn, choice.kernel.name

            def between_marks(*args: Any) -> Any:
                nonlocal in_call
                if in_call:  # an op made of ops: its own floor counts
                    return fn(*args)
                named = dict(zip(inspect.signature(op.reference).parameters, args))
                calls.append((op, name, case, {k: v for k, v in named.items() if k.endswith("_lens")}))
                in_call = True
                torch.cuda._sleep(1)
                out = fn(*args)
                torch.cuda._sleep(1)
                in_call = False
                return out

            return dataclasses.replace(choice, kernel=dataclasses.replace(choice.kernel, fn=between_marks))

        return choose

    decided = {name: dict(op.decided) for name, op in OPS.items()}
    for op in OPS.values():
        vars(op)["choose"] = marking(op)
        op.decided.clear()
    if graphs:
        vars(graphs)["run"] = run
    try:
        yield calls
    finally:
        if graphs:
            del vars(graphs)["run"]
        for name, op in OPS.items():
            del vars(op)["choose"]
            op.decided.clear()
            op.decided.update(decided[name])


def call_of(op: Op, kernel: str, case: Any, lens: dict[str, Tensor], limits: machine.Limits) -> Call:
    """A call with its least cost; the lengths that a case leaves to the host are read from the device."""
    lengths: dict[str, tuple[int, ...]] = {}
    for field in dataclasses.fields(case):
        if field.name in lens and getattr(case, field.name) is None:
            lengths[field.name] = tuple(lens[field.name].tolist())
        elif f"cu_{field.name}" in lens and getattr(case, field.name) is None:
            lengths[field.name] = tuple(b - a for a, b in itertools.pairwise(lens[f"cu_{field.name}"].tolist()))
    cost = op.cases.cost(dataclasses.replace(case, **lengths))
    floor_us = cost.floor_s(limits.copy_bytes_per_s, limits.bf16_flops_per_s) * 1e6
    shape = f"{case.out_dim}x{case.in_dim}" if hasattr(case, "out_dim") and hasattr(case, "in_dim") else ""
    return Call(op.name, kernel, shape, floor_us, cost.num_bytes, cost.flops)


def whole_floor_us(work: Work, scenario: Scenario, limits: machine.Limits) -> float:
    """The least time for the bytes and flops of the whole step, as bench.offline counts them."""
    batch, context, length = scenario.batch, scenario.context, scenario.chunk_len
    num_bytes = work.weight_bytes + batch * context * work.kv_token_bytes
    per_prompt = length * work.layer_flops + length * (length + 1) // 2 * work.pair_flops + work.head_flops
    flops = batch * (work.layer_flops + work.head_flops + context * work.pair_flops) + scenario.chunks * per_prompt
    return max(num_bytes / limits.copy_bytes_per_s, flops / limits.bf16_flops_per_s) * 1e6


def study(
    llm: LLM, work: Work, scenario: Scenario, limits: machine.Limits, num_steps: int | None = None
) -> dict[str, Any]:
    """Time and profile a scenario, print its table, and return what goes to JSON."""
    num_steps = num_steps or (NUM_PREFILL_STEPS if scenario.chunks else NUM_STEPS)
    num_profiled = min(NUM_PROFILED, num_steps)
    steady = Steady(llm.engine, scenario, num_steps)
    clock_s = [steady.run(num_steps)]
    marked, calls = steady.marked(limits)
    steady.run(1)
    steady.profile(1)  # the profiler's own start-up
    profiled_s, ran = steady.profile(num_profiled)
    clock_s.append(steady.run(num_steps))
    steady.close()
    steps = split(ran, num_profiled, [place.name for place in marked])
    step_us = sum(clock_s) / len(clock_s) * 1e6
    total, found = add_up(items(steps, marked, calls, num_profiled), ran, step_us, num_profiled)
    known = sum(index is not None for index in aligned(steps, marked)) / len(ran)
    floor_us = whole_floor_us(work, scenario, limits)
    print(f"\n{scenario}; step {', '.join(f'{s * 1e3:.3f}' for s in clock_s)} ms before and after the profile")
    print(table(found, total))
    print(sum_lines(total, profiled_s * 1e6, floor_us))
    print(f"{len(ran) / num_profiled:g} kernels a step, {known:.1%} of them known from the marked step", flush=True)
    return {
        "scenario": vars(scenario) | {"name": str(scenario)},
        "clock_us": [s * 1e6 for s in clock_s],
        "profiled_us": profiled_s * 1e6,
        "whole_floor_us": floor_us,
        "sum": vars(total),
        "items": [vars(item) | {"name": item.name, "lost_us": item.lost_us} for item in found],
        "num_profiled": num_profiled,
        "kernels_per_step": len(ran) / num_profiled,
        "known": known,
        "step": [
            {"name": short(r.name), "start_us": r.start - steps[0][0].start, "us": r.end - r.start, "stream": r.stream}
            for r in steps[0]
        ],
        "limits": vars(limits),
    }


# ---- the command


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def prompts_of(text: str) -> tuple[int, int]:
    """ "8x960" -> (8, 960)."""
    number, _, length = text.partition("x")
    return int(number), int(length)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--batch", type=counts, help="sequences that decode; 1,64,256 studies three steps [64; 0 if --prefill]"
    )
    made.add_argument("--context", type=int, default=1024, help="tokens of context of each [%(default)s]")
    made.add_argument(
        "--prefill", type=prompts_of, metavar="NxL", default=(0, 0), help="N prompts of L tokens in every step"
    )
    made.add_argument("--steps", type=int, help=f"timed steps, twice [{NUM_STEPS}; {NUM_PREFILL_STEPS} with --prefill]")
    made.add_argument("--json", help="file, or folder, for the results [bench/results/<machine>/]")
    made.add_argument("--commit", help="commit of this tree, where it travelled without git")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    args, engine_flags = made.parse_known_args(argv)
    config = flags.parse(engine_flags, made.prog)
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here, so no step to look into.")
    chunks, chunk_len = args.prefill
    batches = args.batch or ([0] if chunks else [64])
    scenarios = [Scenario(batch, args.context, chunks, chunk_len) for batch in batches]
    print(header.one_line(header.header(commit=args.commit)), flush=True)
    run(config, scenarios, args.json, args.steps, args.commit)


def run(
    config: Config,
    scenarios: Sequence[Scenario],
    json_path: str | None,
    num_steps: int | None = None,
    commit: str | None = None,
) -> None:
    """One engine, one table and one file for each scenario."""
    limits = machine.limits()  # before the engine takes the memory
    with LLM(**config.to_dict()) as llm:
        work = Work.of(config, getattr(torch, llm.info["config"]["dtype"]))
        for scenario in scenarios:
            results = {"engine": llm.info, **study(llm, work, scenario, limits, num_steps)}
            path = result_path(json_path or receipt.RESULTS / device.key(), "step", config, scenario.key)
            header.write_json(path, results, commit=commit)


if __name__ == "__main__":
    main()
