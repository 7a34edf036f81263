"""The one order in which attention sums under --deterministic, `stretches`: shared by decode and prefill, to the bit.

A context is cut into stretches of SPLIT_TOKENS (ops/layouts.py) counted from position 0. Inside a stretch tiles of
tokens are taken in turn with a running softmax (arXiv:2205.14135); then stretches are merged in turn. Whether a stretch
is a program of its own (decode) or one after another in one program (prefill) makes no difference: the arithmetic below
is all there is. Products that are added to something are tl.fma, so that no compiler chooses whether to round them
first; a row's weights are summed as integers, whose sum has no order; and the tensor core gives an element the same
bits whatever the shape of the tile (linear/fixed_order.py). A tile or a stretch of which a row sees nothing changes
nothing of the row, and neither does leaving it out.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


def tile_tokens(head_dim: int) -> int:
    """Tokens per tile: what the registers and shared memory of both kernels have room for."""
    return 32 if head_dim == 256 else 64


@triton.jit
def power(exponent_bytes):
    """2 ** (byte - 127), for bytes 1 to 254 (ops/layouts.py): the byte is fp32's exponent."""
    return (exponent_bytes.to(tl.int32) << 23).to(tl.float32, bitcast=True)


@triton.jit
def places(table, start, end, PAGE: tl.constexpr, TILE: tl.constexpr):
    """(page, offset in the page) of the TILE tokens from `start` on, page being one number where they share it.

    The table is not read past `end`, where it holds garbage.
    """
    tile = tl.arange(0, TILE)
    if PAGE % TILE == 0:
        page = tl.load(table + start // PAGE, mask=start < end, other=0).to(tl.int64)
        return page, start % PAGE + tile
    else:
        columns = start + tile
        page = tl.load(table + columns // PAGE, mask=columns < end, other=0).to(tl.int64)
        return page, columns % PAGE


@triton.jit
def row_sums(weights):
    """Sums over axis 1 of weights from 0 to 1, each rounded to 2 ** -23: as integers, whose sum has no order.

    The bits of 1 + w, less those of 1, are w * 2 ** 23.
    """
    counts = (weights + 1.0).to(tl.int32, bitcast=True) - 0x3F800000
    return tl.sum(counts, 1).to(tl.float32) * 1.1920928955078125e-07


@triton.jit
def add_tile(highest, total, mixed, scores, v, k_scale, v_scale, scale_log2, SCALED: tl.constexpr):
    """The running softmax with one more tile: highest [M], total [M], mixed [M, E] fp32.

    scores [M, N] = q k^T before any scale, -inf where a row does not see a token; v [N, E]; with SCALED k_scale and
    v_scale [N] uint8 exponents. A value's scale goes into its weight, times 256: the scale of values about one is
    2 ** -8, as e4m3 reaches to 448, and fp16 would have few bits left for small weights. (Values past 57344 overflow.)
    """
    if SCALED:
        scores = scores * power(k_scale)[None, :]
    risen = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
    base = tl.where(risen == float("-inf"), 0.0, risen)
    weights = tl.exp2(tl.fma(scores, scale_log2, -base[:, None]))
    shrink = tl.exp2(highest - base)
    total = tl.fma(total, shrink, row_sums(weights))
    if SCALED:
        weights = weights * power(v_scale.to(tl.int32) + 8)[None, :]
    mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
    return risen, total, mixed


@triton.jit
def add_stretch(highest, total, mixed, stretch_highest, stretch_total, stretch_mixed):
    """The sum of stretches with one more; all as in add_tile. Nothing is (-inf, 0, 0)."""
    risen = tl.maximum(highest, stretch_highest)
    base = tl.where(risen == float("-inf"), 0.0, risen)
    shrink, weight = tl.exp2(highest - base), tl.exp2(stretch_highest - base)
    total = tl.fma(stretch_total, weight, total * shrink)
    return risen, total, tl.fma(stretch_mixed, weight[:, None], mixed * shrink[:, None])


@triton.jit
def finish(highest, total, mixed, sinks_at, present, SINKS: tl.constexpr, SCALED: tl.constexpr):
    """The rows' results [M, E]: zeros where a row has seen nothing. sinks_at [M]: where each row's sink lies."""
    if SINKS:
        sink = tl.load(sinks_at, mask=present, other=0.0) * 1.4426950408889634
        risen = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - risen)
        total = tl.fma(total, shrink, tl.exp2(sink - risen))
        mixed = mixed * shrink[:, None]
    if SCALED:
        total = total * 256.0
    return mixed / tl.where(total == 0, 1.0, total)[:, None]
