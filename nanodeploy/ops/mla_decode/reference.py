import torch
from torch import Tensor

from nanodeploy.ops.layouts import num_pages_for, unpack_latents
from nanodeploy.ops.registry import op

TILE_ROWS = 64  # (query, head) rows that go over a context together


def num_tiles(num_queries: int, num_heads: int) -> int:
    """How often a context is read: the (query, head) rows of a sequence, in tiles of TILE_ROWS."""
    return -(-num_queries * num_heads // TILE_ROWS)


def context(pages: Tensor, page_row: Tensor, kv_len: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Latents and keys of one sequence, [kv_len, rank + R] in `dtype`. Reads the sequence's own pages only."""
    tokens = pages[page_row[: num_pages_for(kv_len, pages.shape[1])].long()].flatten(0, 1)[:kv_len]
    return unpack_latents(tokens, rank, dtype) if pages.dtype == torch.uint8 else tokens.to(dtype)


def attend(q: Tensor, q_rope: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """One query token, q [H, rank] and q_rope [H, R], over its context, tokens [N, rank + R]. N may be 0.

    Returns [H, rank] in the tokens' dtype.
    """
    queries = torch.cat((q, q_rope), dim=-1).to(tokens.dtype)
    return (queries @ tokens.T * scale).softmax(-1) @ tokens[:, : q.shape[-1]]


@op(out=lambda q, *_: q.new_empty(q.shape))
def mla_decode(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    plan: Tensor | None,
    scale: float,
) -> Tensor:
    """The newest tokens of each sequence over a paged cache of latents, which are keys and values in one.

    q [S * Q, H, rank], queries that a head's key matrix was multiplied into (absorbed; arXiv:2405.04434, 2.1.2), and
    q_rope [S * Q, H, R]: a token's score is scale (q . latent + q_rope . key). Q query tokens (1 to 8) of each sequence
    in turn, the last Q of its kv_lens[s] tokens: the query at position p sees positions 0 to p. A query before
    position 0 gives zeros, so kv_len 0 is padding. pages [P, page_size, rank + R] in q.dtype, or uint8 (LatentLayout in
    ops/layouts.py); page_table [S, max_pages] int32, its entries past a sequence's pages arbitrary; kv_lens [S] int32,
    tokens. How fast, never what: plan, from plan_decode(kv_lens, None, Q, H, num_tiles(Q, H), 0).
    Returns softmax(scores) latents, [S * Q, H, rank] in q.dtype, contiguous: what a head's value matrix is to be
    multiplied with. Softmax and sums in fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    num_queries = q.shape[0] // max(1, kv_lens.shape[0])
    for seq, kv_len in enumerate(kv_lens.tolist()):
        tokens = context(pages, page_table[seq], kv_len, q.shape[-1], wide)
        for query in range(num_queries):
            seen = kv_len - num_queries + query + 1
            if seen > 0:
                row = seq * num_queries + query
                out[row] = attend(q[row], q_rope[row], tokens[:seen], scale).to(q.dtype)
    return out
