"""Which configuration of linear_fp8/tiles and linear_fp8/warp_groups is fastest, beside cuBLAS in bf16, on this GPU.

python -m bench.sweeps.linear_fp8 [--tokens 1 64 8192] [--shapes "qwen3-8b gate_up" ...] [--top 3]

Weights rotate through more memory than the L2 cache holds; kernels overlap as they do in a step. torch._scaled_mm
stands beside them where it takes scales by blocks. The percentage is of the time that reading the weights takes.
"""

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.timing import graph_us
from nanodeploy.ops.linear_fp8 import linear_fp8, tiles, warp_groups
from nanodeploy.ops.linear_fp8.cases import SHAPES, Case

L2_BYTES = 60e6
COPY_BYTES_PER_US = 4.26e6  # what this kind of GPU reads in a microsecond

Config = tiles.Config | warp_groups.Config


def candidates(num_tokens: int, out_dim: int, in_dim: int) -> list[Config]:
    """Configurations worth trying: few tokens with enough programs, none with far too many."""
    if num_tokens <= 64:
        tokens = tiles.bucket(num_tokens)
        shapes = [(64, 4, n) for n in (3, 4, 6, 8, 12)] + [(128, 8, n) for n in (3, 4, 6)] + [(128, 4, 4), (128, 4, 6)]
        splits = [1]
        while out_dim / 64 * splits[-1] < 2 * tiles.NUM_SMS and in_dim >= 1024 * splits[-1]:
            splits.append(2 * splits[-1])
        return [
            tiles.Config(tokens, *shape, weight_left=True, ahead=512, splits=n)
            for shape in shapes
            for n in splits
            if n == 1 or (shape[0] == 64 and shape[2] <= 6)
        ]
    found: list[Config] = [warp_groups.Config(*c) for c in ((2, 4), (2, 5), (2, 6), (3, 3), (3, 4))]
    found += [tiles.Config(128, 64, 4, n) for n in (4, 6)]
    found += [tiles.Config(128, 64, 4, n, weight_left=True) for n in (4, 6)]
    found += [tiles.Config(128, 128, 8, n, persistent=persistent) for n in (3, 4) for persistent in (False, True)]
    return [*found, tiles.Config(64, 128, 8, 4, weight_left=True)]


def run(args: tuple, config: Config) -> Tensor:
    runner: Callable[..., Tensor] = tiles.run if isinstance(config, tiles.Config) else warp_groups.run
    return runner(*args, config)


def scaled_mm(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, dtype: torch.dtype) -> Tensor:
    """PyTorch's own, where its cuBLAS takes scales by 1 x 128 and 128 x 128."""
    return torch._scaled_mm(x, weight.t(), scale_a=x_scales, scale_b=weight_scales.t(), out_dtype=dtype)


def measure(num_tokens: int, out_dim: int, in_dim: int) -> tuple[dict[str, float], list[tuple[float, Config]]]:
    """(us of others by name, our (us, configuration) from the fastest on). A wrong result is an error."""
    num_weights = max(1, -(-int(4 * L2_BYTES) // (out_dim * in_dim)))
    case = Case(torch.bfloat16, num_tokens, out_dim, in_dim)
    sets = [linear_fp8.cases.make(case, torch.device("cuda"), seed) for seed in range(num_weights)]
    wanted = run(sets[0], tiles.config(num_tokens, out_dim, in_dim)).float()
    few_calls = 4 if num_tokens * out_dim * in_dim > 1e11 else 20
    others: dict[str, float] = {}
    wide = [(args[0].bfloat16(), args[2].bfloat16()) for args in sets[: max(1, num_weights // 2)]]
    others["cuBLAS bf16"] = graph_us([functools.partial(torch.nn.functional.linear, *w) for w in wide], few_calls)
    del wide
    try:
        scaled_mm(*sets[0])
        others["_scaled_mm"] = graph_us([functools.partial(scaled_mm, *args) for args in sets], few_calls)
    except (RuntimeError, ValueError) as error:
        print(f"  torch._scaled_mm: {str(error).splitlines()[0]}")
    found = []
    for config in candidates(num_tokens, out_dim, in_dim):
        try:
            got = run(sets[0], config)
        except OutOfResources as error:
            print(f"  {config}: {error}")
            continue
        same = torch.equal(got.float(), wanted)
        alike = same or (getattr(config, "splits", 1) > 1 and torch.allclose(got.float(), wanted, rtol=2e-2, atol=2e-2))
        assert alike, f"{config} is wrong, or has other bits, at T {num_tokens}"
        calls: list[Callable[[], Tensor]] = [functools.partial(run, args, config) for args in sets]
        found.append((graph_us(calls, few_calls), config))
    return others, sorted(found, key=lambda row: row[0])


def line(us: float, num_tokens: int, out_dim: int, in_dim: int) -> str:
    flops, floor_us = 2 * num_tokens * out_dim * in_dim, out_dim * in_dim / COPY_BYTES_PER_US
    return f"{us:8.1f} us {flops / us / 1e6:6.0f} TFLOP/s {100 * floor_us / us:4.0f} % of the weight's time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256, 2048, 8192])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--top", type=int, default=3, help="configurations to show per shape")
    args = parser.parse_args()
    for num_tokens in args.tokens:
        for name in args.shapes:
            others, found = measure(num_tokens, *SHAPES[name])
            print(f"{name} T{num_tokens}")
            for other, us in others.items():
                print(f"  {line(us, num_tokens, *SHAPES[name])}  {other}")
            for us, config in found[: args.top]:
                print(f"  {line(us, num_tokens, *SHAPES[name])}  {config}")


if __name__ == "__main__":
    main()
