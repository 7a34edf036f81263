"""Which configuration of decode_attention/planned is fastest, on this GPU.

python -m bench.sweeps.decode_attention [--points NAME ...] [--top 4]

Points are those of the room's cases.py; by default one page size. Each configuration is checked against the reference
before it is timed. GB/s counts what must be read and written once; the plan is made beforehand, as in the engine.
"""

import argparse
import functools

import torch
from triton.runtime.errors import OutOfResources

from bench.timing import graph_us
from nanodeploy.ops.decode_attention import cases
from nanodeploy.ops.decode_attention.planned import Config, block_rows, configs, launch
from nanodeploy.ops.decode_attention.reference import decode_attention

L2_BYTES = 60e6
MAX_SETS = 32
DEFAULT = [name for name in cases.POINTS if "page" not in name]


def worst_row(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest relative error of a row [E]."""
    error, size = ((t.float()).norm(dim=-1) for t in (got.float() - wanted.float(), wanted))
    return float((error / size.clamp_min(1e-30)).max())


def contenders(case: cases.Case) -> list[Config]:
    """The configurations to try, the shipped one first."""
    block_m = block_rows(case.num_queries * case.group, case.has_prefixes and not case.window)
    return configs(case.head_dim, case.kv_dtype.itemsize, block_m)


def measure(case: cases.Case) -> list[tuple[float, Config]]:
    """(us, configuration), the fastest first. A wrong result is an error."""
    num_sets = min(MAX_SETS, max(1, -(-int(4 * L2_BYTES) // cases.cost(case).num_bytes)))
    sets = [cases.make(case, torch.device("cuda"), seed) for seed in range(num_sets)]
    wanted = decode_attention.reference(*sets[0])
    found = []
    for config in contenders(case):
        try:
            error = worst_row(launch(*sets[0], config=config), wanted)
        except OutOfResources as problem:
            print(f"  {config}: {problem}")
            continue
        assert error < 1e-2, f"{config} is wrong: relative error {error}"
        found.append((graph_us([functools.partial(launch, *args, config=config) for args in sets]), config))
    return sorted(found, key=lambda pair: pair[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", choices=list(cases.POINTS), default=DEFAULT)
    parser.add_argument("--top", type=int, default=4, help="configurations to show per point, beside the shipped one")
    args = parser.parse_args()
    for name in args.points:
        case = cases.POINTS[name]
        num_bytes, shipped = cases.cost(case).num_bytes, contenders(case)[0]
        print(name)
        for rank, (us, config) in enumerate(measure(case)):
            if rank < args.top or config == shipped:
                mark = "  <- shipped" if config == shipped else ""
                print(f"  {us:8.2f} us {num_bytes / us / 1e3:6.0f} GB/s  {config}{mark}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
