"""HTTP load on /v1/completions: TTFT, TPOT, ITL, throughput and goodput.

    python -m bench.serve --launch demo:random-qwen3-8b --num-prompts 256 --request-rate 16 --goodput ttft:500 tpot:25
    python -m bench.serve --port 8000 --max-concurrency 64 --json out.json

Prompts are random token ids sent with ignore_eos, so every request generates exactly what it asks for. The client is
raw asyncio streams, one connection a request, and it says when it was itself the bottleneck. Times are seconds inside
and milliseconds in the report. Flags that are not its own go to the server that --launch starts.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.header import header, one_line, write_json

LAG_TICK_S = 0.02
MAX_CPU_SHARE = 0.8  # of one core; above it the client's own clock readings are late
MAX_LAG_S = 0.02


@dataclass(frozen=True)
class Work:
    """One request to send, `at_s` after the start."""

    at_s: float
    prompt: list[int]
    output_tokens: int


@dataclass
class Outcome:
    """What came back. Times count from when the request was sent."""

    num_prompt: int
    num_output: int = 0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: list[float] = field(default_factory=list)  # between chunks that carry a choice
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Seconds per output token after the first; None for a single token."""
        return (self.latency_s - self.ttft_s) / (self.num_output - 1) if self.num_output > 1 else None


@dataclass(frozen=True)
class Target:
    host: str
    port: int
    model: str = ""


@dataclass
class ClientLoad:
    """How busy the load generator itself was."""

    cpu_share: float = 0.0  # of one core
    max_lag_s: float = 0.0  # how late its event loop ran a timer

    @property
    def complaint(self) -> str | None:
        if self.cpu_share > MAX_CPU_SHARE or self.max_lag_s > MAX_LAG_S * 5:
            return (
                f"the client was the bottleneck (its CPU {self.cpu_share:.0%} of a core, event loop up to "
                f"{self.max_lag_s * 1e3:.0f} ms late): the server is faster than these numbers."
            )
        return None


def make_work(args: argparse.Namespace, seed: int) -> list[Work]:
    """The requests of a seed: lengths uniform in their ranges, Poisson arrivals (all at once at rate inf)."""
    rng = random.Random(seed)
    at_s, work = 0.0, []
    for _ in range(args.num_prompts):
        prompt = [rng.randint(0, args.max_token_id) for _ in range(rng.randint(*args.input_len))]
        work.append(Work(at_s, prompt, rng.randint(*args.output_len)))
        if args.request_rate != float("inf"):
            at_s += rng.expovariate(args.request_rate)
    return work


# HTTP/1.1, as little of it as a load generator needs


async def send(
    target: Target, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes, asyncio.StreamReader, Any]:
    """One request on a connection of its own. Returns status, lower-case head, the reader at the body, the writer."""
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=2**20)
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    await writer.drain()
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    return int(answer.split(b" ", 2)[1]), answer, reader, writer


async def pieces(head: bytes, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body as it arrives, without its chunk framing."""
    if b"transfer-encoding: chunked" not in head:
        while piece := await reader.read(2**16):
            yield piece
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def get(target: Target, path: str) -> tuple[int, bytes]:
    """Status and body of a GET."""
    status, head, reader, writer = await send(target, "GET", path)
    body = b"".join([piece async for piece in pieces(head, reader)])
    writer.close()
    return status, body


async def complete(target: Target, work: Work, temperature: float) -> Outcome:
    """Send one streaming completion and time its chunks. Failures come back in the outcome."""
    body = json.dumps(
        {
            "model": target.model,
            "prompt": work.prompt,
            "max_tokens": work.output_tokens,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    outcome, writer = Outcome(len(work.prompt)), None
    sent = last = time.perf_counter()
    try:
        status, head, reader, writer = await send(target, "POST", "/v1/completions", body)
        if status != 200:
            text = b"".join([piece async for piece in pieces(head, reader)])
            outcome.error = f"HTTP {status}: {text.decode(errors='replace')[:300]}"
            return outcome
        rest = b""
        async for piece in pieces(head, reader):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                now = time.perf_counter()
                if "error" in event:
                    outcome.error = str(event["error"])[:300]
                elif event.get("choices"):
                    if outcome.ttft_s:
                        outcome.itl_s.append(now - last)
                    else:
                        outcome.ttft_s = now - sent
                    last = now
                if event.get("usage"):
                    outcome.num_output = event["usage"]["completion_tokens"]
        outcome.latency_s = last - sent
        if outcome.error is None and outcome.num_output != work.output_tokens:
            outcome.error = f"asked for {work.output_tokens} tokens, got {outcome.num_output}"
    except (OSError, ValueError, asyncio.IncompleteReadError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    finally:
        if writer:
            writer.close()
    return outcome


async def run_load(target: Target, works: Sequence[Work], args: argparse.Namespace) -> tuple[list[Outcome], float]:
    """Send every request at its time, at most --max-concurrency at once. Returns outcomes and the duration."""
    gate = asyncio.Semaphore(args.max_concurrency or len(works))
    start = time.perf_counter()

    async def one(work: Work) -> Outcome:
        await asyncio.sleep(max(0.0, start + work.at_s - time.perf_counter()))
        async with gate:
            return await complete(target, work, args.temperature)

    outcomes = await asyncio.gather(*(one(work) for work in works))
    return list(outcomes), time.perf_counter() - start


async def watch_lag(load: ClientLoad) -> None:
    """Note how late the event loop runs a timer, until cancelled."""
    while True:
        due = time.perf_counter() + LAG_TICK_S
        await asyncio.sleep(LAG_TICK_S)
        load.max_lag_s = max(load.max_lag_s, time.perf_counter() - due)


# Numbers


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the neighbours, as numpy's default; 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread_ms(values_s: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile in milliseconds; zeros for no values."""
    mean = statistics.fmean(values_s) if values_s else 0.0
    return {
        "mean": mean * 1e3,
        "median": percentile(values_s, 50) * 1e3,
        "p99": percentile(values_s, 99) * 1e3,
    }


def meets(outcome: Outcome, limits_ms: dict[str, float]) -> bool:
    """Whether a finished request kept every limit; one token has no TPOT to keep."""
    took = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s or 0.0, "e2el": outcome.latency_s}
    return all(took[name] * 1e3 <= limit for name, limit in limits_ms.items())


def summarize(outcomes: Sequence[Outcome], duration_s: float, goodput_ms: dict[str, float]) -> dict[str, Any]:
    """The report's numbers; failed requests count only as failures."""
    done = [o for o in outcomes if o.error is None]
    num_prompt, num_output = sum(o.num_prompt for o in done), sum(o.num_output for o in done)
    summary: dict[str, Any] = {
        "successful": len(done),
        "failed": len(outcomes) - len(done),
        "first_error": next((o.error for o in outcomes if o.error), None),
        "duration_s": duration_s,
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "requests_per_s": len(done) / duration_s,
        "output_tokens_per_s": num_output / duration_s,
        "total_tokens_per_s": (num_prompt + num_output) / duration_s,
        "ttft_ms": spread_ms([o.ttft_s for o in done]),
        "tpot_ms": spread_ms([o.tpot_s for o in done if o.tpot_s is not None]),
        "itl_ms": spread_ms([gap for o in done for gap in o.itl_s]),
        "e2el_ms": spread_ms([o.latency_s for o in done]),
    }
    if goodput_ms:
        summary["goodput_per_s"] = sum(meets(o, goodput_ms) for o in done) / duration_s
    return summary


def block(summary: dict[str, Any]) -> str:
    """The well-known result block."""
    rows: list[tuple[str, float, str] | str] = [
        ("Successful requests:", summary["successful"], "d"),
        ("Failed requests:", summary["failed"], "d"),
        ("Benchmark duration (s):", summary["duration_s"], ".2f"),
        ("Total input tokens:", summary["prompt_tokens"], "d"),
        ("Total generated tokens:", summary["output_tokens"], "d"),
        ("Request throughput (req/s):", summary["requests_per_s"], ".2f"),
        ("Output token throughput (tok/s):", summary["output_tokens_per_s"], ".2f"),
        ("Total token throughput (tok/s):", summary["total_tokens_per_s"], ".2f"),
    ]
    if "goodput_per_s" in summary:
        rows.insert(6, ("Request goodput (req/s):", summary["goodput_per_s"], ".2f"))
    for title, name in (
        ("Time to First Token", "ttft"),
        ("Time per Output Token (excl. 1st token)", "tpot"),
        ("Inter-token Latency", "itl"),
        ("End-to-end Latency", "e2el"),
    ):
        rows.append(f"{title:-^58}")
        for word in ("mean", "median", "p99"):
            rows.append((f"{word.capitalize()} {name.upper()} (ms):", summary[f"{name}_ms"][word], ".2f"))
    lines = [row if isinstance(row, str) else f"{row[0]:<43}{row[1]:>15{row[2]}}" for row in rows]
    return "\n".join([f"{' Serving Benchmark Result ':=^58}", *lines, "=" * 58])


# The command


def length_range(text: str) -> tuple[int, int]:
    """`128` or `100-1024`, in tokens."""
    low, _, high = text.partition("-")
    bounds = (int(low), int(high or low))
    if not 1 <= bounds[0] <= bounds[1]:
        raise ValueError(text)
    return bounds


def limit(text: str) -> tuple[str, float]:
    """`ttft:500`: a limit in milliseconds."""
    name, _, ms = text.partition(":")
    if name not in ("ttft", "tpot", "e2el"):
        raise ValueError(text)
    return name, float(ms)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__.split("\n")[0], allow_abbrev=False)
    made.add_argument("--launch", metavar="MODEL", help="start a server on MODEL first, and stop it afterwards")
    made.add_argument("--launch-timeout", type=float, default=300, help="seconds the server may take to be ready")
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--num-prompts", type=int, default=256)
    made.add_argument("--num-warmups", type=int, default=8, help="requests before the clock starts")
    made.add_argument("--request-rate", type=float, default=float("inf"), help="Poisson arrivals, requests/s")
    made.add_argument("--max-concurrency", type=int, help="requests in flight at most")
    made.add_argument("--input-len", type=length_range, default=(100, 1024), help="tokens: N or LOW-HIGH")
    made.add_argument("--output-len", type=length_range, default=(100, 1024), help="tokens: N or LOW-HIGH")
    made.add_argument("--max-token-id", type=int, default=10000, help="prompts draw ids from 0 to this")
    made.add_argument("--temperature", type=float, default=0.6)
    made.add_argument("--goodput", type=limit, nargs="+", default=[], metavar="NAME:MS", help="ttft, tpot, e2el")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", help="write the results here")
    made.add_argument("--commit", help="commit of this tree, where it travelled without git")
    return made


async def wait_ready(target: Target, server: subprocess.Popen[bytes], timeout_s: float) -> float:
    """Seconds until /health answers 200. Exits if the server ends or takes longer than `timeout_s`."""
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < timeout_s:
        if server.poll() is not None:
            sys.exit(f"the server ended with code {server.returncode} before it was ready.")
        try:
            if (await get(target, "/health"))[0] == 200:
                return waited
        except (OSError, asyncio.IncompleteReadError):
            pass  # not listening yet
        await asyncio.sleep(0.1)
    sys.exit(f"the server was not ready after {timeout_s:.0f} s.")


async def bench(args: argparse.Namespace, server: subprocess.Popen[bytes] | None) -> dict[str, Any]:
    """Run the load against a server that is up or coming up; returns what goes to the JSON file."""
    target = Target(args.host, args.port)
    results: dict[str, Any] = {"arguments": {k: str(v) if v == float("inf") else v for k, v in vars(args).items()}}
    if server:
        results["server_ready_s"] = await wait_ready(target, server, args.launch_timeout)
        print(f"server ready after {results['server_ready_s']:.1f} s", flush=True)
    try:
        model = json.loads((await get(target, "/v1/models"))[1])["data"][0]["id"]
    except OSError as error:
        sys.exit(f"nothing answers at {target.host}:{target.port} ({error}). Start a server or pass --launch MODEL.")
    target = Target(args.host, args.port, model)
    works = make_work(args, args.seed)
    warm_ups = make_work(args, args.seed + 1)[: args.num_warmups]  # other prompts: nothing of ours is cached
    await asyncio.gather(*(complete(target, Work(0, w.prompt, 16), args.temperature) for w in warm_ups))
    load, cpu_s = ClientLoad(), time.process_time()
    watcher = asyncio.create_task(watch_lag(load))
    outcomes, duration_s = await run_load(target, works, args)
    watcher.cancel()
    load.cpu_share = (time.process_time() - cpu_s) / duration_s
    results |= summarize(outcomes, duration_s, dict(args.goodput))
    results["client"] = {"cpu_share": load.cpu_share, "max_lag_ms": load.max_lag_s * 1e3, "complaint": load.complaint}
    return results


def main() -> None:
    made = parser()
    args, server_flags = made.parse_known_args()
    if server_flags and not args.launch:
        made.error(f"unknown flags {' '.join(server_flags)} (without --launch there is no server to pass them to)")
    server = None
    if args.launch:
        where = ["--host", args.host, "--port", str(args.port)]
        command = [sys.executable, "-m", "nanodeploy.serve", args.launch, *where, *server_flags]
        server = subprocess.Popen(command)
    try:
        results = asyncio.run(bench(args, server))
    finally:
        if server and server.poll() is None:
            server.terminate()
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()
    results["server_flags"] = server_flags
    print(one_line(header(commit=args.commit)))
    print(block(results))
    if results["first_error"]:
        print(f"first failure: {results['first_error']}")
    if results["client"]["complaint"]:
        print(f"warning: {results['client']['complaint']}")
    if args.json:
        write_json(args.json, results, commit=args.commit)
    if not results["successful"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
