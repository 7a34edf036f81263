"""Row by row on the CPU, for --deterministic: the library's product of a batch sums in an order that varies with T."""

import torch

from nanodeploy.ops.linear_fp8.reference import linear_fp8


@linear_fp8.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False)
def rows(x, x_scales, weight, weight_scales, dtype):
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    for row in range(x.shape[0]):
        # A copy: the order may vary with the alignment.
        one, scales = x[row : row + 1].clone(), x_scales[row : row + 1].clone()
        out[row] = linear_fp8.reference(one, scales, weight, weight_scales, dtype)[0]
    return out
