"""A few heads of one token per program, q's and k's in one launch; each value meets its partner in registers or L1."""

import torch
import triton
import triton.language as tl

from nanodeploy.ops.registry import Aot
from nanodeploy.ops.rope.reference import rope

VALUES_PER_PROGRAM = 1024


@triton.jit
def _turn(
    x, out, weight, angles, heads, num_heads, stride_head, eps,
    E: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate heads [HEADS] of one token: x, out and angles point at the token's first value."""
    dims = tl.arange(0, BLOCK)
    half: tl.constexpr = R // 2
    if INTERLEAVED:
        first, pair = dims % 2 == 0, dims // 2
        partner = tl.where(first, dims + 1, dims - 1)
    else:
        first, pair = dims < half, dims % half
        partner = tl.where(first, dims + half, dims - half)
    turns = dims < R
    cos = tl.load(angles + pair, mask=turns, other=1.0)
    sin = tl.load(angles + half + pair, mask=turns, other=0.0)
    sin = tl.where(first, -sin, sin)

    rows = x + heads[:, None] * stride_head
    there = (heads < num_heads)[:, None]
    mine = tl.load(rows + dims[None, :], mask=there & (dims < E)[None, :], other=0.0).to(tl.float32)
    if INTERLEAVED:
        even, odd = tl.split(tl.reshape(mine, (HEADS, BLOCK // 2, 2)))
        other = tl.reshape(tl.join(odd, even), (HEADS, BLOCK))
    else:
        other = tl.load(rows + partner[None, :], mask=there & turns[None, :], other=0.0).to(tl.float32)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(mine * mine, axis=1) / E + eps)[:, None]
        mine = mine * scale * tl.load(weight + dims, mask=dims < E, other=0.0).to(tl.float32)[None, :]
        other = other * scale * tl.load(weight + partner, mask=turns, other=0.0).to(tl.float32)[None, :]
    turned = mine * cos[None, :] + other * sin[None, :]
    to = out + heads[:, None] * E + dims[None, :]
    tl.store(to, turned.to(out.dtype.element_ty), mask=there & (dims < E)[None, :])


@triton.jit
def _rope(
    q, k, positions, cos_sin, q_norm, k_norm, q_out, k_out, num_heads, num_kv_heads,
    stride_q, stride_q_head, stride_k, stride_k_head, eps,
    E: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts = tl.cdiv(num_heads, HEADS)
    angles = cos_sin + tl.load(positions + token) * R
    if part < num_q_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        _turn(
            q + token * stride_q, q_out + token * num_heads * E, q_norm, angles, heads, num_heads, stride_q_head, eps,
            E, R, INTERLEAVED, HEADS, BLOCK,
        )  # fmt: skip
    else:
        heads = (part - num_q_parts) * HEADS + tl.arange(0, HEADS)
        _turn(
            k + token * stride_k, k_out + token * num_kv_heads * E, k_norm, angles, heads, num_kv_heads, stride_k_head,
            eps, E, R, INTERLEAVED, HEADS, BLOCK,
        )  # fmt: skip


def _tile(head_dim: int) -> dict[str, int]:
    block = triton.next_power_of_2(head_dim)
    return {"HEADS": max(1, VALUES_PER_PROGRAM // block), "BLOCK": block}


def _aot():
    tensors = ("q", "k", "q_out", "k_out", "q_norm", "k_norm")
    strides = ("stride_q", "stride_q_head", "stride_k", "stride_k_head")
    for head_dim, rotary_dim, normed, interleaved in (
        (128, 128, True, False),
        (128, 128, False, False),
        (64, 64, False, False),
        (256, 64, True, False),
        (128, 64, True, True),
    ):
        weights = {} if normed else {"q_norm": None, "k_norm": None}
        yield Aot(
            _rope,
            {name: "*bf16" for name in tensors if name not in weights}
            | {"positions": "*i64", "cos_sin": "*fp32", "num_heads": "i32", "num_kv_heads": "i32", "eps": "fp32"}
            | dict.fromkeys(strides, "i32"),
            {"E": head_dim, "R": rotary_dim, "INTERLEAVED": interleaved} | weights | _tile(head_dim),
            divisible=("positions", "cos_sin", *(name for name in tensors if name not in weights), *strides),
            wants=("ld.v4",),
        )


@rope.kernel(needs="sm80", batch_invariant=True, aot=_aot)
def heads(q, k, positions, cos_sin, q_norm, k_norm, eps, interleaved):
    num_tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    assert (q_norm is None) == (k_norm is None), "norm weights come for both or neither of q and k"
    assert q.stride(2) == k.stride(2) == 1 and cos_sin.is_contiguous(), "heads and angles must be contiguous"
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if num_tokens:
        tile = _tile(head_dim)
        num_parts = triton.cdiv(num_heads, tile["HEADS"]) + triton.cdiv(num_kv_heads, tile["HEADS"])
        _rope[(num_tokens, num_parts)](
            q, k, positions, cos_sin, q_norm, k_norm, q_out, k_out, num_heads, num_kv_heads,
            *q.stride()[:2], *k.stride()[:2], eps,
            E=head_dim, R=cos_sin.shape[1], INTERLEAVED=interleaved, **tile,
        )  # fmt: skip
    return q_out, k_out
