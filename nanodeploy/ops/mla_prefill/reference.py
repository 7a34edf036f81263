import torch
from torch import Tensor

from nanodeploy.ops.mla_decode.reference import context
from nanodeploy.ops.registry import op

MAX_SCORES = 2**28  # at a time, so that long prompts fit in memory


def rows_at_once(num_heads: int, kv_len: int) -> int:
    return max(1, MAX_SCORES // (num_heads * max(1, kv_len)))


@op(out=lambda q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, *_: _out(q_nope, w_uv))
def mla_prefill(
    q_nope: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    num_context: int,
) -> Tensor:
    """Causal attention of prompt chunks over a paged cache of latents that already holds the chunks' own.

    q_nope [T, H, dn] and q_rope [T, H, R], may be strided views; pages [P, page_size, rank + R] in q_nope.dtype, or
    uint8 (LatentLayout in ops/layouts.py); page_table [S, max_pages] int32; kv_lens [S] int32, tokens; cu_q_lens
    [S + 1] int32, rising. Rows cu_q_lens[s] : cu_q_lens[s + 1] are the last q_len tokens of the kv_lens[s] tokens of
    sequence s (0 <= q_len <= kv_len); each sees its context up to and including itself.
    w_uk [H, dn, rank], w_uv [H, dv, rank]: head h's key of a token is [w_uk[h] latent, rotated key], its value w_uv[h]
    latent. A kernel may make these (expanded), or multiply w_uk into the query and w_uv into the result (absorbed); it
    rounds to q_nope.dtype what it makes. Here that is keys and values, as in the code that published the models.
    num_context changes only memory and time: what the sum of kv_lens is at most, where the host knows it, else 0.
    Returns softmax(scale q k^T) v, [T, H, dv] in q_nope.dtype, contiguous; rows before cu_q_lens[0] and from
    cu_q_lens[S] on are zero. Entries of page_table past a sequence's pages are arbitrary. Softmax and sums in fp32.
    """
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    out = _out(q_nope, w_uv).zero_()
    bounds = cu_q_lens.tolist()
    for row, kv_len in enumerate(kv_lens.tolist()):
        begin, end = bounds[row], bounds[row + 1]
        if begin == end:
            continue
        latents, keys = context(pages, page_table[row], kv_len, w_uk.shape[-1], wide).split(
            (w_uk.shape[-1], q_rope.shape[-1]), dim=-1
        )
        nope, values = (
            torch.einsum("nr,hdr->hnd", latents, weight.to(wide)).to(out.dtype).to(wide) for weight in (w_uk, w_uv)
        )
        columns = torch.arange(kv_len, device=q_nope.device)
        step = rows_at_once(q_nope.shape[1], kv_len)
        for first in range(begin, end, step):
            last = min(first + step, end)
            positions = torch.arange(first, last, device=q_nope.device)[:, None] + (kv_len - end)
            scores = torch.einsum("thd,hnd->htn", q_nope[first:last].to(wide), nope)
            scores += torch.einsum("thd,nd->htn", q_rope[first:last].to(wide), keys)
            weights = (scores * scale).masked_fill_(columns > positions, float("-inf")).softmax(-1)
            out[first:last] = torch.einsum("htn,hnd->thd", weights, values).to(out.dtype)
    return out


def _out(q_nope: Tensor, w_uv: Tensor) -> Tensor:
    return q_nope.new_empty((*q_nope.shape[:2], w_uv.shape[1]))
