"""Which configurations of mla_prefill's kernels are fastest, on this GPU; from how many tokens on expanding pays.

python -m bench.sweeps.mla_prefill [--points NAME ...]     configurations, at points of the room's cases.py
python -m bench.sweeps.mla_prefill --crossover             absorbed against expanded, by tokens of a chunk

Each configuration is checked against the kernel as shipped before it is timed. TFLOP/s counts the least work: that of
the form which needs less.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.sweeps.decode_attention import worst_row
from bench.timing import graph_us
from nanodeploy.ops.head_linear import head_linear
from nanodeploy.ops.mla_prefill import absorbed, cases, expanded, mla_prefill, warp_groups

DEFAULT = ["h128 4x2048", "h128 128 at the end of 16384", "h16 8x1024", "h16 64 at the end of 8192"]
CROSSOVER = [
    (heads, context, chunk) for heads in (128, 16) for context in (4096, 32768) for chunk in (16, 64, 128, 256)
]


def min_calls(case: cases.Case) -> int:
    return 3 if cases.cost(case).flops > 1e11 else 20


def contenders(args: tuple) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """(configuration, a call of it, the shipped one's call)."""
    q_nope, q_rope, pages, table, kv_lens, cu_q_lens, w_uk, w_uv, scale, _ = args
    inner = head_linear(q_nope, w_uk.transpose(1, 2)), q_rope, pages, table, kv_lens, cu_q_lens, scale
    tiles = absorbed.configs(pages.dtype == torch.uint8)
    calls = [functools.partial(absorbed.attend, *inner, config) for config in tiles]
    yield from ((f"absorbed without its products {tile}", call, calls[0]) for tile, call in zip(tiles, calls))
    if (q_nope.shape[2], w_uv.shape[1]) != (128, 128):
        return
    calls = [functools.partial(expanded.launch, *(*args, config)) for config in expanded.configs()]
    yield from ((f"expanded {shape}", call, calls[0]) for shape, call in zip(expanded.configs(), calls))
    if mla_prefill.kernels["warp_groups"].available():
        for shape in warp_groups.configs():
            call = functools.partial(expanded.launch, *(*args, shape, warp_groups.attend))
            yield f"warp_groups {shape}", call, calls[0]


def lines(case: cases.Case) -> Iterator[str]:
    """A line for each configuration that compiles. A wrong result is an error."""
    args = cases.make(dataclasses.replace(case, known=True), torch.device("cuda"), 0)
    flops = cases.cost(case).flops
    for name, call, shipped in contenders(args):
        try:
            error = worst_row(call(), shipped())
        except OutOfResources as problem:
            yield f"{name}: {problem}"
            continue
        assert error < 2e-2, f"{name} is wrong: relative error {error}"
        us = graph_us([call], min_calls(case))
        yield f"{us:9.1f} us {flops / us / 1e6:5.0f} TFLOP/s  {name}"


def crossover(heads: int, context: int, chunk: int, fp8: bool = False) -> dict[str, float]:
    """Microseconds of every kernel for one chunk at the end of its context."""
    case = cases.point((chunk,), (context,), heads, fp8)
    args = cases.make(case, torch.device("cuda"), 0)
    return {
        name: graph_us([functools.partial(kernel.fn, *args)], min_calls(case))
        for name, kernel in mla_prefill.kernels.items()
        if kernel.available() and kernel.needs != "cpu" and kernel.order is None
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", nargs="+", choices=list(cases.POINTS), default=DEFAULT)
    parser.add_argument("--crossover", action="store_true")
    args = parser.parse_args()
    if args.crossover:
        for heads, context, chunk in CROSSOVER:
            found = ", ".join(f"{name} {us:.0f} us" for name, us in crossover(heads, context, chunk).items())
            print(f"{heads} heads, {chunk} tokens at the end of {context}: {found}", flush=True)
        return
    for name in args.points:
        print(name)
        for line in lines(cases.POINTS[name]):
            print(f"  {line}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
