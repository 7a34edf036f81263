"""Decodes as chunks of a few tokens: mla_prefill's kernels between the two products are mla_decode's too.

So a token decoded under --deterministic has the bits of prefill because it is the same kernel. Without it, as_chunks
is for sequences whose query rows fill a tile: there it is arithmetic that counts, not the stream of the cache. Of fp8
pages each program would convert all it reads, and mla_decode/planned is faster (NOTES.md).
"""

import torch
import triton
from torch import Tensor

from nanodeploy.ops.mla_decode.reference import mla_decode
from nanodeploy.ops.mla_prefill import absorbed, absorbed_by_tma, fixed_order


def _bounds(q: Tensor, kv_lens: Tensor) -> Tensor:
    """Where each sequence's tokens begin, and the end: as cu_q_lens."""
    num_seqs = kv_lens.shape[0]
    return torch.arange(num_seqs + 1, dtype=torch.int32, device=q.device) * (q.shape[0] // max(1, num_seqs))


def _fills_a_tile(case) -> bool:
    return absorbed.takes(case) and case.num_rows >= absorbed.ROWS and not case.fp8


def _parts(q: Tensor, pages: Tensor, page_table: Tensor) -> int:
    num_seqs = page_table.shape[0]
    num_tiles = num_seqs * triton.cdiv(q.shape[0] * q.shape[1] // max(1, num_seqs), absorbed.ROWS)
    return absorbed.num_parts(num_tiles, page_table.shape[1] * pages.shape[1])


@mla_decode.kernel(needs="sm80", when=_fills_a_tile, aot=absorbed._aot)
def as_chunks(q, q_rope, pages, page_table, kv_lens, plan, scale):
    contexts = pages, page_table, kv_lens, _bounds(q, kv_lens)
    return absorbed.attend(q, q_rope, *contexts, scale, absorbed.pick(False), _parts(q, pages, page_table))


def _fits_tma(case) -> bool:
    return _fills_a_tile(case) and absorbed_by_tma.takes(case)


@mla_decode.kernel(needs="sm90a", when=_fits_tma, interpretable=False)
def as_chunks_by_tma(q, q_rope, pages, page_table, kv_lens, plan, scale):
    parts = _parts(q, pages, page_table)
    return absorbed_by_tma.attend(q, q_rope, pages, page_table, kv_lens, _bounds(q, kv_lens), scale, parts)


@mla_decode.kernel(needs="sm80", when=absorbed.takes, batch_invariant=True, order="stretches", aot=fixed_order._aot)
def as_chunks_in_stretches(q, q_rope, pages, page_table, kv_lens, plan, scale):
    num_queries = q.shape[0] // max(1, kv_lens.shape[0])
    return fixed_order.attend(q, q_rope, pages, page_table, kv_lens, _bounds(q, kv_lens), scale, num_queries)
