"""Attention of a mixed step: decodes first, then prefill chunks, as one op that torch.compile cannot look into."""

import torch
from torch import Tensor

from nanodeploy.ops.decode_attention import decode_attention
from nanodeploy.ops.prefill_attention import prefill_attention
from nanodeploy.ops.registry import LIBRARY


def _paged_attention(
    q: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, cu_q_lens: Tensor, counts: Tensor, scale: float
) -> Tensor:
    num_decodes, num_prefills = counts.tolist()
    if num_prefills == 0 and num_decodes == q.shape[0]:
        return decode_attention(q, kv_pages, page_table[:num_decodes], kv_lens[:num_decodes], scale)
    parts = []
    if num_decodes:
        parts.append(
            decode_attention(q[:num_decodes], kv_pages, page_table[:num_decodes], kv_lens[:num_decodes], scale)
        )
    rest = q[num_decodes:]
    if num_prefills:
        rows = slice(num_decodes, num_decodes + num_prefills)
        cu_q_lens = cu_q_lens[: num_prefills + 1]
        parts.append(prefill_attention(rest, kv_pages, page_table[rows], kv_lens[rows], cu_q_lens, scale))
    else:
        parts.append(rest.new_zeros(rest.shape))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


LIBRARY.define(
    "paged_attention" + torch.library.infer_schema(_paged_attention, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
LIBRARY.impl("paged_attention", _paged_attention, "CompositeExplicitAutograd")
torch.library.register_fake("nanodeploy::paged_attention", lambda q, *_: q.new_empty(q.shape), lib=LIBRARY)


def paged_attention(
    q: Tensor, kv_pages: Tensor, page_table: Tensor, kv_lens: Tensor, cu_q_lens: Tensor, counts: Tensor, scale: float
) -> Tensor:
    """Attention of one step's tokens over a paged cache that already holds their keys and values.

    q [T, H, E]: first `num_decodes` rows of one token each, then the rows of `num_prefills` chunks, then padding.
    counts [2] int32 on the host: num_decodes, num_prefills; read when the op runs, so a CUDA graph keeps the counts it
    was captured with. page_table [>= S, max_pages] and kv_lens [>= S] int32 hold the decodes' rows, then the chunks';
    cu_q_lens [>= num_prefills + 1] int32 counts from the first prefill row. Returns [T, H, E]; padding rows are zero.
    """
    return torch.ops.nanodeploy.paged_attention(q, kv_pages, page_table, kv_lens, cu_q_lens, counts, scale)
