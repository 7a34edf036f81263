"""Row by row on the CPU, for --deterministic: the library's sigmoid takes what fills no vector another way."""

import torch

from nanodeploy.ops.moe_route.reference import moe_route


@moe_route.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False)
def rows(logits, bias, slots, scoring, top_k, num_groups, top_groups, renormalise, scale):
    ids = torch.empty((logits.shape[0], top_k), dtype=torch.int32, device=logits.device)
    weights = logits.new_empty(ids.shape)
    how = scoring, top_k, num_groups, top_groups, renormalise, scale
    for row in range(len(logits)):
        alone = slice(row, row + 1)
        slot = None if slots is None else slots[alone]
        ids[alone], weights[alone] = moe_route.reference(logits[alone].clone(), bias, slot, *how)
    return ids, weights
