"""On the CPU, for --deterministic: token by token, as causal_conv/rows.py and gdn_scan/rows.py do it."""

from nanodeploy.ops.gdn_step.reference import gdn_step


@gdn_step.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, eps):
    return gdn_step.reference(
        qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, eps
    )
