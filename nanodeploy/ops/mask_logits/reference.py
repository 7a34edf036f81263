import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda logits, masks, rows: None, mutates=("logits",))
def mask_logits(logits: Tensor, masks: Tensor, rows: Tensor) -> None:
    """Some rows' tokens that a grammar forbids get -inf, in place; all else stays as it is.

    logits [S, V], rows may be strided; masks [N, ceil(V / 32)] int32, contiguous: bit i % 32 of word i // 32 says that
    token i is allowed, bits behind the vocabulary mean nothing; rows [N] int64, all different: whose mask it is.
    """
    bits = masks[:, :, None] >> torch.arange(32, dtype=torch.int32, device=masks.device) & 1
    forbidden = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[rows] = logits[rows].masked_fill(forbidden, -torch.inf)
