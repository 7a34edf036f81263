"""flashinfer's paged prefill, FlashAttention-3 on Hopper. It plans on the host, so each call waits for the lengths."""

import functools
from itertools import accumulate, pairwise
from typing import Any

import torch

from nanodeploy.ops.decode_attention.flashinfer import WORKSPACE_BYTES, page_lists
from nanodeploy.ops.prefill_attention.reference import prefill_attention


@functools.cache
def _wrapper(device: torch.device) -> Any:
    import flashinfer

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")


def _takes(case) -> bool:
    return case.plain and case.dtype in (torch.bfloat16, torch.float16) and case.head_dim in (64, 128, 256)


@prefill_attention.kernel(needs="sm80", when=_takes, requires="flashinfer", interpretable=False, capturable=False)
def flashinfer(q, kv_pages, kv_scales, page_table, kv_lens, cu_q_lens, sinks, scale, window, split_tokens):
    num_seqs = page_table.shape[0]
    lengths = torch.cat([kv_lens, cu_q_lens]).tolist()
    lens, bounds = lengths[:num_seqs], lengths[num_seqs:]
    rows = [row for row, (begin, end) in enumerate(pairwise(bounds)) if end > begin]  # it knows no empty chunks
    out = q.new_empty(q.shape)
    out[bounds[-1] :] = 0
    if not rows:
        return out
    if len(rows) < num_seqs:
        page_table = page_table[torch.tensor(rows, device=q.device)]
    chunks = torch.tensor([0, *accumulate(bounds[row + 1] - bounds[row] for row in rows)], dtype=torch.int32)
    wrapper = _wrapper(q.device)
    wrapper.plan(
        chunks,
        *page_lists(page_table, [lens[row] for row in rows], kv_pages.shape[2]),
        num_qo_heads=q.shape[1],
        num_kv_heads=kv_pages.shape[3],
        head_dim_qk=q.shape[2],
        page_size=kv_pages.shape[2],
        causal=True,
        q_data_type=q.dtype,
        kv_data_type=kv_pages.dtype,
        sm_scale=scale,
    )
    wrapper.run(q[: bounds[-1]].contiguous(), kv_pages, out=out[: bounds[-1]])
    return out
