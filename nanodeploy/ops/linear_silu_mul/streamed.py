"""One to 256 rows: the kernels of linear/streamed with a tile of the gate and one of up in each program."""

import triton

from nanodeploy.ops.linear import skinny
from nanodeploy.ops.linear import streamed as plain
from nanodeploy.ops.linear.streamed import Config
from nanodeploy.ops.linear_silu_mul.reference import linear_silu_mul

# What bench/sweeps/linear.py found. One row: (I, D) -> Config.
TUNED_ONE: dict[tuple[int, int], skinny.Config] = {
    (12288, 4096): skinny.Config(rows=2, block=1024, num_warps=2),
    (3072, 1024): skinny.Config(rows=2, block=1024, num_warps=2),
}

# More: (tokens, rounded up to a power of two from 16 on; I, D) -> Config.
TUNED: dict[tuple[int, int, int], Config] = {
    (16, 12288, 4096): Config(rows=64, block=128, num_warps=4, num_stages=5),
    (32, 12288, 4096): Config(rows=64, block=128, num_warps=4, num_stages=4),
    (64, 12288, 4096): Config(rows=64, block=128, num_warps=4, num_stages=4),
    (64, 3072, 1024): Config(rows=32, block=128, num_warps=4, num_stages=6),
}


def config_one(out_dim: int, in_dim: int) -> skinny.Config:
    """One row's measured configuration, else one that fits all shapes."""
    return TUNED_ONE.get((out_dim, in_dim)) or skinny.Config(rows=2, block=1024, num_warps=2)


def config(num_tokens: int, out_dim: int, in_dim: int) -> Config:
    """The measured configuration of a shape, else one that fits it."""
    tokens = plain.bucket(num_tokens)
    tuned = TUNED.get((tokens, out_dim, in_dim))
    if tuned:
        return tuned
    if tokens > 64:
        return Config(rows=64, block=max(16, min(64, triton.next_power_of_2(in_dim))), num_warps=8, num_stages=4)
    rows, block = 64 if out_dim >= 8192 else 32, max(16, min(128, triton.next_power_of_2(in_dim)))
    return Config(rows, block, num_warps=4, num_stages=4)


def _aot():
    yield from (skinny.aot(in_dim, chosen, gated=True) for (_, in_dim), chosen in TUNED_ONE.items())
    tuned = {(tokens, in_dim, chosen) for (tokens, _, in_dim), chosen in TUNED.items()}
    yield from (plain.aot(*of, gated=True) for of in sorted(tuned, key=str))
    yield from (plain.aot(t, 1024, config(t, 3072, 1024), gated=True) for t in (16, 128, 256))


@linear_silu_mul.kernel(needs="sm80", when=plain.fits, aot=_aot)
def streamed(x, weight):
    out_dim, in_dim = weight.shape[0] // 2, weight.shape[1]
    if x.shape[0] == 1:
        return skinny.run(x, weight, config_one(out_dim, in_dim), gated=True)
    return plain.run(x, weight, config(x.shape[0], out_dim, in_dim), gated=True)
