import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda x, weight: x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32))
def moe_logits(x: Tensor, weight: Tensor) -> Tensor:
    """A router's logits: x @ weight^T, not rounded to x.dtype, since a choice among experts hangs on small differences.

    x [T, D], rows may be strided; weight [E, D] in x.dtype or fp32; returns [T, E] fp32. Sums in fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.linear(x.to(wide), weight.to(wide))
