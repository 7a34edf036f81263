"""Which configuration of linear/streamed and linear/warp_groups is fastest, beside cuBLAS, on this GPU.

python -m bench.sweeps.linear [--tokens 1 64 256] [--shapes "qwen3-8b qkv" ...] [--ahead 512 ...] [--top 3]

Weights rotate through more memory than the L2 cache holds; kernels overlap as they do in a step. Prints a table, then
lines for the tables of measured configurations. The shape "... gated" is linear_silu_mul's, whose kernels they are too.
"""

import argparse
import functools
from collections.abc import Callable

import torch
import triton
from triton.runtime.errors import OutOfResources

from bench.timing import graph_us
from nanodeploy.ops import machine
from nanodeploy.ops.linear import skinny, streamed, warp_groups
from nanodeploy.ops.linear.cases import QWEN3_06B, QWEN3_8B
from nanodeploy.ops.linear_silu_mul.cublas import cublas as cublas_gated

L2_BYTES = 60e6
SHAPES = {
    f"{model} {name}": shape
    for model, shapes in (("qwen3-8b", QWEN3_8B), ("qwen3-0.6b", QWEN3_06B))
    for name, shape in (*shapes.items(), ("gated", shapes["gate_up"]))
}
ONE_ROW = [(1, 4096, 4), (1, 4096, 8), (2, 1024, 2), (2, 2048, 4), (2, 4096, 8), (4, 1024, 4), (4, 2048, 8)]
ONE_ROW += [(1, 1024, 1), (1, 1024, 2), (1, 2048, 2), (8, 1024, 8)]
DOTS = [(16, 256, 4, 4), (32, 128, 4, 6), (32, 256, 4, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 5)]
DOTS += [(64, 128, 4, 6), (64, 256, 4, 3), (128, 64, 4, 5), (128, 64, 8, 6), (128, 128, 8, 3), (128, 128, 8, 4)]
MANY_DOTS = [(64, 64, 4, 4), (64, 64, 8, 4), (64, 64, 8, 5), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)]
GROUPS = 8  # of the configurations of warp_groups, the likeliest by its own estimate

Config = skinny.Config | streamed.Config | warp_groups.Config


def candidates(num_tokens: int, out_dim: int, in_dim: int, gated: bool, aheads: list[int]) -> list[tuple[str, Config]]:
    """(kernel, configuration) worth trying: those of several tokens with enough programs, none with far too many."""
    if num_tokens == 1:
        return [("streamed", skinny.Config(*c)) for c in ONE_ROW if c[1] < 2 * in_dim]
    num_sms = machine.num_sms()
    ranked = warp_groups.ranked(warp_groups.bucket(num_tokens), out_dim, in_dim, num_sms)
    found: list[tuple[str, Config]] = [("warp_groups", c) for c in ranked[:GROUPS]]
    if num_tokens > streamed.MAX_TOKENS:
        return found
    for rows, block, num_warps, num_stages in DOTS if num_tokens <= 64 else MANY_DOTS:
        for splits in (1,) if gated else (1, 2, 4, 8):
            num_programs = triton.cdiv(out_dim // (2 if gated else 1), rows) * splits
            enough, too_many = num_programs >= 0.7 * num_sms, splits > 1 and num_programs > 4.13 * num_sms
            if enough and not too_many and in_dim >= 2 * splits * block:
                shape = (rows, block, num_warps, num_stages, splits)
                found += [("streamed", streamed.Config(*shape, ahead=ahead)) for ahead in aheads]
    return found


def runner(config: Config) -> Callable:
    """What runs one configuration: (x, weight, configuration, gated) -> out."""
    if isinstance(config, skinny.Config):
        return skinny.run
    return streamed.run if isinstance(config, streamed.Config) else warp_groups.run


def measure(
    num_tokens: int, out_dim: int, in_dim: int, gated: bool, aheads: list[int]
) -> tuple[float, list[tuple[float, str, Config]]]:
    """(cuBLAS us, our (us, kernel, configuration) from the fastest on). A wrong result is an error."""
    g = torch.Generator("cuda").manual_seed(0)
    weight_bytes = 2 * out_dim * in_dim
    num_weights = max(1, -(-int(4 * L2_BYTES) // weight_bytes))
    weights = torch.empty(num_weights, out_dim, in_dim, dtype=torch.bfloat16, device="cuda")
    weights.normal_(0, in_dim**-0.5, generator=g)
    x = torch.randn(num_tokens, in_dim, generator=g, device="cuda").bfloat16()
    library: Callable = cublas_gated if gated else torch.nn.functional.linear
    wanted = library(x, weights[0]).float()
    min_calls = 4 if weight_bytes > 5e8 else 20
    cublas_us = graph_us([functools.partial(library, x, w) for w in weights], min_calls)
    found = []
    for kernel, config in candidates(num_tokens, out_dim, in_dim, gated, aheads):
        run = runner(config)
        try:
            got = run(x, weights[0], config, gated)
        except OutOfResources as error:
            print(f"  {kernel} {config}: {error}")
            continue
        assert torch.allclose(got.float(), wanted, rtol=2e-2, atol=2e-2), f"{config} is wrong at T {num_tokens}"
        calls = [functools.partial(run, x, w, config, gated) for w in weights]
        found.append((graph_us(calls, min_calls), kernel, config))
    return cublas_us, sorted(found, key=lambda row: row[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument(
        "--ahead", type=int, nargs="+", default=[256], help="columns that streamed fetches ahead, to try"
    )
    parser.add_argument("--top", type=int, default=3, help="configurations to show per shape")
    args = parser.parse_args()
    tuned: dict[str, list[str]] = {}
    for num_tokens in args.tokens:
        for name in args.shapes:
            out_dim, in_dim = SHAPES[name]
            gated = name.endswith("gated")
            cublas_us, found = measure(num_tokens, out_dim, in_dim, gated, args.ahead)
            num_bytes = 2 * (out_dim * in_dim + num_tokens * (out_dim + in_dim))
            flops = 2 * num_tokens * out_dim * in_dim
            rates = f"{num_bytes / cublas_us / 1e3:.0f} GB/s {flops / cublas_us / 1e6:.0f} TFLOP/s"
            print(f"T {num_tokens} {name} {out_dim}x{in_dim}: cublas {cublas_us:.2f} us {rates}")
            for us, kernel, config in found[: args.top]:
                rates = f"{num_bytes / us / 1e3:6.0f} GB/s {flops / us / 1e6:4.0f} TFLOP/s"
                print(f"  {us:8.2f} us {rates}  {kernel} {config}", flush=True)
            for kernel in dict.fromkeys(kernel for _, kernel, _ in found):
                best = next(config for _, of, config in found if of == kernel)
                bucket = f"{warp_groups.bucket(num_tokens)}, " if num_tokens > 1 else ""
                room = "linear_silu_mul" if gated else "linear"
                line = f"    ({bucket}{out_dim // (2 if gated else 1)}, {in_dim}): {best},  # {name}"
                tuned.setdefault(f"{room}/{kernel}", []).append(line)
    for table, lines in tuned.items():
        print(f"{table}:", *lines, sep="\n")


if __name__ == "__main__":
    main()
