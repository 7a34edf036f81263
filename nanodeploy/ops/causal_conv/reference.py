import torch
from torch import Tensor

from nanodeploy.ops.registry import op


@op(
    out=lambda x, weight, tails, cu_q_lens, read_slots, write_slots: x.new_empty(x.shape),
    mutates=("tails",),
)
def causal_conv(
    x: Tensor, weight: Tensor, tails: Tensor, cu_q_lens: Tensor, read_slots: Tensor, write_slots: Tensor
) -> Tensor:
    """Depthwise causal convolution over each sequence's tokens, then SiLU; no bias.

    x [T, C], rows may be strided; weight [C, W] in any dtype; tails [N, W - 1, C] in x.dtype, the inputs before the
    first token; cu_q_lens [S + 1] int32, rising; read_slots [S] and write_slots [T] int32 (ops/states.py).
    Rows cu_q_lens[s] : cu_q_lens[s + 1] are sequence s. Returns [T, C] in x.dtype, contiguous: of row t
    silu(sum_i weight[:, i] * x[t - W + 1 + i]); rows before cu_q_lens[0] and from cu_q_lens[S] on are zero, and write
    nothing. After row t its last W - 1 inputs go to tails[write_slots[t]]. Sums in fp32, first tap first.
    """
    return convolve(x, weight, tails, cu_q_lens, read_slots, write_slots, rows_at_once=max(1, x.shape[0]))


def convolve(
    x: Tensor,
    weight: Tensor,
    tails: Tensor,
    cu_q_lens: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
    rows_at_once: int,
) -> Tensor:
    """The op, so many rows in one call of the library."""
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(wide).unbind(1)
    out = x.new_zeros(x.shape)
    bounds, kept = cu_q_lens.tolist(), write_slots.tolist()
    for seq, slot in enumerate(read_slots.tolist()):
        begin, end = bounds[seq], bounds[seq + 1]
        if begin == end:
            continue
        tail = tails[slot] if slot >= 0 else tails.new_zeros(tails.shape[1:])
        inputs = torch.cat((tail, x[begin:end]))
        for first in range(begin, end, rows_at_once):
            last = min(first + rows_at_once, end)
            total = torch.zeros((last - first, x.shape[1]), dtype=wide, device=x.device)
            for i, tap in enumerate(taps, first - begin):
                total += tap * inputs[i : i + last - first]
            out[first:last] = torch.nn.functional.silu(total).to(x.dtype)
        for row in range(end - begin):
            if kept[begin + row] >= 0:
                tails[kept[begin + row]] = inputs[row + 1 : row + len(taps)]
    return out
