"""Tens of tokens and more: the kernel of linear/warp_groups with eight rows of the gate and eight of up in turn.

So the two products of an output are neighbours in one thread's registers, and a tile of 192 rows has 96 outputs.
"""

from torch import Tensor

from nanodeploy.ops.linear import warp_groups as plain
from nanodeploy.ops.linear.warp_groups import Config
from nanodeploy.ops.linear_silu_mul.reference import linear_silu_mul

# What bench/sweeps/linear.py found: (tokens, rounded up to a power of two; I, D) -> Config.
TUNED: dict[tuple[int, int, int], Config] = {
    (64, 12288, 4096): Config(3, 64, 1),
    (128, 12288, 4096): Config(3, 128, 1),
    (128, 3072, 1024): Config(1, 128, 1),
    (256, 12288, 4096): Config(3, 128, 1),
    (256, 3072, 1024): Config(2, 128, 1),
}


def _config(x: Tensor, weight: Tensor, unsplit: bool) -> Config:
    tuned = TUNED.get((plain.bucket(x.shape[0]), weight.shape[0] // 2, weight.shape[1]))
    return plain.config(x.shape[0], weight.shape, tuned, unsplit)


def _aot():
    for tokens in (64, 128, 256):
        yield plain.aot(Config(3, tokens), gated=True)
    yield plain.aot(plain.ranked(128, 6144, 1024, plain.NUM_SMS)[0], gated=True)


@linear_silu_mul.kernel(needs="sm90a", when=plain.takes, interpretable=False, aot=_aot)
def warp_groups(x, weight):
    return plain.run(x, weight, _config(x, weight, unsplit=False), gated=True)


@linear_silu_mul.kernel(needs="sm90a", when=plain.takes, batch_invariant=True, order="k16", interpretable=False)
def unsplit_warp_groups(x, weight):
    """The same with whole inner axes, in the order of linear/fixed_order."""
    return plain.run(x, weight, _config(x, weight, unsplit=True), gated=True)
