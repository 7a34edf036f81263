"""Gated DeltaNet of a mixed step: decodes first, then prefill chunks, as one op that torch.compile cannot look into."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.causal_conv import causal_conv
from nanodeploy.ops.gated_rms_norm import gated_rms_norm
from nanodeploy.ops.gdn_scan import gdn_scan
from nanodeploy.ops.gdn_step import gdn_step
from nanodeploy.ops.registry import LIBRARY
from nanodeploy.ops.states import States


@dataclass(frozen=True)
class StateRows:
    """Which tokens of a step belong to which sequence, and where its states lie (ops/states.py).

    Axes and order of tokens as in ops/paged_attention.py's Rows: T tokens, S decoding sequences, C prefill chunks. As
    there the tensors may be longer than the step, `counts` on the host says how many rows are looked at, and
    cu_q_lens[0] is where the decodes really end.
    """

    decode_read: Tensor  # [S] int32, read_slots of the decodes; -1 where a row is padding
    decode_write: Tensor  # [S] int32, write_slots of the decodes; -1 where a row is padding
    chunk_read: Tensor  # [C] int32, read_slots of the chunks
    chunk_write: Tensor  # [T] int32, write_slots of all tokens; of those that are of no chunk nothing is read
    cu_q_lens: Tensor  # [C + 1] int32, first token of each chunk, and the end
    counts: Tensor  # int32 on the host: rows of decodes, rows of chunks (what follows is of no concern here)


def _gated_delta_rule(
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
    decode_read: Tensor,
    decode_write: Tensor,
    chunk_read: Tensor,
    chunk_write: Tensor,
    cu_q_lens: Tensor,
    counts: Tensor,
    eps: float,
) -> Tensor:
    num_decodes, num_chunks = counts.tolist()[:2]
    out = None
    if num_chunks:
        chunks = cu_q_lens[: num_chunks + 1], chunk_read[:num_chunks], chunk_write[: qkv.shape[0]]
        conv = causal_conv(qkv, conv_weight, tails, *chunks)
        out = gated_rms_norm(gdn_scan(conv, a, b, a_log, dt_bias, states, *chunks), z, norm_weight, eps)
    if num_decodes:
        rows = slice(num_decodes)
        weights = conv_weight, a_log, dt_bias, norm_weight
        slots = decode_read[rows], decode_write[rows]
        stepped = gdn_step(qkv[rows], z[rows], a[rows], b[rows], *weights, tails, states, *slots, eps)
        if out is None and num_decodes == len(qkv):
            return stepped
        if out is None:
            out = z.new_zeros(z.shape)
            out[rows] = stepped
        else:  # rows of decodes that are padding may be a chunk's
            mine = torch.arange(num_decodes, device=qkv.device) < cu_q_lens[0]
            out[rows] = torch.where(mine[:, None, None], stepped, out[rows])
    return z.new_zeros(z.shape) if out is None else out


LIBRARY.define(
    "gated_delta_rule" + torch.library.infer_schema(_gated_delta_rule, mutates_args=("tails", "states")),
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
LIBRARY.impl("gated_delta_rule", _gated_delta_rule, "CompositeExplicitAutograd")
torch.library.register_fake("nanodeploy::gated_delta_rule", lambda qkv, z, *_: z.new_empty(z.shape), lib=LIBRARY)


def gated_delta_rule(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    slots: States,
    rows: StateRows,
    eps: float,
) -> Tensor:
    """What stands between the projections of a Gated DeltaNet layer, of one step's tokens.

    Arguments as in gdn_step, tokens [T, ...]. Returns [T, H, V]; padding rows are zero.
    """
    data = qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, *slots
    where = rows.decode_read, rows.decode_write, rows.chunk_read, rows.chunk_write, rows.cu_q_lens, rows.counts
    return torch.ops.nanodeploy.gated_delta_rule(*data, *where, eps)
