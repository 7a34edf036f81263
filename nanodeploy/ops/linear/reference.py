import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x, weight: x.new_empty((x.shape[0], weight.shape[0])))
def linear(x: Tensor, weight: Tensor) -> Tensor:
    """A projection without bias: x @ weight^T.

    x [T, D], rows may be strided; weight [N, D]; returns [T, N] in x.dtype. Sums in fp32, rounded once.
    """
    return torch.nn.functional.linear(x, weight)
