"""Tiles of heads, whichever tokens they are of; a head's values lie within few lanes."""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.gated_rms_norm.reference import gated_rms_norm
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

ROWS = 32  # heads in a tile


@triton.jit
def _tile(
    x, gate, weight, out, num_rows, stride_x, stride_gate, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    go(PDL)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(weight + columns, mask=columns < DIM, other=0.0).to(tl.float32)
    wait(PDL)
    mask = (rows < num_rows)[:, None] & (columns < DIM)
    token, head = (rows // HEADS).to(tl.int64)[:, None], (rows % HEADS)[:, None]
    values = tl.load(x + token * stride_x + head * DIM + columns, mask=mask, other=0.0).to(tl.float32)
    opening = tl.load(gate + token * stride_gate + head * DIM + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)[:, None]
    result = values * scale * gain * (opening / (1 + tl.exp(-opening)))
    tl.store(out + rows.to(tl.int64)[:, None] * DIM + columns, result.to(out.dtype.element_ty), mask=mask)


def _aot():
    signature = dict.fromkeys(("x", "gate", "out"), "*bf16") | {"weight": "*fp32", "eps": "fp32"}
    signature |= dict.fromkeys(("num_rows", "stride_x", "stride_gate"), "i32")
    constexprs = {"HEADS": 32, "DIM": 128, "BLOCK": 128, "ROWS": ROWS, "PDL": True}
    divisible = ("x", "gate", "out", "weight", "stride_x", "stride_gate", "num_rows")
    return [Aot(_tile, signature, constexprs, divisible=divisible)]


@gated_rms_norm.kernel(needs="sm80", when=lambda case: case.dim <= 1024, batch_invariant=True, aot=_aot)
def tiles(x, gate, weight, eps):
    num_tokens, num_heads, dim = x.shape
    for heads in (x, gate):
        assert heads.stride(2) == 1 and (num_heads == 1 or heads.stride(1) == dim), "a token's heads must be contiguous"
    out = torch.empty((num_tokens, num_heads, dim), dtype=x.dtype, device=x.device)
    if num_tokens:
        num_rows = num_tokens * num_heads
        _tile[(triton.cdiv(num_rows, ROWS),)](
            x, gate, weight, out, num_rows, x.stride(0), gate.stride(0), eps,
            HEADS=num_heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), ROWS=ROWS, **overlap.launch(),
        )  # fmt: skip
    return out
