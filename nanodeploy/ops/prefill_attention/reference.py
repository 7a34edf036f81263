import torch
from torch import Tensor

from nanodeploy.ops.decode_attention.reference import context
from nanodeploy.ops.registry import op

ROWS = 1024  # queries at a time, so that long prompts fit in memory


@op(out=lambda q, kv_pages, page_table, kv_lens, cu_q_lens, scale: q.new_empty(q.shape))
def prefill_attention(
    q: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, cu_q_lens: Tensor, scale: float
) -> Tensor:
    """Causal attention of prompt chunks over a paged cache that already holds the chunks' own keys and values.

    q [T, H, E]; kv_pages [P, 2, page_size, K, E] in q.dtype; page_table [S, max_pages] int32; kv_lens [S] int32,
    tokens; cu_q_lens [S + 1] int32. Rows cu_q_lens[s] : cu_q_lens[s + 1] are the last q_len tokens of the kv_lens[s]
    tokens of sequence s (q_len <= kv_len; 0 is allowed); each sees its context up to and including itself.
    Query head h reads kv head h // (H / K). Returns [T, H, E] in q.dtype, contiguous; rows past cu_q_lens[S] are zero.
    Entries of page_table past a sequence's pages are arbitrary. Softmax and sums in fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    bounds = cu_q_lens.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        keys, values = context(kv_pages, page_table[row], kv_len, wide)
        columns = torch.arange(kv_len, device=q.device)
        for first in range(begin, end, ROWS):
            last = min(first + ROWS, end)
            positions = torch.arange(first, last, device=q.device) + (kv_len - end)
            queries = q[first:last].to(wide).unflatten(1, (kv_pages.shape[3], -1))  # [rows, K, H / K, E]
            scores = torch.einsum("tkge,nke->kgtn", queries, keys) * scale
            scores.masked_fill_(columns > positions[:, None], float("-inf"))
            mixed = torch.einsum("kgtn,nke->tkge", scores.softmax(-1), values)
            out[first:last] = mixed.flatten(1, 2).to(q.dtype)
    return out
