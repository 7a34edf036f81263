import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x, weight: x.new_empty((x.shape[0], x.shape[1], weight.shape[1])))
def head_linear(x: Tensor, weight: Tensor) -> Tensor:
    """A product for each head with a matrix of its own: y[t, h] = weight[h] x[t, h].

    x [T, H, D], last axis contiguous; weight [H, N, D] in x.dtype, one of its last two axes contiguous. Returns
    [T, H, N] in x.dtype, contiguous. Sums in fp32.
    """
    return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1).contiguous()
