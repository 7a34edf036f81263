"""Row by row on the CPU, for --deterministic: every token is a decode of its own, with those ops' own arithmetic."""

import torch

from nanodeploy.ops.head_linear.rows import rows as each_head
from nanodeploy.ops.mla_decode.reference import attend, context
from nanodeploy.ops.mla_prefill.reference import mla_prefill


@mla_prefill.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, num_context):
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    q = each_head(q_nope, w_uk.transpose(1, 2))
    mixed = torch.zeros_like(q)
    bounds = cu_q_lens.tolist()
    for seq, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[seq], bounds[seq + 1]
        if begin == end:
            continue
        tokens = context(pages, page_table[seq], kv_len, q.shape[-1], wide)
        for row in range(begin, end):
            mixed[row] = attend(q[row], q_rope[row], tokens[: kv_len - end + row + 1], scale).to(q.dtype)
    return each_head(mixed, w_uv)
