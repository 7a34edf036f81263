"""Offline throughput, steady decode and prefill, beside vLLM's figures and the machine's floor.

    python -m bench.offline demo:random-qwen3-8b --json bench/results/h200/offline-qwen3-8b.json
    python -m bench.offline demo:random-qwen3-8b --tests idle

w        256 requests at once, prompt and output lengths uniform in 100-1024, temperature 0.6, ignore_eos: output tok/s
decode   time per output token of 1, 8, 64, 256 sequences with 960-token prompts: (t(136 tokens) - t(8 tokens)) / 128
prefill  one token from a 16k prompt (the decode test times 960-token prompts)
idle     share of time in which no kernel runs, over decode steps of 256 sequences

The workloads and the method are those behind peers.json, request for request. Flags that are not its own go to the
engine. The floor is the least time for the bytes (at the measured copy bandwidth) and the flops (at the measured bf16
rate) of the same work.
"""

import argparse
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import header, machine
from nanodeploy import LLM, SamplingParams, catalog, flags
from nanodeploy.config import Config
from nanodeploy.models import checkpoint, registry
from nanodeploy.models.layers.experts import Experts
from nanodeploy.runtime import cache
from nanodeploy.wire import GenerateRequest

PEERS = json.loads((Path(__file__).parent / "peers.json").read_text())
TESTS = ("w", "decode", "prefill", "idle")
NUM_REQUESTS = 256  # of W, as the peers ran it
MAX_TOKEN = 10000
PROMPT_LEN = 960  # of the decode test
SHORT, LONG = 8, 136  # output tokens of the two decode runs
IDLE_BATCH, IDLE_STEPS, IDLE_TOKENS = 256, 48, 256

Prompts = list[list[int]]


# The workloads


def workload(num_requests: int, max_token: int) -> tuple[Prompts, list[SamplingParams]]:
    """W: the same draws, in the same order, as the peers' driver made."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, max_token) for _ in range(rng.randint(100, 1024))] for _ in range(num_requests)]
    params = [sampling(rng.randint(100, 1024)) for _ in range(num_requests)]
    return prompts, params


def sampling(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=num_tokens)


def generate_s(llm: LLM, prompts: Prompts, params: SamplingParams | list[SamplingParams]) -> float:
    """Seconds that these prompts take, and a check that every token asked for came."""
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    elapsed = time.perf_counter() - start
    wanted = (
        [params.max_tokens] * len(prompts) if isinstance(params, SamplingParams) else [p.max_tokens for p in params]
    )
    assert [len(o.outputs[0].token_ids) for o in outputs] == wanted, "fewer tokens came than were asked for"
    return elapsed


# The floor


@dataclass(frozen=True)
class Work:
    """What one token costs a model at least, in bytes and flops."""

    weight_bytes: int  # read by every step; of the embedding only a few rows are, unless it is the output layer too
    kv_token_bytes: int  # of all layers
    layer_flops: int  # per token, without attention
    head_flops: int  # per token whose logits are wanted
    pair_flops: int  # attention, per (query, key) pair, all layers
    expert_bytes: int = 0  # of all experts of all layers; a step reads those that its tokens are sent to
    expert_share: float = 0.0  # of them that one token is sent to

    @staticmethod
    def of(config: Config, dtype: torch.dtype) -> "Work":
        """Count the parameters of the model, built without memory."""
        files = catalog.locate(config.model, config.tokenizer)
        model = registry.skeleton(files, config.load_format, config.quantization)
        shape: Any = model.shape
        experts = [module for module in model.modules() if isinstance(module, Experts)]
        share = shape.routing.top_k / shape.routing.num_experts if experts else 0.0
        num_in_experts = sum(module.gate_up.numel() + module.down.numel() for module in experts)
        expert_bytes = sum(checkpoint.num_bytes(module, dtype) for module in experts)
        embedding = shape.vocab_size * shape.hidden_size
        elsewhere = embedding * (1 if shape.tied else 2) + num_in_experts
        scales = sum(p.numel() for name, p in model.named_parameters() if "scale" in name)
        num_in_layers = sum(p.numel() for p in model.parameters()) - scales - elsewhere
        kv_dtype = cache.KV_DTYPES.get(config.kv_cache_dtype, dtype)
        layouts = [need.layout(config.kvcache_block_size, kv_dtype) for need in model.cache_needs()]
        unread = 0 if shape.tied else embedding * dtype.itemsize
        return Work(
            weight_bytes=checkpoint.num_bytes(model, dtype) - expert_bytes - unread,
            kv_token_bytes=sum(layout.token_bytes for layout in layouts),
            layer_flops=2 * num_in_layers + round(2 * num_in_experts * share),
            head_flops=2 * embedding,
            pair_flops=pair_flops(shape),
            expert_bytes=expert_bytes,
            expert_share=share,
        )

    def read_bytes(self, num_tokens: float) -> float:
        """Weights that a step of so many tokens reads, if its routers have no favourites."""
        return self.weight_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** num_tokens)

    def decode_floor_s(self, batch: int, kv_len: float, limits: machine.Limits) -> float:
        """One decode step of `batch` sequences with `kv_len` tokens of context each."""
        num_bytes = self.read_bytes(batch) + batch * kv_len * self.kv_token_bytes
        flops = batch * (self.layer_flops + self.head_flops + kv_len * self.pair_flops)
        return max(num_bytes / limits.copy_bytes_per_s, flops / limits.bf16_flops_per_s)

    def prefill_floor_s(self, prompt_lens: Iterable[int], limits: machine.Limits) -> float:
        """The first token of each of these prompts."""
        lens = list(prompt_lens)
        flops = sum(n * self.layer_flops + n * (n + 1) // 2 * self.pair_flops + self.head_flops for n in lens)
        return max(self.read_bytes(sum(lens)) / limits.copy_bytes_per_s, flops / limits.bf16_flops_per_s)

    def workload_floor_s(self, prompt_lens: Sequence[int], output_lens: Sequence[int], limits: machine.Limits) -> float:
        """Prefill, then as many decode steps as the longest output has tokens; each reads the weights and its KV."""
        kv_tokens = sum(n * (p + n // 2) for p, n in zip(prompt_lens, output_lens))
        running = [sum(n > step for n in output_lens) for step in range(max(output_lens))]
        num_bytes = sum(map(self.read_bytes, running)) + kv_tokens * self.kv_token_bytes
        return self.prefill_floor_s(prompt_lens, limits) + num_bytes / limits.copy_bytes_per_s


def pair_flops(shape: Any) -> int:
    """Of attention, for one query and one key, all heads and layers: of latents with the heads' own keys and values."""
    if hasattr(shape, "attention"):
        dims = shape.attention
        return 2 * dims.num_heads * (dims.nope_dim + dims.rope_dim + dims.value_dim) * shape.num_layers
    return 4 * shape.num_heads * shape.head_dim * shape.num_layers


# The tests


@dataclass
class Row:
    """One line of the table. `better` says which way is up."""

    name: str
    value: float
    unit: str  # "tok/s", "ms" or "%"
    floor: float | None = None
    peer_key: tuple[str, ...] = ()

    def better(self, than: float) -> float:
        """How many times better than another value: above 1 is ahead."""
        return self.value / than if self.unit == "tok/s" else than / self.value


@dataclass
class Bench:
    """The engine under test and what the tests share."""

    llm: LLM
    work: Work
    limits: machine.Limits | None  # None without a GPU: no floor
    max_token: int
    rng: random.Random
    details: dict[str, Any] = field(default_factory=dict)

    def prompts(self, batch: int, length: int) -> Prompts:
        return [[self.rng.randint(0, self.max_token) for _ in range(length)] for _ in range(batch)]

    def warm_up(self) -> None:
        """What the peers' driver ran first; and the graphs, which they capture at start-up and we in idle moments."""
        while self.llm.engine.idle():
            pass
        generate_s(self.llm, self.prompts(1, 4), sampling(16))
        generate_s(self.llm, self.prompts(8, 1000), sampling(16))

    def w(self, args: argparse.Namespace) -> list[Row]:
        prompts, params = workload(args.num_requests, self.max_token)
        prompt_lens, output_lens = [len(p) for p in prompts], [p.max_tokens or 0 for p in params]
        seconds = []
        for _ in range(args.repeat):
            self.llm.reset_prefix_cache()
            seconds.append(generate_s(self.llm, prompts, params))
            print(f"  w: {seconds[-1]:.2f} s", flush=True)
        floor_s = self.limits and self.work.workload_floor_s(prompt_lens, output_lens, self.limits)
        num_output = sum(output_lens)
        key = ("w_output_tok_s",) if args.num_requests == NUM_REQUESTS else ()
        floor = num_output / floor_s if floor_s else None
        return [Row(f"W ({len(prompts)} requests)", num_output / min(seconds), "tok/s", floor, key)]

    def decode(self, args: argparse.Namespace) -> list[Row]:
        rows = []
        for batch in args.batches:
            # Others of the same lengths first: a step of a new size is captured when it first runs.
            generate_s(self.llm, self.prompts(batch, PROMPT_LEN), sampling(1))
            prompts = self.prompts(batch, PROMPT_LEN)
            prefill_s = generate_s(self.llm, prompts, sampling(1))
            generate_s(self.llm, prompts, sampling(SHORT))
            tpots_s = []
            for _ in range(2):
                short_s = generate_s(self.llm, prompts, sampling(SHORT))
                tpots_s.append((generate_s(self.llm, prompts, sampling(LONG)) - short_s) / (LONG - SHORT))
            kv_len = PROMPT_LEN + (SHORT + LONG) / 2
            floor_s = self.limits and self.work.decode_floor_s(batch, kv_len, self.limits)
            floor_ms = floor_s * 1e3 if floor_s else None
            rows.append(Row(f"TPOT, batch {batch}", min(tpots_s) * 1e3, "ms", floor_ms, ("tpot_ms", str(batch))))
            rows.append(self.prefill_row(batch, PROMPT_LEN, prefill_s))
            print(f"  decode: batch {batch}, TPOT {', '.join(f'{t * 1e3:.3f}' for t in tpots_s)} ms", flush=True)
        return rows

    def prefill(self, args: argparse.Namespace) -> list[Row]:
        length = min(args.prefill_len, self.llm.engine.max_model_len - 1)
        seconds = min(generate_s(self.llm, self.prompts(1, length), sampling(1)) for _ in range(2))
        return [self.prefill_row(1, length, seconds)]

    def prefill_row(self, batch: int, length: int, seconds: float) -> Row:
        floor_s = self.limits and self.work.prefill_floor_s([length] * batch, self.limits)
        tokens, name = batch * length, f"{batch}x{length}"
        floor = tokens / floor_s if floor_s else None
        return Row(f"prefill {name}", tokens / seconds, "tok/s", floor, ("prefill_tok_s", name))

    def idle(self, args: argparse.Namespace) -> list[Row]:
        if not torch.cuda.is_available():
            sys.exit("--tests idle: there is no GPU here.")
        self.details["idle"] = found = measure_idle(self)
        print("  idle: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
        return [Row(f"GPU idle, batch {IDLE_BATCH}", found["idle_share"] * 100, "%")]


# GPU idle time


def measure_idle(bench: Bench) -> dict[str, float]:
    """Steady decode of IDLE_BATCH sequences: the share of time in which no kernel runs.

    `idle_share` is over a window under the profiler, which slows the CPU a little; `idle_share_unprofiled` sets the
    same kernels' time per step against the time per step without a profiler. `gap_share` counts only pauses of 10 us
    and more: those between graphs, not those between the kernels of one.
    """
    engine = bench.llm.engine
    ids = [f"idle-{i}" for i in range(IDLE_BATCH)]
    for name, prompt in zip(ids, bench.prompts(IDLE_BATCH, PROMPT_LEN), strict=True):
        engine.submit(GenerateRequest(name, prompt, sampling(IDLE_TOKENS)))
    num_tokens = dict.fromkeys(ids, 0)
    while min(num_tokens.values()) < SHORT:
        for event in engine.step():
            num_tokens[event.id] += len(event.token_ids)

    def steps(num_steps: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(num_steps):
            assert len(engine.step()) == IDLE_BATCH, "every step of a steady decode brings one token each"
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / num_steps

    def profiled(num_steps: int) -> tuple[float, list[tuple[float, float]]]:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            step_s = steps(num_steps)
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            return step_s, kernel_intervals(json.loads(Path(f"{folder}/trace.json").read_text()))

    profiled(2)  # the profiler's own start-up
    step_s = steps(IDLE_STEPS)
    profiled_step_s, intervals = profiled(IDLE_STEPS)
    for name in ids:
        engine.abort(name)
    while engine.busy():
        engine.step()
    busy_us, gap_us = busy_and_gaps(intervals, min_gap=10)
    window_us = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return {
        "idle_share": 1 - busy_us / window_us,
        "gap_share": gap_us / window_us,
        "idle_share_unprofiled": 1 - busy_us / IDLE_STEPS / (step_s * 1e6),
        "busy_ms_per_step": busy_us / IDLE_STEPS / 1e3,
        "step_ms": step_s * 1e3,
        "profiled_step_ms": profiled_step_s * 1e3,
        "kernels_per_step": len(intervals) / IDLE_STEPS,
    }


def kernel_intervals(trace: dict[str, Any]) -> list[tuple[float, float]]:
    """(start, end) in microseconds of everything that ran on the GPU: kernels, copies, fills."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    events = [e for e in trace["traceEvents"] if e.get("cat") in kinds and e.get("ph") == "X"]
    return [(e["ts"], e["ts"] + e["dur"]) for e in events]


def busy_and_gaps(intervals: Iterable[tuple[float, float]], min_gap: float) -> tuple[float, float]:
    """Length of the union of the intervals, and of the pauses between them that last at least `min_gap`."""
    busy, gaps, reached = 0.0, 0.0, float("-inf")
    for start, end in sorted(intervals):
        if start - reached >= min_gap and reached > float("-inf"):
            gaps += start - reached
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy, gaps


# The report


def title(config: Config) -> str:
    """The model's name, and what makes its figures another's: qwen3-8b, qwen3-8b-fp8 (its cache), -fp8-weights."""
    name = Path(config.model.removeprefix("demo:").removeprefix("random-")).name.lower()
    weights = f"-{config.quantization}-weights" if config.quantization != "auto" else ""
    return name + variant(config) + weights + ("-deterministic" if config.deterministic else "")


def variant(config: Config) -> str:
    """What the peers were measured with too: "-fp8" for an FP8 KV cache."""
    return "-fp8" if config.kv_cache_dtype == "fp8" else ""


def result_path(where: str | Path, kind: str, config: Config, *parts: str) -> Path:
    """`where` itself if it is a JSON file's name, else the file of this kind of result in that folder."""
    where = Path(where)
    return where if where.suffix == ".json" else where / f"{'-'.join((kind, title(config), *parts))}.json"


def peers_of(config: Config) -> dict[str, Any]:
    """What peers.json knows about this model with this cache: peer -> its figures."""
    name = config.model.removeprefix("demo:").lower() + variant(config)
    return PEERS["models"].get(name, {})


def look_up(figures: dict[str, Any], key: Sequence[str]) -> float | None:
    """A peer's figure, or None if it was not measured."""
    value: Any = figures if key else None
    for part in key:
        value = value.get(part) if value else None
    return value


def table(rows: Sequence[Row], peers: dict[str, Any]) -> str:
    """Ours, the floor and how far from it, then each peer and how many times better ours is (above 1 is ahead)."""
    heads = ["", "nanodeploy", "floor", "of floor", *itertools.chain.from_iterable((p, "ours/theirs") for p in peers)]
    lines = [heads]
    for row in rows:
        line = [f"{row.name}, {row.unit}", number(row.value), number(row.floor)]
        line.append(f"{1 / row.better(row.floor):.2f}x" if row.floor else "")
        for figures in peers.values():
            theirs = look_up(figures, row.peer_key)
            line += [number(theirs), f"{row.better(theirs):.2f}" if theirs else ""]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    pads = [str.ljust] + [str.rjust] * (len(heads) - 1)
    return "\n".join("  ".join(pad(cell, width) for pad, cell, width in zip(pads, line, widths)) for line in lines)


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def memory() -> dict[str, float]:
    """Peaks of this process, in GiB."""
    found = {"host_max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "gpu_max_allocated": torch.cuda.max_memory_allocated() / 2**30,
            "gpu_max_reserved": torch.cuda.max_memory_reserved() / 2**30,
            "gpu_in_use": (total - free) / 2**30,
            "gpu_total": total / 2**30,
        }
    return found


def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench.offline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--tests", type=listed(str), default=["w", "decode", "prefill"], help="of w,decode,prefill,idle")
    sizes = (NUM_REQUESTS, [1, 8, 64, 256]) if torch.cuda.is_available() else (8, [1, 8])
    made.add_argument("--batches", type=listed(int), default=sizes[1], help="of the decode test [%(default)s]")
    made.add_argument("--num-requests", type=int, default=sizes[0], help="of W; peers are shown for 256 [%(default)s]")
    made.add_argument("--prefill-len", type=int, default=16384, help="of the prefill test, cut to what the model takes")
    made.add_argument("--repeat", type=int, default=1, help="runs of W; the best counts")
    made.add_argument("--idle", action="store_true", help="the idle test too")
    made.add_argument("--json", help="write the results to this file, or to offline-<model>.json in this folder")
    made.add_argument("--commit", help="commit of this tree, where it travelled without git")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    made = parser()
    args, engine_flags = made.parse_known_args(argv)
    tests = args.tests + (["idle"] if args.idle else [])
    if unknown := set(tests) - set(TESTS):
        made.error(f"--tests {', '.join(unknown)}: there are {', '.join(TESTS)}")
    config = flags.parse(engine_flags, made.prog)
    print(header.one_line(header.header(commit=args.commit)), flush=True)
    limits = machine.limits() if torch.cuda.is_available() else None  # before the engine takes the memory
    start = time.perf_counter()
    with LLM(**config.to_dict()) as llm:
        while llm.engine.idle():  # the peers capture their graphs before they are ready; so do we before the clock runs
            pass
        start_s = time.perf_counter() - start
        dtype = getattr(torch, llm.info["config"]["dtype"])
        max_token = min(MAX_TOKEN, llm.engine.vocab_size - 1)
        bench = Bench(llm, Work.of(config, dtype), limits, max_token, random.Random(1))
        bench.warm_up()
        rows = list(itertools.chain.from_iterable(getattr(bench, test)(args) for test in tests))
        print(f"\n{config.model}, engine ready after {start_s:.1f} s\n{table(rows, peers_of(config))}", flush=True)
        memory_gib = memory()
        results = {
            "engine": llm.info,
            "engine_start_s": start_s,
            "rows": [vars(row) for row in rows],
            "details": bench.details,
            "limits": limits and vars(limits),
            "memory_gib": memory_gib,
            "peers": {"source": PEERS["source"], **peers_of(config)},
        }
    print("memory (GiB): " + ", ".join(f"{name} {gib:.1f}" for name, gib in memory_gib.items()))
    if args.json:
        header.write_json(result_path(args.json, "offline", config), results, commit=args.commit)


if __name__ == "__main__":
    main()
