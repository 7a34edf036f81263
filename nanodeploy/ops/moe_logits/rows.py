"""Row by row on the CPU, for --deterministic: the library's product of a batch sums in an order that varies with T."""

import torch

from nanodeploy.ops.moe_logits.reference import moe_logits


@moe_logits.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False)
def rows(x, weight):
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=torch.float32, device=x.device)
    for row in range(x.shape[0]):
        out[row] = moe_logits.reference(x[row : row + 1].clone(), weight)[
            0
        ]  # a copy: the order may vary with alignment
    return out
