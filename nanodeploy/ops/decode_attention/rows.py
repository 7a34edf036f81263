"""Row by row on the CPU, for --deterministic: as the reference does it, and prefill_attention/rows.py too."""

from nanodeploy.ops.decode_attention.reference import decode_attention


@decode_attention.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    return decode_attention.reference(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window)
