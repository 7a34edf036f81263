import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x: x.new_empty((x.shape[0], x.shape[1] // 2)))
def silu_mul(x: Tensor) -> Tensor:
    """SwiGLU's gate (arXiv:2002.05202): silu(x[:, :I]) * x[:, I:].

    x [T, 2I], rows may be strided; returns [T, I] in x.dtype. Computed in fp32, rounded once.
    """
    gate, up = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(x.dtype).contiguous()
