import torch
from torch import Tensor

from nanodeploy.ops.layouts import num_pages_for
from nanodeploy.ops.registry import op


def context(kv_pages: Tensor, page_row: Tensor, kv_len: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, [kv_len, K, E] each in `dtype`. Reads the sequence's own pages only."""
    pages = page_row[: num_pages_for(kv_len, kv_pages.shape[2])].long()
    keys, values = kv_pages[pages].transpose(0, 1).flatten(1, 2)[:, :kv_len].to(dtype)
    return keys, values


@op(out=lambda q, kv_pages, page_table, kv_lens, scale: q.new_empty(q.shape))
def decode_attention(q: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, scale: float) -> Tensor:
    """One query token per sequence over a paged cache (PagedAttention, arXiv:2309.06180).

    q [S, H, E]; kv_pages [P, 2, page_size, K, E] in q.dtype; page_table [S, max_pages] int32; kv_lens [S] int32,
    tokens. Query head h reads kv head h // (H / K). Returns softmax(scale q k^T) v, [S, H, E] in q.dtype, contiguous.
    kv_len 0 gives zeros. Entries of page_table past a sequence's pages are arbitrary. Softmax and sums in fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    for row, kv_len in enumerate(kv_lens.tolist()):
        if kv_len == 0:
            continue
        keys, values = context(kv_pages, page_table[row], kv_len, wide)
        queries = q[row].to(wide).unflatten(0, (kv_pages.shape[3], -1))  # [K, H / K, E]
        scores = torch.einsum("kge,nke->kgn", queries, keys) * scale
        out[row] = torch.einsum("kgn,nke->kge", scores.softmax(-1), values).flatten(0, 1).to(q.dtype)
    return out
