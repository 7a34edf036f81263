"""A few heads of one token per program: q's go to the output, k's and v's straight to their slot of the cache.

The halves of a head that rotation pairs are loaded apart, so each value is read once. A quantised head's scale comes
from the bits of its largest value; the head is still in registers then.
"""

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import overlap
from nanodeploy.ops.layouts import E4M3_MAX
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.rope_store_kv.reference import rope_store_kv

VALUES_PER_PROGRAM = 2048
NUM_WARPS = 4  # 16 bytes of each half per thread

_E4M3_MAX = tl.constexpr(E4M3_MAX)


@triton.jit
def _take(heads, there, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Values FIRST : FIRST + WIDTH of the heads [HEADS], fp32 [HEADS, BLOCK]; zeros elsewhere."""
    dims = tl.arange(0, BLOCK)
    inside = there[:, None] & (dims < WIDTH)[None, :]
    return tl.load(heads[:, None] + (FIRST + dims)[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _put(heads, there, values, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write the first WIDTH columns of values [HEADS, BLOCK] to FIRST : FIRST + WIDTH of the heads [HEADS]."""
    dims = tl.arange(0, BLOCK)
    inside = there[:, None] & (dims < WIDTH)[None, :]
    tl.store(heads[:, None] + (FIRST + dims)[None, :], values.to(heads.dtype.scalar.element_ty), mask=inside)


@triton.jit
def _row(row, HEADS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Values FIRST : FIRST + WIDTH of one row, the same for all heads, fp32 [HEADS, BLOCK]; zeros elsewhere.

    Loaded once for each head, out of L1, so that nobody needs shared memory and a barrier to bring it to the others.
    """
    dims = tl.arange(0, BLOCK)
    rows = row + tl.zeros((HEADS, 1), tl.int32) + (FIRST + dims)[None, :]
    return tl.load(rows, mask=(dims < WIDTH)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _scale(amax):
    """The scale byte of heads with these largest values (ops/layouts.py's rule), and what to multiply them by."""
    bits = amax.to(tl.int32, bitcast=True)
    byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)  # 448 is 1.75 * 2 ** 8
    byte = tl.where(bits == 0, 127, tl.minimum(tl.maximum(byte, 1), 254))
    return byte, ((254 - byte) << 23).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def _fitted(values, INTERPRETED: tl.constexpr):
    """Values that e4m3 can take. Triton's interpreter drops the carry when it casts to e4m3, so there they are rounded
    here: to three bits behind the first, and below 2 ** -6 to multiples of 2 ** -9."""
    values = tl.minimum(tl.maximum(values, -_E4M3_MAX), _E4M3_MAX)
    if INTERPRETED:
        bits = values.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (values + 1.5 * 2.0**14) - 1.5 * 2.0**14
        values = tl.where(tl.abs(values) < 2.0**-6, small, normal)
    return values


@triton.jit
def _gains(
    weight, E: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """The norm's weight of the pairs' first values, of their second ones and of the rest; ones if there is none."""
    half: tl.constexpr = R // 2
    a, b, rest = 1.0, 1.0, 1.0
    if weight is not None:
        if INTERLEAVED:
            a, b = tl.split(tl.reshape(_row(weight, HEADS, 0, R, 2 * HALF), (HEADS, HALF, 2)))
        else:
            a, b = _row(weight, HEADS, 0, half, HALF), _row(weight, HEADS, half, half, HALF)
        if REST:
            rest = _row(weight, HEADS, R, E - R, REST)
    return a, b, rest


@triton.jit
def _turn(
    heads, there, to, stored, scale_to, gains, angles, eps,
    E: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    NORMED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Norm and rotate heads, and write them to `to` where `stored`; with scale_to, quantised."""
    half: tl.constexpr = R // 2
    if INTERLEAVED:
        both = _take(heads, there, 0, R, 2 * HALF)
        a, b = tl.split(tl.reshape(both, (heads.shape[0], HALF, 2)))
    else:
        a, b = _take(heads, there, 0, half, HALF), _take(heads, there, half, half, HALF)
    if REST:
        rest = _take(heads, there, R, E - R, REST)
    cos, sin = _row(angles, heads.shape[0], 0, half, HALF), _row(angles, heads.shape[0], half, half, HALF)
    if NORMED:
        squares = tl.sum(a * a + b * b, axis=1)
        if REST:
            squares += tl.sum(rest * rest, axis=1)
        norm = tl.rsqrt(squares / E + eps)[:, None]
        a, b = a * norm * gains[0], b * norm * gains[1]
        if REST:
            rest = rest * norm * gains[2]
    a, b = a * cos - b * sin, b * cos + a * sin
    if scale_to is not None:
        amax = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1)
        if REST:
            amax = tl.maximum(amax, tl.max(tl.abs(rest), axis=1))
        byte, factor = _scale(amax)
        tl.store(scale_to, byte.to(tl.uint8), mask=stored)
        a, b = _fitted(a * factor, INTERPRETED), _fitted(b * factor, INTERPRETED)
        if REST:
            rest = _fitted(rest * factor, INTERPRETED)
    if INTERLEAVED:
        _put(to, stored, tl.reshape(tl.join(a, b), (heads.shape[0], 2 * HALF)), 0, R, 2 * HALF)
    else:
        _put(to, stored, a, 0, half, HALF)
        _put(to, stored, b, half, half, HALF)
    if REST:
        _put(to, stored, rest, R, E - R, REST)


@triton.jit
def _copy(heads, there, to, stored, scale_to, E: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Write heads to `to` where `stored`; with scale_to, quantised."""
    values = _take(heads, there, 0, E, BLOCK)
    if scale_to is not None:
        byte, factor = _scale(tl.max(tl.abs(values), axis=1))
        tl.store(scale_to, byte.to(tl.uint8), mask=stored)
        values = _fitted(values * factor, INTERPRETED)
    _put(to, stored, values, 0, E, BLOCK)


@triton.jit
def _one_pass(
    q, k, v, kv_pages, kv_scales, positions, slots, cos_sin, q_norm, k_norm, out, num_heads, num_kv_heads, eps,
    stride_q, stride_q_head, stride_k, stride_k_head, stride_v, stride_v_head,
    stride_page, stride_kv, stride_slot, stride_head, stride_scale_page, stride_scale_kv, stride_scale_head,
    E: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, part): HEADS heads, of q, then of k, then of v. kv_scales None: the pages are not quantised."""
    go(PDL)
    NORMED: tl.constexpr = q_norm is not None
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts = tl.cdiv(num_heads, HEADS)
    if part < num_q_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        there = heads < num_heads
        gains = _gains(q_norm, E, R, INTERLEAVED, HALF, REST, HEADS)
        wait(PDL)
        angles = cos_sin + tl.load(positions + token) * R
        _turn(
            q + token * stride_q + heads * stride_q_head, there, out + (token * num_heads + heads) * E, there, None,
            gains, angles, eps, E, R, INTERLEAVED, HALF, REST, NORMED, INTERPRETED,
        )  # fmt: skip
    else:
        num_kv_parts = tl.cdiv(num_kv_heads, HEADS)
        part -= num_q_parts
        gains = _gains(k_norm, E, R, INTERLEAVED, HALF, REST, HEADS)
        wait(PDL)
        slot = tl.load(slots + token)
        index = part // num_kv_parts  # 0 keys, 1 values
        heads = part % num_kv_parts * HEADS + tl.arange(0, HEADS)
        there = heads < num_kv_heads
        stored = there & (slot >= 0)
        page, offset = tl.maximum(slot, 0) // PAGE, tl.maximum(slot, 0) % PAGE
        to = kv_pages + page * stride_page + index * stride_kv + offset * stride_slot + heads * stride_head
        scale_to = None
        if kv_scales is not None:
            scale_to = (
                kv_scales + page * stride_scale_page + index * stride_scale_kv + heads * stride_scale_head + offset
            )
        if index == 0:
            angles = cos_sin + tl.load(positions + token) * R
            _turn(
                k + token * stride_k + heads * stride_k_head, there, to, stored, scale_to,
                gains, angles, eps, E, R, INTERLEAVED, HALF, REST, NORMED, INTERPRETED,
            )  # fmt: skip
        else:
            _copy(v + token * stride_v + heads * stride_v_head, there, to, stored, scale_to, E, BLOCK, INTERPRETED)


def _tile(head_dim: int, rotary_dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(head_dim)
    return {
        "HEADS": max(1, VALUES_PER_PROGRAM // block),
        "HALF": triton.next_power_of_2(rotary_dim // 2),
        "REST": triton.next_power_of_2(head_dim - rotary_dim) if rotary_dim < head_dim else 0,
        "BLOCK": block,
    }


_STRIDES = ("stride_q", "stride_q_head", "stride_k", "stride_k_head", "stride_v", "stride_v_head")
_PAGE_STRIDES = ("stride_page", "stride_kv", "stride_slot", "stride_head")
_SCALE_STRIDES = ("stride_scale_page", "stride_scale_kv", "stride_scale_head")


def _aot():
    for head_dim, rotary_dim, normed, interleaved, quantised in (
        (128, 128, True, False, False),
        (128, 128, True, False, True),
        (128, 128, False, False, False),
        (64, 64, False, False, True),
        (256, 64, True, False, False),
        (256, 64, True, False, True),
        (128, 64, True, True, True),
    ):
        nothing = ([] if normed else ["q_norm", "k_norm"]) + ([] if quantised else ["kv_scales"])
        tensors = dict.fromkeys(("q", "k", "v", "q_norm", "k_norm", "out"), "*bf16")
        tensors |= {"kv_pages": "*fp8e4nv" if quantised else "*bf16", "kv_scales": "*u8", "cos_sin": "*fp32"}
        tensors |= {"positions": "*i64", "slots": "*i64"}
        tensors = {name: kind for name, kind in tensors.items() if name not in nothing}
        strides = (*_STRIDES, *_PAGE_STRIDES, *_SCALE_STRIDES)
        yield Aot(
            _one_pass,
            tensors | {"num_heads": "i32", "num_kv_heads": "i32", "eps": "fp32"} | dict.fromkeys(strides, "i32"),
            {"E": head_dim, "R": rotary_dim, "INTERLEAVED": interleaved, "PAGE": 64, "INTERPRETED": False, "PDL": True}
            | dict.fromkeys(nothing)
            | _tile(head_dim, rotary_dim),
            num_warps=NUM_WARPS,
            divisible=(*tensors, *strides),
            wants=("ld.v4",),
        )


@rope_store_kv.kernel(needs="sm80", batch_invariant=True, aot=_aot)
def one_pass(q, k, v, kv_pages, kv_scales, positions, slots, cos_sin, q_norm, k_norm, eps, interleaved):
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads, rotary_dim = k.shape[1], cos_sin.shape[1]
    assert (q_norm is None) == (k_norm is None), "norm weights come for both or neither of q and k"
    assert q.stride(2) == k.stride(2) == v.stride(2) == kv_pages.stride(4) == 1, "heads must be contiguous"
    assert cos_sin.is_contiguous() and (kv_scales is None or kv_scales.stride(3) == 1)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens:
        tile = _tile(head_dim, rotary_dim)
        num_parts = triton.cdiv(num_heads, tile["HEADS"]) + 2 * triton.cdiv(num_kv_heads, tile["HEADS"])
        _one_pass[(num_tokens, num_parts)](
            q, k, v, kv_pages, kv_scales, positions, slots, cos_sin, q_norm, k_norm, out, num_heads, num_kv_heads, eps,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *kv_pages.stride()[:4],
            *((0, 0, 0) if kv_scales is None else kv_scales.stride()[:3]),
            E=head_dim, R=rotary_dim, INTERLEAVED=interleaved, PAGE=kv_pages.shape[2], **tile,
            INTERPRETED=triton_interpret(), num_warps=NUM_WARPS, **overlap.launch(),
        )  # fmt: skip
    return out
