"""Latent attention of a mixed step: decodes first, then prefill chunks, as one op that is opaque to torch.compile."""

import torch
from torch import Tensor

from nanodeploy.ops.head_linear import head_linear
from nanodeploy.ops.layouts import LatentCache
from nanodeploy.ops.mla_decode import mla_decode
from nanodeploy.ops.mla_decode.reference import num_tiles
from nanodeploy.ops.mla_prefill import mla_prefill
from nanodeploy.ops.paged_attention import NO_PLAN_LEN, Rows
from nanodeploy.ops.registry import LIBRARY


def planned(rows: Rows, num_heads: int) -> Rows:
    """With the plan of this step's decodes: made once, for all layers of latent attention with so many heads."""
    # Rows that share a prefix read it one by one: with 64 heads and more nothing would be gained.
    return rows.planned(num_heads, num_tiles(1, num_heads), shares=False)


def _latent_attention(
    q_nope: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    decode_table: Tensor,
    decode_lens: Tensor,
    chunk_table: Tensor,
    chunk_lens: Tensor,
    cu_q_lens: Tensor,
    counts: Tensor,
    plan: Tensor | None,
    scale: float,
) -> Tensor:
    num_decodes, num_chunks, _, num_context = (*counts.tolist(), 0)[:4]
    out = None
    if num_chunks:
        out = mla_prefill(
            q_nope,
            q_rope,
            pages,
            chunk_table[:num_chunks],
            chunk_lens[:num_chunks],
            cu_q_lens[: num_chunks + 1],
            w_uk,
            w_uv,
            scale,
            num_context,
        )
    if num_decodes:
        decoded = mla_decode(
            head_linear(q_nope[:num_decodes], w_uk.transpose(1, 2)),
            q_rope[:num_decodes],
            pages,
            decode_table[:num_decodes],
            decode_lens[:num_decodes],
            plan if plan is not None and plan.shape[0] > NO_PLAN_LEN else None,
            scale,
        )
        decoded = head_linear(decoded, w_uv)
        if out is None and num_decodes == q_nope.shape[0]:
            return decoded
        if out is None:
            out = _out(q_nope, w_uv).zero_()
        out[:num_decodes] += decoded  # where one of the two has a result the other has zeros
    return _out(q_nope, w_uv).zero_() if out is None else out


def _out(q_nope: Tensor, w_uv: Tensor) -> Tensor:
    return q_nope.new_empty((*q_nope.shape[:2], w_uv.shape[1]))


LIBRARY.define(
    "latent_attention" + torch.library.infer_schema(_latent_attention, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
LIBRARY.impl("latent_attention", _latent_attention, "CompositeExplicitAutograd")
torch.library.register_fake(
    "nanodeploy::latent_attention", lambda q_nope, q_rope, pages, w_uk, w_uv, *_: _out(q_nope, w_uv), lib=LIBRARY
)


def latent_attention(
    q_nope: Tensor, q_rope: Tensor, cache: LatentCache, rows: Rows, w_uk: Tensor, w_uv: Tensor, scale: float
) -> Tensor:
    """Attention of one step's tokens over a paged cache that already holds their latents (arXiv:2405.04434).

    q_nope [T, H, dn] (may be a view of longer heads), q_rope [T, H, R]; w_uk [H, dn, rank] and w_uv [H, dv, rank] make
    a head's key and value of a latent; scale multiplies the scores. Decodes multiply w_uk into the query and w_uv into
    the result (absorbed), chunks do what is faster. Returns [T, H, dv]; padding rows are zero.
    """
    return torch.ops.nanodeploy.latent_attention(
        q_nope,
        q_rope,
        cache.pages,
        w_uk,
        w_uv,
        rows.decode_table,
        rows.decode_lens,
        rows.chunk_table,
        rows.chunk_lens,
        rows.cu_q_lens,
        rows.counts,
        rows.plan,
        scale,
    )
