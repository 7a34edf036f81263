"""FlashMLA's dense decode (github.com/deepseek-ai/FlashMLA), built from its own source: ops/registry.py, SOURCES.

Its fp8 cache has the bytes of LatentLayout, but only its sparse decode, of chosen tokens, reads them on Hopper.
"""

import torch

from nanodeploy.ops.mla_decode.reference import mla_decode


def _takes(case) -> bool:
    sixteen_bits = case.dtype in (torch.bfloat16, torch.float16) and not case.fp8
    return sixteen_bits and (case.rank, case.rope_dim, case.page_size) == (512, 64, 64)


@mla_decode.kernel(needs="sm90a", when=_takes, requires="flash_mla", interpretable=False)
def flash_mla(q, q_rope, pages, page_table, kv_lens, plan, scale):
    import flash_mla as vendor

    num_seqs, (num_tokens, num_heads, rank) = kv_lens.shape[0], q.shape
    if num_tokens == 0:
        return torch.empty_like(q)
    num_queries = num_tokens // num_seqs
    # It makes its plan in each call: nothing that an op sees proves one of a layer before still valid.
    meta, num_splits = vendor.get_mla_metadata()
    mixed, _ = vendor.flash_mla_with_kvcache(
        torch.cat((q, q_rope), dim=-1).view(num_seqs, num_queries, num_heads, -1),
        pages.unsqueeze(2),
        page_table.clamp(0, pages.shape[0] - 1),  # of an empty sequence it may follow the first entry
        kv_lens,
        rank,
        meta,
        num_splits,
        softmax_scale=scale,
        causal=num_queries > 1,
    )
    positions = kv_lens[:, None] - num_queries + torch.arange(num_queries, device=q.device)
    return torch.where((positions >= 0)[:, :, None, None], mixed, 0.0).view(q.shape)
