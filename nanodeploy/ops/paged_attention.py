"""Attention of a mixed step: decodes first, then prefill chunks, as one op that torch.compile cannot look into."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.decode_attention import decode_attention
from nanodeploy.ops.layouts import KVCache
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.plan_decode.reference import UNIT
from nanodeploy.ops.prefill_attention import prefill_attention
from nanodeploy.ops.registry import LIBRARY

NO_PLAN_LEN = 2  # of the plan of a step without decodes; 0 and 1 would be sizes of their own to torch.compile


@dataclass(frozen=True)
class Rows:
    """Which tokens of a step belong to which sequence, and where its keys and values lie.

    Axes: T tokens, S decoding sequences, C prefill chunks. The tokens of a step stand in order: one of each decoding
    sequence, then the chunks', then padding. The tensors may be longer than the step (they are the runner's fixed
    buffers); `counts` says how many rows are looked at. It lies on the host, so that an opaque op reads it without a
    sync and torch.compile never guards on it; a CUDA graph keeps the counts that it was captured with. The device has
    the last word: a row with decode_lens 0 is no sequence, a chunk with no tokens is none, and cu_q_lens[0] is where
    the decodes really end. So a graph captured for many rows is right for fewer.
    """

    decode_table: Tensor  # [S, max_pages] int32
    decode_lens: Tensor  # [S] int32, tokens of context including this step's; 0 is padding
    prefixes: Tensor  # [S, 2] int32: first row of the group that shares leading pages, how many tokens they share
    chunk_table: Tensor  # [C, max_pages] int32
    chunk_lens: Tensor  # [C] int32
    cu_q_lens: Tensor  # [C + 1] int32, first token of each chunk, and the end
    # [3] or [4] int32 on the host: rows of decodes, rows of chunks, 1 if `prefixes` are to be used, and, where it is
    # known, what the sum of chunk_lens is at most: latent attention then needs no sync to know how much memory it wants
    counts: Tensor
    split_tokens: int = 0  # not 0: every token sums its context in stretches of so many (see prefill_attention)
    plan: Tensor | None = None  # how decode_attention's work is cut; from `planned`

    def planned(self, num_heads: int, num_kv_heads: int, window: int = 0, shares: bool = True) -> "Rows":
        """With the plan of this step's decodes: made once, for all layers with these heads and this window.

        shares: whether `prefixes` are used where there are any."""
        num_decodes, _, shared = self.counts.tolist()[:3]
        if num_decodes and self.decode_lens.is_cuda:
            prefixes = self.prefixes[:num_decodes] if shared and shares else None
            shape = 1, num_heads, num_kv_heads, window
            plan = plan_decode(self.decode_lens[:num_decodes], prefixes, *shape, self.split_tokens or UNIT)
        else:  # the CPU's kernels want none
            plan = self.decode_lens.new_zeros(NO_PLAN_LEN)
        return dataclasses.replace(self, plan=plan)


def _paged_attention(
    q: Tensor,
    kv_pages: Tensor,
    kv_scales: Tensor | None,
    decode_table: Tensor,
    decode_lens: Tensor,
    prefixes: Tensor,
    chunk_table: Tensor,
    chunk_lens: Tensor,
    cu_q_lens: Tensor,
    counts: Tensor,
    plan: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    split_tokens: int,
) -> Tensor:
    num_decodes, num_chunks, shared = counts.tolist()[:3]
    out = None
    if num_chunks:
        out = prefill_attention(
            q,
            kv_pages,
            kv_scales,
            chunk_table[:num_chunks],
            chunk_lens[:num_chunks],
            cu_q_lens[: num_chunks + 1],
            sinks,
            scale,
            window,
            split_tokens,
        )
    if num_decodes:
        decoded = decode_attention(
            q[:num_decodes],
            kv_pages,
            kv_scales,
            decode_table[:num_decodes],
            decode_lens[:num_decodes],
            prefixes[:num_decodes] if shared else None,
            plan if plan is not None and plan.shape[0] > NO_PLAN_LEN else None,
            sinks,
            scale,
            window,
        )
        if out is None and num_decodes == q.shape[0]:
            return decoded
        if out is None:
            out = q.new_zeros(q.shape)
        out[:num_decodes] += decoded  # where one of the two has a result the other has zeros
    return q.new_zeros(q.shape) if out is None else out


LIBRARY.define(
    "paged_attention" + torch.library.infer_schema(_paged_attention, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
LIBRARY.impl("paged_attention", _paged_attention, "CompositeExplicitAutograd")
torch.library.register_fake("nanodeploy::paged_attention", lambda q, *_: q.new_empty(q.shape), lib=LIBRARY)


def paged_attention(
    q: Tensor, cache: KVCache, rows: Rows, scale: float, sinks: Tensor | None = None, window: int = 0
) -> Tensor:
    """Attention of one step's tokens over a paged cache that already holds their keys and values.

    q [T, H, E]; sinks [H] fp32 and window as in decode_attention. Returns [T, H, E]; padding rows are zero.
    """
    return torch.ops.nanodeploy.paged_attention(
        q,
        cache.pages,
        cache.scales,
        rows.decode_table,
        rows.decode_lens,
        rows.prefixes,
        rows.chunk_table,
        rows.chunk_lens,
        rows.cu_q_lens,
        rows.counts,
        rows.plan,
        sinks,
        scale,
        window,
        rows.split_tokens,
    )
