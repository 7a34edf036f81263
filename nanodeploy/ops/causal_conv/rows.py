"""Row by row on the CPU, for --deterministic: the bits of the library's exp vary with the place in a vector."""

from nanodeploy.ops.causal_conv.reference import causal_conv, convolve


@causal_conv.kernel(needs="cpu", batch_invariant=True, order="rows", interpretable=False, capturable=False)
def rows(x, weight, tails, cu_q_lens, read_slots, write_slots):
    return convolve(x, weight, tails, cu_q_lens, read_slots, write_slots, rows_at_once=1)
