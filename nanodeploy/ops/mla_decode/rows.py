"""Row by row on the CPU, for --deterministic: as the reference does it, and mla_prefill/rows.py too."""

from nanodeploy.ops.mla_decode.reference import mla_decode


@mla_decode.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(q, q_rope, pages, page_table, kv_lens, plan, scale):
    return mla_decode.reference(q, q_rope, pages, page_table, kv_lens, plan, scale)
