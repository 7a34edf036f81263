"""Row by row on the CPU, for --deterministic: every token is a decode of its own, with that op's own arithmetic."""

import torch

from nanodeploy.ops.decode_attention.reference import attend, context
from nanodeploy.ops.prefill_attention.reference import prefill_attention


@prefill_attention.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens):
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    bounds = cu_q_lens.tolist()
    for seq, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[seq], bounds[seq + 1]
        if begin == end:
            continue
        keys, values = context(kv_pages, kv_scales, page_table[seq], kv_len, wide)
        for row in range(begin, end):
            seen = kv_len - end + row + 1
            out[row] = attend(q[row], keys[:seen], values[:seen], sinks, scale, window).to(q.dtype)
    return out
