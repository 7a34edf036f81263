"""A tile of tokens with a tile of experts per program. The inner axis is one chain of tensor-core steps, so that an
output's bits depend on no other row, nor on the tile."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.moe_logits.reference import moe_logits
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Config:
    tokens: int  # per program
    experts: int
    block: int  # of the inner axis, per step
    num_warps: int
    num_stages: int  # steps in flight


def config(num_tokens: int, dtype: torch.dtype) -> Config:
    """Few tokens: small tiles, so that there are more programs. Products in fp32 take registers."""
    if dtype == torch.float32:
        return Config(16, 16, 64, 4, 3)
    if num_tokens <= 64:
        return Config(16, 16, 256, 2, 5)
    return Config(64, 64, 64, 4, 4) if num_tokens <= 4096 else Config(128, 64, 64, 4, 4)


@triton.jit(do_not_specialize=["num_tokens"])
def _logits(
    x, weight, out, num_tokens, num_experts, stride_x,
    DIM: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    go(PDL)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    lanes = tl.arange(0, BLOCK)
    # Rows past the end read the last one; their results are not stored.
    x_at = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * stride_x + lanes[None, :]
    w_at = weight + tl.minimum(experts, num_experts - 1)[None, :] * DIM + lanes[:, None]
    wait(PDL)
    total = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for step in tl.range(0, DIM, BLOCK, num_stages=STAGES):
        if DIM % BLOCK == 0:
            values, w = tl.load(x_at + step), tl.load(w_at + step)
        else:
            inside = step + lanes < DIM
            values = tl.load(x_at + step, mask=inside[None, :], other=0.0)
            w = tl.load(w_at + step, mask=inside[:, None], other=0.0)
        total = tl.dot(values.to(weight.dtype.element_ty), w, total, input_precision="ieee")
    at = out + tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    tl.store(at, total, mask=(tokens < num_tokens)[:, None] & (experts < num_experts)[None, :])


def _constexprs(dim: int, chosen: Config) -> dict[str, int]:
    shape = {"TOKENS": chosen.tokens, "EXPERTS": chosen.experts, "STAGES": chosen.num_stages}
    return {"DIM": dim, "BLOCK": max(16, min(chosen.block, triton.next_power_of_2(dim))), **shape}


def run(x: torch.Tensor, weight: torch.Tensor, chosen: Config) -> torch.Tensor:
    """One configuration."""
    (num_tokens, dim), num_experts = x.shape, weight.shape[0]
    assert x.stride(1) == 1 and weight.is_contiguous(), "rows must be contiguous"
    out = torch.empty((num_tokens, num_experts), dtype=torch.float32, device=x.device)
    if num_tokens:
        _logits[(triton.cdiv(num_tokens, chosen.tokens), triton.cdiv(num_experts, chosen.experts))](
            x, weight, out, num_tokens, num_experts, x.stride(0), **_constexprs(dim, chosen),
            num_warps=chosen.num_warps, **overlap.launch(),
        )  # fmt: skip
    return out


def _aot():
    for dim, dtype in ((2048, torch.bfloat16), (7168, torch.bfloat16), (7168, torch.float32)):
        for chosen in dict.fromkeys(config(num_tokens, dtype) for num_tokens in (1, 256, 8192)):
            yield Aot(
                _logits,
                {"x": "*bf16", "weight": DTYPES[dtype], "out": "*fp32"}
                | dict.fromkeys(("num_tokens", "num_experts", "stride_x"), "i32"),
                _constexprs(dim, chosen) | {"PDL": True},
                chosen.num_warps,
                divisible=("x", "weight", "out", "num_experts", "stride_x"),
                wants=("cp.async",)
                if dtype == torch.float32
                else ("cp.async", "wgmma" if chosen.tokens >= 64 else "mma"),
            )


@moe_logits.kernel(needs="sm80", batch_invariant=True, order="k16", aot=_aot)
def tiles(x, weight):
    return run(x, weight, config(x.shape[0], weight.dtype))
