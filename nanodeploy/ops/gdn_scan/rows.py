"""On the CPU, for --deterministic: the reference goes token by token, as gdn_step/rows.py does."""

from nanodeploy.ops.gdn_scan.reference import gdn_scan


@gdn_scan.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots):
    return gdn_scan.reference(qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots)
