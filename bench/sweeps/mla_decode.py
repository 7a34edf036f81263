"""Which configuration of mla_decode/planned is fastest, on this GPU; the other kernels beside it.

python -m bench.sweeps.mla_decode [--points NAME ...] [--top 4]

Points are those of the room's cases.py. Each configuration is checked against the reference before it is timed. GB/s
and TFLOP/s count the least work; the plan is made beforehand, as in the engine.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench.sweeps.decode_attention import L2_BYTES, MAX_SETS, worst_row
from bench.timing import graph_us
from nanodeploy.ops.mla_decode import cases, mla_decode
from nanodeploy.ops.mla_decode.planned import block_rows, configs, launch

DEFAULT = [
    *("h16 B64 ctx4096", "h16 B128 ctx4096", "h16 B1 ctx32768", "h128 B128 ctx4096", "h16 B64 ctx200-8192"),
    *("h16 B64 ctx4096 fp8", "h128 B128 ctx4096 fp8", "h16 B64 ctx4096 4 queries"),
]


def contenders(case: cases.Case) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, the call), the shipped configuration of planned first."""
    for config in configs(block_rows(case.num_rows)):
        yield f"planned {config}", functools.partial(launch, config=config)
    for name, kernel in mla_decode.kernels.items():
        ours = name != "planned" and kernel.needs != "cpu"
        if ours and kernel.available() and kernel.capturable and kernel.when(case):
            yield name, kernel.fn


def measure(case: cases.Case) -> list[tuple[float, str]]:
    """(us, contender), the fastest first. A wrong result is an error."""
    num_sets = min(MAX_SETS, max(1, -(-int(4 * L2_BYTES) // cases.cost(case).num_bytes)))
    sets = [cases.make(case, torch.device("cuda"), seed) for seed in range(num_sets)]
    wanted = mla_decode.reference(*sets[0])
    found = []
    for name, call in contenders(case):
        try:
            error = worst_row(call(*sets[0]), wanted)
        except OutOfResources as problem:
            print(f"  {name}: {problem}")
            continue
        assert error < 2e-2, f"{name} is wrong: relative error {error}"
        found.append((graph_us([functools.partial(call, *args) for args in sets]), name))
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", choices=list(cases.POINTS), default=DEFAULT)
    parser.add_argument("--top", type=int, default=4, help="contenders to show per point, beside the shipped one")
    args = parser.parse_args()
    for name in args.points:
        case = cases.POINTS[name]
        cost, shipped = cases.cost(case), next(contenders(case))[0]
        print(name)
        for rank, (us, who) in enumerate(measure(case)):
            if rank < args.top or who == shipped:
                rates = f"{cost.num_bytes / us / 1e3:6.0f} GB/s {cost.flops / us / 1e6:5.0f} TFLOP/s"
                print(f"  {us:8.2f} us {rates}  {who}{'  <- shipped' if who == shipped else ''}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
