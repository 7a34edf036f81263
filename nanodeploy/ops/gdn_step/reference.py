import torch
from torch import Tensor

from nanodeploy.ops.causal_conv.reference import convolve
from nanodeploy.ops.gated_rms_norm.reference import gated_rms_norm
from nanodeploy.ops.gdn_scan.reference import gdn_scan
from nanodeploy.ops.registry import op


def _out(qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, eps) -> Tensor:
    return z.new_empty(z.shape)


@op(out=_out, mutates=("tails", "states"))
def gdn_step(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    tails: Tensor,
    states: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    eps: float,
) -> Tensor:
    """What stands between the projections of a Gated DeltaNet (arXiv:2412.06464), for sequences of a few tokens each.

    It is causal_conv, gdn_scan and gated_rms_norm one after the other, and rounds where they do: conv_weight [C, W] and
    tails [N, W - 1, C] go with the first, a, b, a_log, dt_bias and states [N, H, V, K] with the second.
    qkv [T, C]: queries [J, K], keys [J, K], values [H, V] of a token, C = 2 J K + H V; z [T, H, V] the gate of the
    norm; norm_weight [V]; read_slots [S], write_slots [T] int32 (ops/states.py). T = S Q: sequence s has the rows from
    s Q on. A sequence with fewer tokens has them first, and rows that write nowhere after them.
    Returns [T, H, V] in z.dtype, contiguous: out / sqrt(mean(out^2) + eps) * norm_weight * silu(z), in fp32.

    For speculation: either each token's state is kept in a slot of its own; or none is, and the next step begins with
    the accepted tokens again, the state after the last of which it keeps.
    """
    num_seqs = read_slots.shape[0]
    per_seq = qkv.shape[0] // max(1, num_seqs)
    bounds = per_seq * torch.arange(num_seqs + 1, dtype=torch.int32, device=qkv.device)
    conv = convolve(qkv, conv_weight, tails, bounds, read_slots, write_slots, rows_at_once=1)
    mixed = gdn_scan.reference(conv, a, b, a_log, dt_bias, states, bounds, read_slots, write_slots)
    out = z.new_empty(z.shape)
    for row in range(len(z)):  # one by one: the bits of the library's exp vary with the place in a vector
        out[row] = gated_rms_norm.reference(mixed[row], z[row], norm_weight, eps)
    return out
