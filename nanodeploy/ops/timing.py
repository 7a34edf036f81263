"""How a call on a GPU is timed: medians by device events, of CUDA graph replays, over rotating inputs.

By the benches and by `nanodeploy tune`.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SET_BYTES = 16 * 2**30  # most memory that rotating inputs may take
MAX_SETS = 256
GRAPH_MS = 4.0  # work in one graph, so that its launch does not count
SWEEP_REPLAYS = 7
BUDGET_MS = 120.0  # work per measurement: short, as the clock falls under sustained load


@dataclass(frozen=True)
class Timing:
    """One measurement."""

    us: float  # median
    spread_us: float  # between the 10th and the 90th percentile
    how: str  # "graph" or "stream"
    from_memory: bool = True  # False: all inputs together fit in the L2 cache, and were read from there


def l2_bytes() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def input_sets(make: Callable[[int], tuple[Any, ...]], call_bytes: int) -> list[tuple[Any, ...]]:
    """Enough inputs, from seeds 0, 1, ..., that by the time one comes round again the L2 cache has forgotten it.

    call_bytes: what one call reads and writes. Small inputs stop at MAX_SETS: there, even a model finds them in the L2.
    """
    first = make(0)
    held = sum(a.untyped_storage().nbytes() for a in first if isinstance(a, Tensor))
    wanted = math.ceil(3 * l2_bytes() / max(1, call_bytes))
    count = max(1, min(wanted, MAX_SETS, SET_BYTES // max(1, held)))
    return [first, *(make(seed) for seed in range(1, count))]


def time_call(
    fn: Callable[..., Any], sets: Sequence[tuple[Any, ...]], call_bytes: int, *, graph: bool = True
) -> Timing:
    """Time fn(*args) over the sets in turn. `graph` False: launched one by one, for what no graph can capture."""
    from_memory = len(sets) * call_bytes >= 2 * l2_bytes()
    calls = [functools.partial(fn, *args) for args in sets]
    timing = graph_time(calls) if graph else stream_time(calls)
    return Timing(timing.us, timing.spread_us, timing.how, from_memory)


def graph_time(calls: Sequence[Callable[[], object]]) -> Timing:
    """Of one call, when a CUDA graph runs all of them in turn, as often as GRAPH_MS takes."""
    _first_run(calls)
    once_ms = _elapsed_ms(lambda: _run(calls))
    rounds = max(1, min(50, math.ceil(GRAPH_MS / once_ms)))
    return _repeated(_captured(calls, rounds).replay, rounds * len(calls), "graph")


def graph_us(calls: Sequence[Callable[[], object]], min_calls: int = 20) -> float:
    """Microseconds of one call, the median over replays of a graph that runs `calls` in turn, at least `min_calls`.

    For sweeps: quicker than graph_time, and no spread. Give as many calls on data of their own as it takes to overflow
    the L2 cache, if data should come from memory.
    """
    _first_run(calls)
    rounds = -(-min_calls // len(calls))
    graph = _captured(calls, rounds)
    return statistics.median(_elapsed_ms(graph.replay) for _ in range(SWEEP_REPLAYS)) * 1e3 / (rounds * len(calls))


def stream_time(calls: Sequence[Callable[[], object]]) -> Timing:
    """Of one call, launched from Python back to back."""
    _run(calls)
    rounds = max(1, min(50, math.ceil(GRAPH_MS / _elapsed_ms(lambda: _run(calls)))))

    def work() -> None:
        for _ in range(rounds):
            _run(calls)

    return _repeated(work, rounds * len(calls), "stream")


def _first_run(calls: Sequence[Callable[[], object]]) -> None:
    """Once each on a stream of its own, as a capture wants it: kernels are compiled and loaded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _run(calls)
    torch.cuda.current_stream().wait_stream(side)


def _captured(calls: Sequence[Callable[[], object]], rounds: int) -> torch.cuda.CUDAGraph:
    """A graph of so many rounds of the calls, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            _run(calls)
    graph.replay()
    return graph


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()


def _elapsed_ms(work: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _repeated(work: Callable[[], None], num_calls: int, how: str) -> Timing:
    first = _elapsed_ms(work)
    repeats = max(7, min(100, math.ceil(BUDGET_MS / max(first, 1e-3))))
    times = sorted(_elapsed_ms(work) * 1e3 / num_calls for _ in range(repeats))
    low, high = times[repeats // 10], times[-1 - repeats // 10]
    return Timing(statistics.median(times), high - low, how)
