"""Which configuration of prefill_attention/tiles is fastest, on this GPU.

python -m bench.sweeps.prefill_attention [--points NAME ...]

Points are those of the room's cases.py. Each configuration is checked against the reference before it is timed.
TFLOP/s counts what the causal mask leaves.
"""

import argparse
import functools

import torch
from triton.runtime.errors import OutOfResources

from bench.sweeps.decode_attention import worst_row
from bench.timing import graph_us
from nanodeploy.ops.layouts import KVCache
from nanodeploy.ops.prefill_attention import cases
from nanodeploy.ops.prefill_attention.reference import prefill_attention
from nanodeploy.ops.prefill_attention.tiles import Config, configs, launch

DEFAULT = [name for name in cases.POINTS if "page" not in name]


def measure(case: cases.Case) -> list[tuple[float, Config]]:
    """(us, configuration), the fastest first. A wrong result is an error."""
    args = cases.make(case, torch.device("cuda"), 0)
    q, pages, scales, table, kv_lens, cu_q_lens, sinks, scale, window, _ = args
    rest = table, kv_lens, cu_q_lens, sinks, scale, window
    wanted = prefill_attention.reference(*args)
    min_calls = 3 if cases.cost(case).flops > 1e11 else 20
    found = []
    for config in configs(case.head_dim):
        try:
            error = worst_row(launch(q, KVCache(pages, scales), *rest, config), wanted)
        except OutOfResources as problem:
            print(f"  {config}: {problem}")
            continue
        assert error < 1e-2, f"{config} is wrong: relative error {error}"
        call = functools.partial(launch, q, KVCache(pages, scales), *rest, config)
        found.append((graph_us([call], min_calls), config))
    return sorted(found, key=lambda pair: pair[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", choices=list(cases.POINTS), default=DEFAULT)
    args = parser.parse_args()
    for name in args.points:
        case = cases.POINTS[name]
        flops, shipped = cases.cost(case).flops, configs(case.head_dim)[0]
        print(name)
        for us, config in measure(case):
            mark = "  <- shipped" if config == shipped else ""
            print(f"  {us:9.1f} us {flops / us / 1e6:6.0f} TFLOP/s  {config}{mark}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
