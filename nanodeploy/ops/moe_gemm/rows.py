"""Row by row on the CPU, for --deterministic: the library's product of a batch sums in an order that varies with T."""

import torch

from nanodeploy.ops.moe_gemm.reference import moe_gemm, out_dtype


@moe_gemm.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales):
    out = torch.empty(x.shape, dtype=out_dtype(x), device=x.device)
    for row in range(x.shape[0]):
        # Copies: the order may vary with the alignment.
        one, scales = x[row : row + 1].clone(), None if x_scales is None else x_scales[row : row + 1].clone()
        rest = (gate_up, gate_up_scales, down, down_scales)
        out[row] = moe_gemm.reference(one, scales, ids[row : row + 1], weights[row : row + 1], *rest)[0]
    return out
