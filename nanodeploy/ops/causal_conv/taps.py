"""Tiles of rows by channels; a second kernel, after all of them have read the old tails, writes the new ones."""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.causal_conv.reference import causal_conv
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

WIDTH = 4
ROWS, CHANNELS = 16, 256  # of a tile
TAIL_CHANNELS = 128
SCAN = 256  # write_slots looked at together
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def seq_of(item, cu_q_lens, num_seqs, ROWS: tl.constexpr):
    """Which sequence tile `item` is of (-1 and num_seqs: rows before and after all), and which of its tiles.

    Sequence s begins at tile cu_q_lens[s] // ROWS + s + 1, which leaves room for every partial tile, as in
    prefill_attention/tiles.py.
    """
    seq = -1
    for first in range(0, num_seqs + 1, 128):
        seqs = first + tl.arange(0, 128)
        inside = seqs <= num_seqs
        starts = tl.load(cu_q_lens + seqs, mask=inside, other=0) // ROWS + seqs + 1
        seq += tl.sum((inside & (starts <= item)).to(tl.int32), 0)
    begin = tl.load(cu_q_lens + seq, mask=seq >= 0, other=0)
    return seq, begin, item - tl.where(seq >= 0, begin // ROWS + seq + 1, 0)


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"], do_not_specialize_on_alignment=["cu_q_lens", "read_slots"])
def _conv(
    x, weight, tails, cu_q_lens, read_slots, out, num_tokens, num_seqs, channels, stride_x,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows, tile of channels)."""
    go(PDL)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = columns < channels
    wait(PDL)
    seq, begin, tile = seq_of(tl.program_id(0), cu_q_lens, num_seqs, ROWS)
    mine = (seq >= 0) & (seq < num_seqs)
    end = tl.load(cu_q_lens + seq + 1, mask=seq < num_seqs, other=num_tokens)
    if begin + tile * ROWS < end:
        rows = tile * ROWS + tl.arange(0, ROWS)  # of the sequence
        live = (begin + rows < end)[:, None] & there[None, :]
        slot = tl.load(read_slots + seq, mask=mine, other=-1)
        old = tails + slot.to(tl.int64) * (WIDTH - 1) * channels + columns[None, :]
        at = x + (begin + rows).to(tl.int64)[:, None] * stride_x + columns[None, :]
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in tl.static_range(WIDTH):
            place = rows + i - (WIDTH - 1)
            values = tl.load(at + (i - (WIDTH - 1)) * stride_x, mask=live & mine & (place >= 0)[:, None], other=0.0)
            values = values.to(tl.float32)
            if tile == 0:
                from_tail = live & (place < 0)[:, None] & (slot >= 0)
                tail = tl.load(old + (rows + i)[:, None] * channels, mask=from_tail, other=0.0).to(tl.float32)
                values = tl.where((place < 0)[:, None], tail, values)
            total += tl.load(weight + columns * WIDTH + i, mask=there, other=0.0).to(tl.float32)[None, :] * values
        result = total / (1 + tl.exp(-total))
        to = out + (begin + rows).to(tl.int64)[:, None] * channels + columns[None, :]
        tl.store(to, result.to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize_on_alignment=["cu_q_lens", "read_slots", "write_slots"])
def _keep(
    x, tails, cu_q_lens, read_slots, write_slots, channels, stride_x,
    CHANNELS: tl.constexpr, SCAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (sequence, tile of channels): the tails after its marked rows, for WIDTH 4. It alone reads the old one
    by now, which it does before it writes any."""
    go(PDL)
    seq = tl.program_id(0)
    columns = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there = columns < channels
    wait(PDL)
    begin = tl.load(cu_q_lens + seq)
    end = tl.load(cu_q_lens + seq + 1)
    slot = tl.load(read_slots + seq)
    old = tails + slot.to(tl.int64) * 3 * channels + columns
    known = there & (slot >= 0)
    tail1 = tl.load(old + channels, mask=known, other=0.0)
    tail2 = tl.load(old + 2 * channels, mask=known, other=0.0)
    tl.debug_barrier()  # warps may hold the same channels, and the slot may be the one written
    for first in range(begin, end, SCAN):
        rows = first + tl.arange(0, SCAN)
        marked = tl.load(write_slots + rows, mask=rows < end, other=-1) >= 0
        row = tl.min(tl.where(marked, rows, FAR), 0)
        while row < FAR:
            at = x + row.to(tl.int64) * stride_x + columns
            new0 = tl.load(at - 2 * stride_x, mask=there & (row - begin >= 2), other=0.0)
            new1 = tl.load(at - stride_x, mask=there & (row - begin >= 1), other=0.0)
            new0 = tl.where(row == begin, tail1, tl.where(row == begin + 1, tail2, new0))
            new1 = tl.where(row == begin, tail2, new1)
            to = tails + tl.load(write_slots + row).to(tl.int64) * 3 * channels + columns
            tl.store(to, new0, mask=there)
            tl.store(to + channels, new1, mask=there)
            tl.store(to + 2 * channels, tl.load(at, mask=there, other=0.0), mask=there)
            row = tl.min(tl.where(marked & (rows > row), rows, FAR), 0)


def _aot():
    ints = dict.fromkeys(("cu_q_lens", "read_slots", "write_slots"), "*i32")
    sizes = dict.fromkeys(("num_tokens", "num_seqs", "channels", "stride_x"), "i32")
    data = dict.fromkeys(("x", "weight", "tails", "out"), "*bf16")
    divisible = "x", "weight", "tails", "out", "channels", "stride_x"

    def config(fn, constexprs):
        signature = {name: kind for name, kind in (data | ints | sizes).items() if name in fn.arg_names}
        return Aot(fn, signature, constexprs | {"PDL": True}, divisible=tuple(n for n in divisible if n in signature))

    yield config(_conv, {"ROWS": ROWS, "CHANNELS": CHANNELS, "WIDTH": WIDTH})
    yield config(_keep, {"CHANNELS": TAIL_CHANNELS, "SCAN": SCAN})


@causal_conv.kernel(needs="sm80", when=lambda case: case.width == WIDTH, batch_invariant=True, aot=lambda: list(_aot()))
def taps(x, weight, tails, cu_q_lens, read_slots, write_slots):
    num_tokens, channels = x.shape
    num_seqs = read_slots.shape[0]
    assert (x.stride(1) == 1 or channels == 1) and weight.is_contiguous() and tails.is_contiguous()
    out = torch.empty((num_tokens, channels), dtype=x.dtype, device=x.device)
    grid = (num_tokens // ROWS + num_seqs + 2, triton.cdiv(channels, CHANNELS))
    _conv[grid](
        x, weight, tails, cu_q_lens, read_slots, out, num_tokens, num_seqs, channels, x.stride(0),
        ROWS=ROWS, CHANNELS=CHANNELS, WIDTH=WIDTH, **overlap.launch(),
    )  # fmt: skip
    _keep[(num_seqs, triton.cdiv(channels, TAIL_CHANNELS))](
        x, tails, cu_q_lens, read_slots, write_slots, channels, x.stride(0),
        CHANNELS=TAIL_CHANNELS, SCAN=SCAN, **overlap.launch(),
    )  # fmt: skip
    return out
