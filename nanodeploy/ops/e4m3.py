"""Rounding to e4m3 inside kernels. The rule of the scales is ops/layouts.py's."""

import triton
import triton.language as tl

from nanodeploy.ops.layouts import E4M3_MAX, LEAST_SCALE

_MAX = tl.constexpr(E4M3_MAX)
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)


@triton.jit
def block_scales(amax):
    """The scales of blocks with these largest magnitudes, fp32, and their reciprocals."""
    scales = tl.where(amax > 0, tl.maximum(tl.div_rn(amax, tl.full([1], _MAX, tl.float32)), _LEAST_SCALE), 1.0)
    return scales, tl.div_rn(tl.full([1], 1.0, tl.float32), scales)


@triton.jit
def to_e4m3(values, INTERPRETED: tl.constexpr):
    """fp32 to the nearest of e4m3; beyond 448, 448; NaN stays NaN.

    Triton's interpreter neither saturates nor carries when it casts, so there they are rounded before: to three bits
    behind the first, and below 2 ** -6 to multiples of 2 ** -9. Compiled code is one instruction for two values.
    """
    if INTERPRETED:
        values = tl.minimum(tl.maximum(values, -_MAX), _MAX)
        bits = values.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (values + 1.5 * 2.0**14) - 1.5 * 2.0**14
        values = tl.where(tl.abs(values) < 2.0**-6, small, normal)
    return values.to(tl.float8e4nv)
