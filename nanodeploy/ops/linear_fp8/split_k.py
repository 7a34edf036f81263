"""Few tokens against a weight of few rows: its inner axis is split, so that every SM has something to read.

The last program of a tile to finish adds the parts, always in the same order. Which split a column falls into depends
on the number of tokens, so a row has other bits in another batch.
"""

import dataclasses

import triton

from nanodeploy.ops.layouts import FP8_BLOCK
from nanodeploy.ops.linear_fp8 import tiles
from nanodeploy.ops.linear_fp8.reference import linear_fp8

LEAST_BLOCKS = 4  # of 128 columns, in a split


def config(num_tokens: int, out_dim: int, in_dim: int) -> tiles.Config:
    """tiles.py's configuration, split until there are enough programs, or nothing is left to split."""
    whole = tiles.config(num_tokens, out_dim, in_dim)
    programs, blocks, splits = triton.cdiv(out_dim, whole.rows), triton.cdiv(in_dim, FP8_BLOCK), 1
    while programs * splits < 1.5 * tiles.NUM_SMS and blocks >= 2 * splits * LEAST_BLOCKS and splits < 8:
        splits *= 2
    programs_per_sm = min(4, triton.cdiv(programs * splits, tiles.NUM_SMS))
    fitting = tiles.SHARED_BYTES // programs_per_sm // ((whole.tokens + whole.rows) * FP8_BLOCK)
    return dataclasses.replace(whole, splits=splits, num_stages=max(3, min(fitting, triton.cdiv(blocks, splits), 12)))


def _aot():
    for shape in ((1, 4096, 4096), (1, 2112, 7168), (32, 4096, 12288), (64, 6144, 4096), (64, 4096, 4096)):
        yield tiles.aot(config(*shape))


def _takes(case) -> bool:
    few = 1 <= case.num_tokens <= 64
    return few and tiles.takes(case) and config(case.num_tokens, case.out_dim, case.in_dim).splits > 1


@linear_fp8.kernel(needs="sm90", when=_takes, aot=_aot)
def split_k(x, x_scales, weight, weight_scales, dtype):
    return tiles.run(x, x_scales, weight, weight_scales, dtype, config(x.shape[0], *weight.shape))
