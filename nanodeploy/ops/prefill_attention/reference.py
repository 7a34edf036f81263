import torch
from torch import Tensor

from nanodeploy.ops.decode_attention.reference import context
from nanodeploy.ops.registry import op

ROWS = 1024  # queries at a time, so that long prompts fit in memory


@op(
    out=lambda q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens: q.new_empty(
        q.shape
    )
)
def prefill_attention(
    q: Tensor,
    kv_pages: Tensor,
    kv_scales: Tensor | None,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    split_tokens: int,
) -> Tensor:
    """Causal attention of prompt chunks over a paged cache that already holds the chunks' own keys and values.

    q [T, H, E]; kv_pages [P, 2, page_size, K, E] in q.dtype, or float8_e4m3fn with kv_scales [P, 2, K, page_size] uint8
    (ops/layouts.py); page_table [S, max_pages] int32; kv_lens [S] int32, tokens; cu_q_lens [S + 1] int32, rising.
    Rows cu_q_lens[s] : cu_q_lens[s + 1] are the last q_len tokens of the kv_lens[s] tokens of sequence s (0 <= q_len <=
    kv_len); each sees its context up to and including itself, or with window > 0 the last `window` positions of
    that. sinks [H] fp32: a logit of each head that takes part in the softmax and brings no value.
    Query head h reads kv head h // (H / K). Returns [T, H, E] in q.dtype, contiguous; rows before cu_q_lens[0] and from
    cu_q_lens[S] on are zero. Entries of page_table past a sequence's pages are arbitrary. Softmax and sums in fp32.
    split_tokens changes bits only: if not 0, kernels that share an `order` with one of decode_attention take the
    context in stretches of so many tokens, counted from position 0, and add these up in turn, as decode_attention does
    with a plan of such splits; so that a token's bits do not tell in which of the two ops it was made.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    bounds = cu_q_lens.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        keys, values = context(kv_pages, kv_scales, page_table[row], kv_len, wide)
        columns = torch.arange(kv_len, device=q.device)
        for first in range(begin, end, ROWS):
            last = min(first + ROWS, end)
            positions = torch.arange(first, last, device=q.device)[:, None] + (kv_len - end)
            queries = q[first:last].to(wide).unflatten(1, (kv_pages.shape[3], -1))  # [rows, K, H / K, E]
            scores = torch.einsum("tkge,nke->kgtn", queries, keys) * scale
            hidden = columns > positions
            if window:
                hidden |= columns <= positions - window
            scores.masked_fill_(hidden, float("-inf"))
            if sinks is not None:
                sink = sinks.to(wide).view(*scores.shape[:2], 1, 1).expand(-1, -1, last - first, -1)
                weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
            else:
                weights = scores.softmax(-1)
            mixed = torch.einsum("kgtn,nke->tkge", weights, values)
            out[first:last] = mixed.flatten(1, 2).to(q.dtype)
    return out
