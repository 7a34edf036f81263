"""How the sweeps time: a CUDA graph of many calls, so that launches cost what they cost in the engine."""

import statistics
from collections.abc import Callable, Sequence

import torch

REPLAYS = 7


def graph_us(calls: Sequence[Callable[[], object]], min_calls: int = 20) -> float:
    """Microseconds of one call, the median over replays of a graph that runs `calls` in turn, at least `min_calls`.

    Give as many calls on data of their own as it takes to overflow the L2 cache, if data should come from memory.
    """
    rounds = -(-min_calls // len(calls))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for call in calls:
                call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) * 1e3 / (rounds * len(calls))
