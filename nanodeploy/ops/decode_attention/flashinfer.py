"""flashinfer's paged decode (arXiv:2501.01005). It plans on the host, so each call waits for kv_lens to come back."""

import functools
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.layouts import num_pages_for

WORKSPACE_BYTES = 384 * 2**20  # for partial results; flashinfer says so when it is too small


def page_lists(page_table: Tensor, kv_lens: list[int], page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The page table as flashinfer wants it, for sequences of at least one token, int32: where each sequence's pages
    begin [S + 1] (host), all page ids in a row [sum of pages] (device), tokens in each last page [S] (host)."""
    counts = [num_pages_for(kv_len, page_size) for kv_len in kv_lens]
    begins = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
    used = torch.arange(page_table.shape[1]) < torch.tensor(counts)[:, None]
    places = used.flatten().nonzero().squeeze(1).to(page_table.device)
    last = torch.tensor([(kv_len - 1) % page_size + 1 for kv_len in kv_lens], dtype=torch.int32)
    return begins, page_table.flatten()[places], last


@functools.cache
def _wrapper(device: torch.device) -> Any:
    import flashinfer

    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)


def _takes(case) -> bool:
    return case.plain and case.dtype in (torch.bfloat16, torch.float16) and case.head_dim in (64, 128, 256)


@decode_attention.kernel(needs="sm80", when=_takes, requires="flashinfer", interpretable=False, capturable=False)
def flashinfer(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    lens = kv_lens.tolist()
    rows = [row for row, kv_len in enumerate(lens) if kv_len]
    if len(rows) < len(lens):  # it knows no empty sequences
        out = q.new_zeros(q.shape)
        if rows:
            some = torch.tensor(rows, device=q.device)
            out[some] = flashinfer(q[some], kv_pages, None, page_table[some], kv_lens[some], None, None, None, scale, 0)
        return out
    wrapper = _wrapper(q.device)
    wrapper.plan(
        *page_lists(page_table, lens, kv_pages.shape[2]),
        num_qo_heads=q.shape[1],
        num_kv_heads=kv_pages.shape[3],
        head_dim=q.shape[2],
        page_size=kv_pages.shape[2],
        q_data_type=q.dtype,
        kv_data_type=kv_pages.dtype,
        sm_scale=scale,
    )
    return wrapper.run(q.contiguous(), kv_pages)
