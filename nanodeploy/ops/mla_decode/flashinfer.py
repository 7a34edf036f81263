"""flashinfer's paged latent attention (arXiv:2501.01005). It plans on the host, so each call waits for kv_lens."""

import functools
from itertools import accumulate
from typing import Any

import torch

from nanodeploy.ops.decode_attention.flashinfer import page_lists
from nanodeploy.ops.mla_decode.reference import mla_decode

WORKSPACE_BYTES = 128 * 2**20  # for partial results; what flashinfer recommends


@functools.cache
def _wrapper(device: torch.device) -> Any:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    return BatchMLAPagedAttentionWrapper(torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device))


def _takes(case) -> bool:
    sixteen_bits = case.dtype in (torch.bfloat16, torch.float16) and not case.fp8
    return sixteen_bits and (case.rank, case.rope_dim) == (512, 64)


@mla_decode.kernel(needs="sm80", when=_takes, requires="flashinfer", interpretable=False, capturable=False)
def flashinfer(q, q_rope, pages, page_table, kv_lens, plan, scale):
    num_queries, rank = q.shape[0] // max(1, kv_lens.shape[0]), q.shape[2]
    lens = kv_lens.tolist()
    seqs = [seq for seq, kv_len in enumerate(lens) if kv_len]
    out = q.new_zeros(q.shape)
    if not seqs:
        return out
    # It knows neither empty sequences nor queries before position 0.
    counts = [min(num_queries, lens[seq]) for seq in seqs]
    queries = [(seq + 1) * num_queries - i for seq, count in zip(seqs, counts) for i in range(count, 0, -1)]
    kept, some = (torch.tensor(which, device=q.device) for which in (queries, seqs))
    used = [lens[seq] for seq in seqs]
    begins, page_ids, _ = page_lists(page_table[some], used, pages.shape[1])
    wrapper = _wrapper(q.device)
    wrapper.plan(
        torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        begins,
        page_ids,
        torch.tensor(used, dtype=torch.int32),
        num_heads=q.shape[1],
        head_dim_ckv=rank,
        head_dim_kpe=q_rope.shape[2],
        page_size=pages.shape[1],
        causal=num_queries > 1,
        sm_scale=scale,
        q_data_type=q.dtype,
        kv_data_type=pages.dtype,
    )
    out[kept] = wrapper.run(q[kept], q_rope[kept], pages[..., :rank], pages[..., rank:])
    return out
