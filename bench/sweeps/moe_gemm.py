"""Which way to run the experts is fastest on this GPU: every kernel, and every configuration of those that have some.

python -m bench.sweeps.moe_gemm [--shapes qwen3-30b ...] [--tokens 1 8 64 ...] [--top 3]

Experts and routing rotate through more memory than the L2 cache holds; kernels overlap as they do in a step. Prints a
table beside PyTorch's grouped product (in bf16), then lines for the tables of measured configurations.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from bench.timing import graph_us, input_sets
from nanodeploy.ops.layouts import E4M3
from nanodeploy.ops.moe_gemm import moe_gemm, streamed, tiles, weight_ring
from nanodeploy.ops.moe_gemm.cases import Case
from nanodeploy.ops.moe_gemm.tiles import Config, Schedule

# name -> experts here, D, I, experts of the whole model, in FP8
SHAPES = {
    "qwen3-30b": (128, 2048, 768, 128, False),
    "qwen3-30b fp8": (128, 2048, 768, 128, True),
    "deepseek-v3 ep8": (32, 7168, 2048, 256, True),
    "deepseek-v3 ep32": (8, 7168, 2048, 256, True),
}
ONE_FIRST = [(2, 1024, 2), (2, 2048, 4), (4, 1024, 4), (4, 2048, 8), (8, 512, 4), (1, 2048, 2)]
ONE_SECOND = [(1, 256, 1), (2, 256, 1), (2, 256, 2), (4, 256, 2), (4, 256, 4), (2, 1024, 4), (4, 1024, 4)]
LEFT = [(32, 128, 4, 3), (32, 128, 4, 4), (32, 128, 4, 5), (32, 256, 4, 4), (64, 64, 4, 5), (64, 128, 4, 4)]
LEFT += [(64, 128, 4, 5), (128, 64, 4, 4), (128, 128, 8, 3)]
LEFT_FP8 = [(128, 128, 4, 3), (128, 128, 4, 4), (128, 128, 4, 5), (128, 128, 8, 4)]
RIGHT = [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4)]
RIGHT_2 = [(128, 64, 4, 3), (128, 64, 4, 4), (128, 64, 8, 4), (256, 64, 8, 3), (256, 64, 8, 4)]


def schedules(tokens: int, fp8: bool) -> Iterator[Schedule]:
    """The default with one of its two products done otherwise: what one likes, the other does not change."""
    base = tiles.default(tokens, fp8)
    yield base
    if fp8:
        firsts = [Config(*shape, weight_left=True) for shape in LEFT_FP8] if tokens <= 32 else []
        seconds = [Config(*shape, weight_left=True) for shape in LEFT if shape[1] == 128] if tokens <= 32 else []
        if tokens > 32:
            firsts = [Config(128, 128, 8, 3), Config(128, 128, 8, 4, group=8), Config(128, 128, 8, 4, persistent=True)]
            seconds = [Config(128, 128, 8, 3, group=8), Config(128, 128, 4, 4), Config(128, 128, 8, 4, persistent=True)]
    elif tokens <= 64:
        firsts = [Config(*shape, weight_left=True) for shape in LEFT]
        seconds = firsts
    else:
        firsts = [Config(*shape, group=8) for shape in RIGHT] + [Config(128, 64, 8, 4, persistent=True, group=8)]
        seconds = [Config(*shape, group=8) for shape in RIGHT_2]
        seconds += [Config(*shape, persistent=True, group=8) for shape in RIGHT_2]
    for first in firsts:
        yield Schedule(base.tokens, first, base.second)
    for second in seconds:
        yield Schedule(base.tokens, base.first, second)


def candidates(case: Case) -> Iterator[tuple[str, Callable]]:
    """(what to print, what to call) for every kernel that takes the case."""
    for kernel in moe_gemm.kernels.values():
        if kernel.available() and kernel.needs != "cpu" and kernel.when(case):
            yield kernel.name, kernel.fn
    if case.num_tokens == 1:
        for first in ONE_FIRST:
            for second in ONE_SECOND if first == ONE_FIRST[0] else ONE_SECOND[4:5]:
                pair = streamed.Config(*first), streamed.Config(*second)
                yield f"streamed {pair}", functools.partial(_with, streamed.run, pair)
    per_expert = case.num_tokens * case.top_k / case.num_experts
    for tokens in (16, 32, 64, 128):
        if tokens / 4 <= max(per_expert, 4) and (per_expert <= tokens or tokens == 128):
            for chosen in dict.fromkeys(schedules(tokens, case.scaled)):
                yield f"tiles {chosen}", functools.partial(_with, tiles.run, (chosen,))
            ring = moe_gemm.kernels["weight_ring"]
            if tokens <= 64 and ring.available() and ring.when(case):
                chosen_ring = weight_ring.config(tokens, case.scaled)
                yield f"ring {chosen_ring}", functools.partial(_with, weight_ring.run, (chosen_ring,))


def _with(run: Callable[..., torch.Tensor], chosen: tuple, *args: Any) -> torch.Tensor:
    return run(*args, *chosen)


def library(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales):
    """PyTorch's own way: sort, two grouped products, weight, add up. All experts are here, in bf16."""
    order = ids.flatten().argsort(stable=True)
    counts = torch.nn.functional.one_hot(ids.flatten().long(), gate_up.shape[0]).sum(0)
    ends = counts.cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), ends).chunk(2, dim=-1)
    h = torch.nn.functional.silu(gate) * up
    parts = torch._grouped_mm(h, down.transpose(1, 2), ends) * weights.flatten()[order, None]
    return torch.zeros_like(x).index_add_(0, order // ids.shape[1], parts.to(x.dtype))


def measure(case: Case) -> tuple[float | None, list[tuple[float, str]]]:
    """(PyTorch's us where it can, our (us, what) from the fastest on). A wrong result is an error."""
    cost = moe_gemm.cases.cost(case)
    make = functools.partial(moe_gemm.cases.make, case, torch.device("cuda"))
    sets = input_sets(make, cost.num_bytes)
    wanted = moe_gemm.kernels["tiles"].fn(*sets[0]).float()
    found = list(candidates(case))
    with ThreadPoolExecutor(8) as pool:  # most of the time is compiling
        fits = list(pool.map(lambda pair: _fits(pair[1], sets[0]), found))
    torch.cuda.synchronize()
    times = []
    for (name, run), fit in zip(found, fits):
        if fit:
            error = (run(*sets[0]).float() - wanted).norm() / wanted.norm()
            assert error < 1e-2, f"{name} is wrong at {case}: {error}"
            times.append((graph_us([functools.partial(run, *args) for args in sets], min_calls=10), name))
    plain = not case.scaled and case.num_routed == case.num_experts and hasattr(torch, "_grouped_mm")
    theirs = graph_us([functools.partial(library, *args) for args in sets], min_calls=10) if plain else None
    return theirs, sorted(times)


def _fits(run: Callable, args: tuple) -> bool:
    try:
        run(*args)
    except OutOfResources:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 8192])
    parser.add_argument("--top", type=int, default=4, help="configurations to show per shape")
    args = parser.parse_args()
    for name in args.shapes:
        num_experts, dim, inner, num_routed, fp8 = SHAPES[name]
        for num_tokens in args.tokens:
            dtype = E4M3 if fp8 else torch.bfloat16
            case = Case(dtype, num_tokens, 8, num_experts, dim, inner, fp8, num_routed)
            cost = moe_gemm.cases.cost(case)
            theirs, found = measure(case)
            beside = f", torch {theirs:.1f} us" if theirs else ""
            print(f"{name} T{num_tokens}: {cost.num_bytes / 1e6:.1f} MB, {cost.flops / 1e9:.2f} GFLOP{beside}")
            for us, what in found[: args.top]:
                rates = f"{cost.num_bytes / us / 1e3:6.0f} GB/s {cost.flops / us / 1e6:6.0f} TFLOP/s"
                print(f"  {us:8.2f} us {rates}  {what}", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
