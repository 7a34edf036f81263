"""Which configuration of linear/skinny is fastest at Qwen3-8B's shapes, beside cuBLAS, on this GPU.

python -m bench.sweeps.linear [--tokens 1 8 16] [--shapes qkv o ...] [--top 3]

Weights rotate through more memory than the L2 cache holds. Prints a table, then lines for `TUNED` in skinny.py.
"""

import argparse
import functools

import torch
from triton.runtime.errors import OutOfResources

from bench.sweeps.timing import graph_us
from nanodeploy.ops.linear.cases import QWEN3_8B
from nanodeploy.ops.linear.skinny import NUM_SMS, Config, run

L2_BYTES = 60e6
PLAIN = [(1, 2048, 2), (1, 4096, 4), (2, 1024, 2), (2, 2048, 4), (4, 512, 2), (4, 1024, 4), (4, 2048, 8), (8, 512, 4)]
PLAIN += [(8, 1024, 8), (16, 256, 4), (16, 512, 8)]
STREAMED = [(4, 1024, 4, 3), (4, 1024, 4, 4), (8, 512, 4, 4), (16, 256, 4, 5), (8, 1024, 8, 4), (16, 512, 8, 4)]
DOTS = [(16, 256, 4, 5), (16, 512, 4, 4), (32, 128, 4, 6), (32, 256, 4, 4), (64, 128, 4, 4), (64, 128, 4, 6)]
DOTS += [(64, 256, 4, 4), (128, 64, 4, 6), (128, 128, 8, 4)]


def candidates(num_tokens: int, out_dim: int, in_dim: int) -> list[Config]:
    """Configurations worth trying: those of several tokens with enough programs, none with far too many."""
    if num_tokens == 1:
        return [Config(*c, num_stages=1) for c in PLAIN] + [Config(*c) for c in STREAMED]
    found = []
    for rows, block, num_warps, num_stages in DOTS:
        for splits in (1, 2, 4, 8):
            num_programs = out_dim // rows * splits
            enough, too_many = num_programs >= 0.9 * NUM_SMS, splits > 1 and num_programs > 5 * NUM_SMS
            if enough and not too_many and in_dim >= 2 * splits * block:
                found.append(Config(rows, block, num_warps, num_stages, splits))
    return found


def measure(num_tokens: int, out_dim: int, in_dim: int) -> tuple[float, list[tuple[float, Config]]]:
    """(cuBLAS us, our (us, configuration) from the fastest on). A wrong result is an error."""
    g = torch.Generator("cuda").manual_seed(0)
    weight_bytes = 2 * out_dim * in_dim
    num_weights = max(1, -(-int(4 * L2_BYTES) // weight_bytes))
    weights = torch.empty(num_weights, out_dim, in_dim, dtype=torch.bfloat16, device="cuda")
    weights.normal_(0, in_dim**-0.5, generator=g)
    x = torch.randn(num_tokens, in_dim, generator=g, device="cuda").bfloat16()
    wanted = (
        x.float() @ weights[0].float().T if out_dim < 100_000 else torch.nn.functional.linear(x, weights[0]).float()
    )
    min_calls = 4 if weight_bytes > 5e8 else 20
    cublas_us = graph_us([functools.partial(torch.nn.functional.linear, x, w) for w in weights], min_calls)
    found = []
    for config in candidates(num_tokens, out_dim, in_dim):
        try:
            got = run(x, weights[0], config)
        except OutOfResources as error:
            print(f"  {config}: {error}")
            continue
        assert torch.allclose(got.float(), wanted, rtol=2e-2, atol=2e-2), f"{config} is wrong at T {num_tokens}"
        found.append((graph_us([functools.partial(run, x, w, config) for w in weights], min_calls), config))
    return cublas_us, sorted(found, key=lambda pair: pair[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--shapes", nargs="+", choices=list(QWEN3_8B), default=list(QWEN3_8B))
    parser.add_argument("--top", type=int, default=3, help="configurations to show per shape")
    args = parser.parse_args()
    tuned = []
    for num_tokens in args.tokens:
        for name in args.shapes:
            out_dim, in_dim = QWEN3_8B[name]
            cublas_us, found = measure(num_tokens, out_dim, in_dim)
            num_bytes = 2 * (out_dim * in_dim + num_tokens * (out_dim + in_dim))
            gb_per_s = num_bytes / cublas_us / 1e3
            print(f"T {num_tokens} {name} {out_dim}x{in_dim}: cublas {cublas_us:.2f} us {gb_per_s:.0f} GB/s")
            for us, config in found[: args.top]:
                print(f"  {us:8.2f} us {num_bytes / us / 1e3:6.0f} GB/s  {config}", flush=True)
            tuned.append(f"    ({num_tokens == 1}, {out_dim}, {in_dim}): {found[0][1]},  # T {num_tokens}")
    print("\n".join(tuned))


if __name__ == "__main__":
    main()
