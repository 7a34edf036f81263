"""What this machine can do at most, measured: the bandwidth of a large copy and the rate of a large bf16 product."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

COPY_BYTES = 4 * 2**30
GEMM = 8192


@dataclass(frozen=True)
class Limits:
    """Measured rates of this machine. Copy counts bytes read plus bytes written."""

    copy_bytes_per_s: float
    bf16_flops_per_s: float


@functools.cache
def limits() -> Limits:
    """Measure once per process (under a second). Needs a CUDA device."""
    source = torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy_s = _best_s(functools.partial(target.copy_, source))
    del source, target
    a, b = (torch.randn(GEMM, GEMM, device="cuda").bfloat16() for _ in range(2))
    gemm_s = _best_s(functools.partial(torch.mm, a, b))
    torch.cuda.empty_cache()
    return Limits(COPY_BYTES / copy_s, 2 * GEMM**3 / gemm_s)


def _best_s(work: Callable[[], object], runs: int = 8) -> float:
    """Seconds of the fastest of some runs, by device events."""
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)
