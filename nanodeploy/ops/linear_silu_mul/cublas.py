"""Many rows: cuBLAS, through PyTorch, then the gate in a kernel of its own."""

import torch

from nanodeploy.ops.linear_silu_mul.reference import linear_silu_mul
from nanodeploy.ops.silu_mul.tiles import tiles


@linear_silu_mul.kernel(needs="sm80", interpretable=False)
def cublas(x, weight):
    return tiles(torch.nn.functional.linear(x, weight))
