"""One program per token for what is stored, and one for every few heads of queries to rotate.

An fp8 block's scale comes from the bits of its largest value; the latent is still in registers then.
"""

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops import overlap
from nanodeploy.ops.e4m3 import to_e4m3
from nanodeploy.ops.layouts import E4M3, FP8_BLOCK
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.rope_store_latent.reference import rope_store_latent

VALUES_PER_PROGRAM = 2048


@triton.jit
def _rotate(x, to, there, angles, R: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rotate rows x [N, 1] (pointers) of R values, and write them to `to` [N, 1] where `there` [N, 1]."""
    half: tl.constexpr = R // 2
    pairs = tl.arange(0, HALF)[None, :]
    cos = tl.load(angles + pairs, mask=pairs < half, other=0.0)
    sin = tl.load(angles + half + pairs, mask=pairs < half, other=0.0)
    kind: tl.constexpr = to.dtype.scalar.element_ty
    if INTERLEAVED:
        dims = tl.arange(0, 2 * HALF)[None, :]
        inside = there & (dims < R)
        values = tl.load(x + dims, mask=inside, other=0.0).to(tl.float32)  # both of a pair with one wide load
        a, b = tl.split(tl.reshape(values, [values.shape[0], HALF, 2]))
        both = tl.join(a * cos - b * sin, b * cos + a * sin)
        tl.store(to + dims, tl.reshape(both, [values.shape[0], 2 * HALF]).to(kind), mask=inside)
    else:
        inside = there & (pairs < half)
        a = tl.load(x + pairs, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(x + half + pairs, mask=inside, other=0.0).to(tl.float32)
        tl.store(to + pairs, (a * cos - b * sin).to(kind), mask=inside)
        tl.store(to + half + pairs, (b * cos + a * sin).to(kind), mask=inside)


# One compilation for any batch.
@triton.jit(do_not_specialize=["num_heads"])
def _one_pass(
    q,
    latent,
    pages,
    scales,
    keys,
    positions,
    slots,
    cos_sin,
    norm_weight,
    out,
    num_heads,
    eps,
    stride_q,
    stride_q_head,
    stride_latent,
    stride_page,
    stride_slot,
    RANK: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (token, part): the latent, then HEADS heads each. A latent is BLOCKS x BLOCK values; scales are those of
    fp8 pages, one for each block, None where there are none; keys are the pages as the key's dtype."""
    go(PDL)
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    if part > 0:
        wait(PDL)
        angles = cos_sin + tl.load(positions + token) * R
        heads = ((part - 1) * HEADS + tl.arange(0, HEADS))[:, None]
        rows = q + token * stride_q + heads * stride_q_head
        _rotate(rows, out + (token * num_heads + heads) * R, heads < num_heads, angles, R, HALF, INTERLEAVED)
    else:
        blocks = tl.arange(0, BLOCKS)[:, None]
        dims = blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
        weight = tl.load(norm_weight + dims, mask=dims < RANK, other=0.0).to(tl.float32)
        wait(PDL)
        slot = tl.load(slots + token)
        if slot >= 0:
            at = slot // PAGE * stride_page + slot % PAGE * stride_slot
            x = tl.load(latent + token * stride_latent + dims, mask=dims < RANK, other=0.0).to(tl.float32)
            x = x * tl.rsqrt(tl.sum(x * x) / RANK + eps) * weight
            to = keys + at + RANK
            if scales is not None:  # `at` and the strides count bytes
                bits = tl.max(tl.abs(x), axis=1, keep_dims=True).to(tl.int32, bitcast=True)
                # The least power of two that the block fits (ops/layouts.py), as its exponent; 448 is 1.75 * 2 ** 8.
                byte = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
                byte = tl.where(bits == 0, 127, tl.minimum(tl.maximum(byte, 1), 254))
                scale = (byte << 23).to(tl.float32, bitcast=True)
                tl.store(scales + (at + RANK) // 4 + blocks, scale, mask=blocks * BLOCK < RANK)
                x = to_e4m3(x * ((254 - byte) << 23).to(tl.float32, bitcast=True), INTERPRETED)
                to = keys + (at + RANK + RANK // BLOCK * 4) // 2
            tl.store(pages + at + dims, x.to(pages.dtype.element_ty), mask=dims < RANK)
            angles = cos_sin + tl.load(positions + token) * R
            key = latent + token * stride_latent + RANK + tl.zeros([1, 1], tl.int32)
            _rotate(key, to + tl.zeros([1, 1], tl.int32), slot >= 0, angles, R, HALF, INTERLEAVED)


def _tile(rank: int, rope_dim: int, fp8: bool) -> dict[str, int]:
    half = triton.next_power_of_2(rope_dim // 2)
    block = FP8_BLOCK if fp8 else triton.next_power_of_2(rank)
    return {
        "HEADS": max(1, VALUES_PER_PROGRAM // (2 * half)),
        "HALF": half,
        "BLOCK": block,
        "BLOCKS": triton.next_power_of_2(triton.cdiv(rank, block)),
    }


_STRIDES = ("stride_q", "stride_q_head", "stride_latent", "stride_page", "stride_slot")


def _aot():
    for rank, rope_dim, interleaved, fp8 in ((512, 64, True, False), (512, 64, True, True), (512, 64, False, False)):
        tensors = dict.fromkeys(("q", "latent", "keys", "norm_weight", "out"), "*bf16")
        tensors |= {"positions": "*i64", "slots": "*i64", "cos_sin": "*fp32"}
        tensors |= {"pages": "*fp8e4nv", "scales": "*fp32"} if fp8 else {"pages": "*bf16"}
        flags = {"INTERLEAVED": interleaved, "PAGE": 64, "INTERPRETED": False, "PDL": True}
        yield Aot(
            _one_pass,
            tensors | {"num_heads": "i32", "eps": "fp32"} | dict.fromkeys(_STRIDES, "i32"),
            {"RANK": rank, "R": rope_dim} | flags | ({} if fp8 else {"scales": None}) | _tile(rank, rope_dim, fp8),
            divisible=(*tensors, *_STRIDES),
        )


@rope_store_latent.kernel(needs="sm80", batch_invariant=True, aot=_aot)
def one_pass(q, latent, pages, positions, slots, cos_sin, norm_weight, eps, interleaved):
    num_tokens, num_heads, _ = q.shape
    rank, rope_dim = norm_weight.shape[0], cos_sin.shape[1]
    assert q.stride(2) == latent.stride(1) == pages.stride(2) == 1 and cos_sin.is_contiguous()
    out = torch.empty((num_tokens, num_heads, rope_dim), dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    fp8 = pages.dtype == torch.uint8
    tile = _tile(rank, rope_dim, fp8)
    _one_pass[(num_tokens, 1 + triton.cdiv(num_heads, tile["HEADS"]))](
        q[..., -rope_dim:],
        latent,
        pages.view(E4M3) if fp8 else pages,
        pages.view(torch.float32) if fp8 else None,
        pages.view(torch.bfloat16) if fp8 else pages,
        positions,
        slots,
        cos_sin,
        norm_weight,
        out,
        num_heads,
        eps,
        *q.stride()[:2],
        latent.stride(0),
        *pages.stride()[:2],
        RANK=rank,
        R=rope_dim,
        INTERLEAVED=interleaved,
        PAGE=pages.shape[1],
        INTERPRETED=triton_interpret(),
        num_warps=4,
        **tile,
        **overlap.launch(),
    )
    return out
