"""Where a step's time goes: every kernel beside its floor, the gaps between kernels, and the sum.

    python -m bench.step demo:random-qwen3-8b --batch 1,64,256 --context 1024
    python -m bench.step demo:random-qwen3-8b --prefill 8x960
    python -m bench.step demo:random-qwen3-8b --batch 64 --context 1024 --prefill 1x2048

A steady state is timed by the clock. Then, at the same context, some of its steps run under the profiler (CUPTI's
records of kernels, those inside CUDA graphs too). Which op launched a kernel is learnt, not guessed: one step runs
eagerly with a mark before and after each op, which also tells what a call takes with nothing beside it ("alone"). An
op's floor is its room's `cost` over the measured limits. How the time is shared out among kernels that overlap:
bench/timeline.py.
Flags that are not its own go to the engine.
"""

import argparse
import dataclasses
import inspect
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import header, machine, receipt
from bench.offline import MAX_TOKEN, Work, result_path, sampling
from bench.timeline import Call, Record, add_up, items, last_steps, records, sum_lines, table, time_line
from nanodeploy import LLM, flags
from nanodeploy.config import Config
from nanodeploy.ops import machine as device
from nanodeploy.ops.registry import OPS, Kernel, Op
from nanodeploy.runtime.engine import Engine
from nanodeploy.runtime.graphs import Graphs
from nanodeploy.wire import GenerateRequest

NUM_STEPS, NUM_PREFILL_STEPS = 64, 8  # by the clock, twice
NUM_PROFILED = 10
LEAD = 3  # steps ahead of those that count: the host is not ahead yet, and the profiler may lose its first records


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

    def __init__(self, engine: Engine, scenario: Scenario, num_steps: int, seed: int):
        """Brings it there, so that halfway through `num_steps` the context is the scenario's. Raises SystemExit for
        what the engine has no room for.
        """
        self.engine, self.scenario, config = engine, scenario, engine.config
        batch, chunks, most = scenario.batch, scenario.chunks, config.max_num_batched_tokens
        num_prefills = -(-batch * scenario.context // max(1, most - batch))  # steps; half of them, in the mean, decode
        lead = num_steps // 2 + num_prefills // 2
        num_tokens = num_steps + num_prefills + 16
        for what, takes, has in (
            ("rows (prompts twice)", batch + 2 * chunks, config.max_num_seqs),
            ("tokens a step", batch + chunks * scenario.chunk_len, most),
            ("tokens of a sequence", max(scenario.context, scenario.chunk_len) + num_tokens, engine.max_model_len),
            (
                "tokens of cache",
                batch * (scenario.context + num_tokens) + 2 * chunks * scenario.chunk_len,
                engine.num_pages * engine.page_size,
            ),
        ):
            if takes > has:
                sys.exit(f"{scenario}: takes {takes} {what}; this engine has {has}.")
        engine.reset_prefix_cache()  # prompts of an earlier scenario may be the same
        rng, tokens = random.Random(seed), range(min(MAX_TOKEN + 1, engine.vocab_size))
        self.name = f"step-{seed}"
        self.prompts = [rng.choices(tokens, k=scenario.chunk_len) for _ in range((num_steps + 2 * LEAD) * chunks)]
        self.ids = [f"{self.name}-decode-{i}" for i in range(batch)]
        for id in self.ids:
            prompt = rng.choices(tokens, k=max(1, scenario.context - lead))
            engine.submit(GenerateRequest(id, prompt, sampling(num_tokens)))
        left = set(self.ids)
        while left:
            left -= {event.id for event in engine.step()}
        for _ in range(2):  # from now on one step is in flight, and brings as much as any
            self.step(check=False)

    def step(self, check: bool = True) -> None:
        for _ in range(self.scenario.chunks):
            id = f"{self.name}-prompt-{len(self.prompts)}"
            self.engine.submit(GenerateRequest(id, self.prompts.pop(), sampling(1)))
        num_events = len(self.engine.step())
        wanted = self.scenario.batch + self.scenario.chunks
        assert not check or num_events == wanted, f"{num_events} events; a steady step brings {wanted}"

    def run(self, num_steps: int) -> float:
        """Seconds per step, by the clock: from the end of one step to the end of another."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self.step()
        return (time.perf_counter() - start) / num_steps

    def profile(self, num_steps: int) -> list[list[Record]]:
        """What ran in each of these steps."""

        def work() -> None:
            for _ in range(LEAD + num_steps):
                mark()
                self.step()

        return last_steps(profiled(work), num_steps)

    def marked(self, limits: machine.Limits) -> tuple[list[Record], list[Call]]:
        """One step without graphs, with a mark around each op: what ran, and its calls with their floors."""
        with marks(self.engine.runner.graphs) as calls:

            def work() -> None:
                for _ in range(LEAD):
                    calls.clear()
                    mark()
                    self.step()

            ran = profiled(work)
        (last,) = last_steps(ran, 1, 1 + 2 * len(calls))
        return last, [call_of(*call, limits) for call in calls]

    def close(self) -> None:
        for id in self.ids:
            self.engine.abort(id)
        while self.engine.busy():
            self.engine.step()


def mark() -> None:
    torch.cuda._sleep(1)


def profiled(work: Callable[[], None]) -> list[Record]:
    """What the device ran meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return records(json.loads(path.read_text()))


Noted = tuple[Op, str, Any, dict[str, Tensor]]  # an op, its kernel, the case, the lengths where they lie


@contextmanager
def marks(graphs: Graphs | None) -> Iterator[list[Noted]]:
    """While open, steps run eagerly, padded as for a graph where one would be replayed; each call of an op's kernel is
    noted, and launches a mark before and after itself.
    """
    calls: list[Noted] = []
    inside = False

    def marking(op: Op, kernel: Kernel) -> Kernel:
        def between_marks(*args: Any) -> Any:
            nonlocal inside
            if inside:  # an op made of ops: its own floor counts
                return kernel.fn(*args)
            named = dict(zip(inspect.signature(op.reference).parameters, args))
            lens = {name: value for name, value in named.items() if name.endswith("_lens")}
            calls.append((op, kernel.name, op.cases.of(*args), lens))
            inside = True
            mark()
            out = kernel.fn(*args)
            mark()
            inside = False
            return out

        return dataclasses.replace(kernel, fn=between_marks)

    before = [(op, kernel) for op in OPS.values() for kernel in op.kernels.values()]
    for op, kernel in before:
        op.put(kernel.name, marking(op, kernel))
    if graphs:
        vars(graphs)["run"] = graphs.forward
    try:
        yield calls
    finally:
        if graphs:
            del vars(graphs)["run"]
        for op, kernel in before:
            op.put(kernel.name, kernel)


def call_of(op: Op, kernel: str, case: Any, lens: dict[str, Tensor], limits: machine.Limits) -> Call:
    """A call with its least cost; the lengths that a case leaves to the host are read from the device."""
    lengths: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(case) if getattr(case, f.name) is None):
        if name in lens:
            lengths[name] = tuple(lens[name].tolist())
        elif f"cu_{name}" in lens:
            ends = lens[f"cu_{name}"].tolist()
            lengths[name] = tuple(b - a for a, b in itertools.pairwise(ends))
            lengths["num_before"] = ends[0]
    cost = op.cases.cost(dataclasses.replace(case, **lengths))
    floor_us = cost.floor_s(limits.copy_bytes_per_s, limits.bf16_flops_per_s) * 1e6
    shape = f"{case.out_dim}x{case.in_dim}" if hasattr(case, "out_dim") and hasattr(case, "in_dim") else ""
    return Call(op.name, kernel, shape, floor_us, cost.num_bytes, cost.flops)


def whole_floor_us(work: Work, scenario: Scenario, limits: machine.Limits) -> float:
    """The least time for the bytes and flops of the whole step, as bench.offline counts them."""
    batch, context, length = scenario.batch, scenario.context, scenario.chunk_len
    num_bytes = work.read_bytes(batch + scenario.chunks * length) + batch * context * work.kv_token_bytes
    per_prompt = length * work.layer_flops + length * (length + 1) // 2 * work.pair_flops + work.head_flops
    flops = batch * (work.layer_flops + work.head_flops + context * work.pair_flops) + scenario.chunks * per_prompt
    return max(num_bytes / limits.copy_bytes_per_s, flops / limits.bf16_flops_per_s) * 1e6


def study(
    llm: LLM, work: Work, scenario: Scenario, limits: machine.Limits, num_steps: int | None = None
) -> dict[str, Any]:
    """Time and profile a scenario, print its table, and return what goes to JSON."""
    num_steps = num_steps or (NUM_PREFILL_STEPS if scenario.chunks else NUM_STEPS)
    num_profiled = min(NUM_PROFILED, num_steps)
    # The clock comes first, for the profiler may stay attached and slow what follows.
    steady = Steady(llm.engine, scenario, LEAD + 2 * num_steps, seed=0)
    steady.run(LEAD)
    clock_us = [steady.run(num_steps) * 1e6 for _ in range(2)]
    steady.close()
    steady = Steady(llm.engine, scenario, 2 * LEAD + num_profiled, seed=1)
    marked, calls = steady.marked(limits)
    steps = steady.profile(num_profiled)
    steady.close()
    found, known = items(steps, marked, calls)
    total, found = add_up(found, steps, sum(clock_us) / len(clock_us))
    floor_us = whole_floor_us(work, scenario, limits)
    num_kernels = sum(len(time_line(step)) for step in steps) / num_profiled
    print(f"\n{scenario}; step by the clock {', '.join(f'{us / 1e3:.3f}' for us in clock_us)} ms")
    print(table(found, total))
    print(sum_lines(total, floor_us))
    print(f"{num_kernels:g} kernels a step, {len(time_line(marked))} in the marked one; {known:.1%} known from it")
    sys.stdout.flush()
    return {
        "scenario": vars(scenario) | {"name": str(scenario)},
        "clock_us": clock_us,
        "whole_floor_us": floor_us,
        "sum": vars(total),
        "items": [vars(item) | {"name": item.name, "lost_us": item.lost_us} for item in found],
        "num_profiled": num_profiled,
        "kernels_per_step": num_kernels,
        "known": known,
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
    made.add_argument("--batch", type=counts, help="sequences that decode; 1,64 studies two steps [64; 0 if --prefill]")
    made.add_argument("--context", type=int, default=1024, help="tokens of context of each [%(default)s]")
    made.add_argument(
        "--prefill", type=prompts_of, metavar="NxL", default=(0, 0), help="N prompts of L tokens in every step"
    )
    made.add_argument("--steps", type=int, help=f"timed steps, twice [{NUM_STEPS}; {NUM_PREFILL_STEPS} with --prefill]")
    made.add_argument("--json", help="folder, or file (.json) of a single step [bench/results/<machine>]")
    made.add_argument("--commit", help="commit of this tree, where it travelled without git")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    args, engine_flags = made.parse_known_args(argv)
    config = flags.parse(engine_flags, made.prog)
    chunks, chunk_len = args.prefill
    scenarios = [Scenario(batch, args.context, chunks, chunk_len) for batch in args.batch or ([0] if chunks else [64])]
    if args.json and args.json.endswith(".json") and len(scenarios) > 1:
        made.error(f"--json {args.json} is one file; there are {len(scenarios)} steps to study. Name a folder.")
    if not torch.cuda.is_available():
        sys.exit("There is no GPU here, so no step to look into.")
    print(header.one_line(header.header(commit=args.commit)), flush=True)
    run(config, scenarios, args.json or receipt.RESULTS / device.key(), args.steps, args.commit)


def run(
    config: Config, scenarios: Sequence[Scenario], where: str | Path, num_steps: int | None, commit: str | None
) -> None:
    """One engine, one table and one file for each scenario."""
    limits = machine.limits()  # before the engine takes the memory
    with LLM(**config.to_dict()) as llm:
        work = Work.of(config, getattr(torch, llm.info["config"]["dtype"]))
        for scenario in scenarios:
            results = {"engine": llm.info, **study(llm, work, scenario, limits, num_steps)}
            header.write_json(result_path(where, "step", config, scenario.key), results, commit=commit)


if __name__ == "__main__":
    main()
