"""Which configurations of gdn_scan/chunks and gdn_step/one_pass are fastest, on this GPU.

python -m bench.sweeps.gdn [scan|step ...]

Points are those of the rooms' cases.py. Each result is checked against another configuration's before it is timed.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench.timing import graph_us, input_sets
from nanodeploy.ops.gdn_scan import cases as scan_cases
from nanodeploy.ops.gdn_scan import chunks
from nanodeploy.ops.gdn_step import cases as step_cases
from nanodeploy.ops.gdn_step import one_pass

SCANS = [chunks.FEW, chunks.MANY]
STEPS = [(4, None), (8, None), (8, 128), (16, None), (16, 64)]  # warps, registers a thread at most


def measure(cases: Any, case: Any, call: Callable[..., torch.Tensor], configs: list[Any]) -> list[tuple[float, Any]]:
    """(us, configuration), the fastest first. A result unlike the first configuration's is an error."""
    cost = cases.cost(case)
    sets = input_sets(functools.partial(cases.make, case, torch.device("cuda")), cost.num_bytes)
    found, wanted = [], None
    for config in configs:
        try:
            got = call(*sets[0], config)
        except OutOfResources as problem:
            print(f"  {config}: {problem}")
            continue
        wanted = got if wanted is None else wanted
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)
        calls = [functools.partial(call, *args, config) for args in sets]
        found.append((graph_us(calls, min_calls=5), config))
    return sorted(found, key=lambda pair: pair[0])


def step(*args: Any) -> torch.Tensor:
    return one_pass.run(*args[:-1], *args[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", choices=["scan", "step"], default=["scan", "step"])
    args = parser.parse_args()
    for what in args.what:
        cases, call, configs = (scan_cases, chunks.launch, SCANS) if what == "scan" else (step_cases, step, STEPS)
        for name, case in cases.POINTS.items():
            print(f"gdn_{what} {name}")
            for us, config in measure(cases, case, call, configs):
                rate = cases.cost(case).num_bytes / us / 1e3
                print(f"  {us:9.1f} us {rate:6.0f} GB/s  {config}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
