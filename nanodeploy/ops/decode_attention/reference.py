import torch
from torch import Tensor

from nanodeploy.ops.layouts import num_pages_for, scale_values
from nanodeploy.ops.registry import op


def context(
    kv_pages: Tensor, kv_scales: Tensor | None, page_row: Tensor, kv_len: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, [kv_len, K, E] each in `dtype`. Reads the sequence's own pages only."""
    pages = page_row[: num_pages_for(kv_len, kv_pages.shape[2])].long()
    both = kv_pages[pages].to(dtype)
    if kv_scales is not None:
        both = both * scale_values(kv_scales[pages], dtype).transpose(2, 3).unsqueeze(-1)
    keys, values = both.transpose(0, 1).flatten(1, 2)[:, :kv_len]
    return keys, values


def attend(q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, scale: float, window: int) -> Tensor:
    """One query token [H, E] over its context: keys, values [N, K, E]; the query stands at position N - 1. N may be 0.

    Returns [H, E] in the keys' dtype.
    """
    if window:
        keys, values = keys[-window:], values[-window:]
    queries = q.to(keys.dtype).unflatten(0, (keys.shape[1], -1))  # [K, H / K, E]
    scores = torch.einsum("kge,nke->kgn", queries, keys) * scale
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(*scores.shape[:2], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("kgn,nke->kge", weights, values).flatten(0, 1)


@op(
    out=lambda q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window: q.new_empty(q.shape),
)
def decode_attention(
    q: Tensor,
    kv_pages: Tensor,
    kv_scales: Tensor | None,
    page_table: Tensor,
    kv_lens: Tensor,
    prefixes: Tensor | None,
    plan: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """The newest tokens of each sequence over a paged cache that holds their keys and values (arXiv:2309.06180).

    q [S * Q, H, E], Q query tokens (1 to 8) of each sequence in turn, the last Q of its kv_lens[s] tokens: the query at
    position p sees positions 0 to p, or with window > 0 the last `window` of them. A query before position 0 gives
    zeros, so kv_len 0 is padding. kv_pages [P, 2, page_size, K, E] in q.dtype, or float8_e4m3fn with kv_scales
    [P, 2, K, page_size] uint8 (ops/layouts.py); page_table [S, max_pages] int32, its entries past a sequence's pages
    arbitrary; kv_lens [S] int32, tokens. Query head h reads kv head h // (H / K). sinks [H] fp32: a logit of each head
    that takes part in the softmax and brings no value (arXiv:2309.17453).
    How fast, never what: prefixes [S, 2] int32, for each row the first row of its group and the leading tokens (whole
    pages; 0 for none) that the group's rows, which are adjacent, hold in the very same pages; plan, from plan_decode.
    Returns softmax(scale q k^T) v, [S * Q, H, E] in q.dtype, contiguous. Softmax and sums in fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    num_queries = q.shape[0] // max(1, kv_lens.shape[0])
    for seq, kv_len in enumerate(kv_lens.tolist()):
        keys, values = context(kv_pages, kv_scales, page_table[seq], kv_len, wide)
        for query in range(num_queries):
            seen = kv_len - num_queries + query + 1
            if seen > 0:
                row = seq * num_queries + query
                out[row] = attend(q[row], keys[:seen], values[:seen], sinks, scale, window).to(q.dtype)
    return out
