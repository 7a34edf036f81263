import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x, weight: x.new_empty((x.shape[0], weight.shape[0] // 2)))
def linear_silu_mul(x: Tensor, weight: Tensor) -> Tensor:
    """A projection and SwiGLU's gate on what it gives (arXiv:2002.05202): silu(x @ G^T) * (x @ U^T), weight = [G; U].

    x [T, D], rows may be strided; weight [2I, D], the gate's I rows first; returns [T, I] in x.dtype. Sums and gate in
    fp32; the two products may be rounded to x.dtype before the gate, or not.
    """
    gate, up = torch.nn.functional.linear(x, weight).to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)
