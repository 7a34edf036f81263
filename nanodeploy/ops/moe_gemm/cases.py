from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.agreement import disagreement, wide
from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import E4M3, empty_token_scales, num_fp8_blocks
from nanodeploy.ops.moe_align.cases import routing
from nanodeploy.ops.moe_gemm.reference import mixed, moe_gemm
from nanodeploy.ops.quantize_fp8.reference import quantised, spread


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype  # of x
    num_tokens: int
    top_k: int
    num_experts: int  # E, those that are here
    dim: int  # D
    inner: int  # I
    scaled: bool = False  # the weights are e4m3 with scales; else in the dtype of x
    num_routed: int | None = None  # experts of the whole model; those past num_experts are another rank's

    @property
    def experts_hit(self) -> float:
        """How many of the experts here a batch reads, on average, if the router has no favourites."""
        num_routed = self.num_routed or self.num_experts
        return self.num_experts * (1 - (1 - min(1, self.top_k / num_routed)) ** self.num_tokens)

    @property
    def products(self) -> float:
        """Token-expert pairs here, on average."""
        return self.num_tokens * self.top_k * self.num_experts / (self.num_routed or self.num_experts)


def points(
    name: str, tokens: tuple[int, ...], num_experts: int, dim: int, inner: int, num_routed: int, *, fp8: bool = False
) -> dict[str, Case]:
    """A real model's experts, top-8, for several numbers of tokens: bf16, or e4m3 throughout."""
    dtype = E4M3 if fp8 else torch.bfloat16
    return {f"{name} T{t}": Case(dtype, t, 8, num_experts, dim, inner, fp8, num_routed) for t in tokens}


TOKENS = (1, 8, 64, 256, 8192)
QWEN3_30B = (128, 2048, 768, 128)
POINTS = (
    points("qwen3-30b", (1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192), *QWEN3_30B)
    | points("qwen3-30b fp8", TOKENS, *QWEN3_30B, fp8=True)
    | points("deepseek-v3 ep8", TOKENS, 32, 7168, 2048, 256, fp8=True)
    | points("deepseek-v3 ep32", TOKENS, 8, 7168, 2048, 256, fp8=True)
)

# Tokens of a region -> those of the points in it.
RANGES: list[tuple[int | list[int | None], tuple[int, ...]]] = [
    (1, (1,)),
    ([2, 4], (2,)),
    ([5, 11], (8,)),
    ([12, 23], (16,)),
    ([24, 47], (32,)),
    ([48, 95], (64,)),
    ([96, 191], (128,)),
    ([192, 383], (256,)),
    ([384, 767], (512,)),
    ([768, 1535], (1024,)),
    ([1536, 4095], (2048,)),
    ([4096, None], (8192,)),
]

REGIONS: list[tuple[dict, list[str]]] = [
    ({"num_tokens": where, "num_experts": num_experts, "dim": dim, "inner": inner, "scaled": scaled}, found)
    for name, (num_experts, dim, inner), scaled in (
        ("qwen3-30b", (128, 2048, 768), False),
        ("qwen3-30b fp8", (128, 2048, 768), True),
        ("deepseek-v3 ep8", (32, 7168, 2048), True),
        ("deepseek-v3 ep32", (8, 7168, 2048), True),
    )
    for where, tokens in RANGES
    if (found := [point for t in tokens if (point := f"{name} T{t}") in POINTS])
]

FAR = Case(torch.bfloat16, 64, 8, 256, 4096, 1032)  # addresses past 2**31 elements

ROWS = ("x", "x_scales", "ids", "weights")  # arguments split by row when a row is run alone


def of(
    x: Tensor,
    x_scales: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scales: Tensor | None,
    down: Tensor,
    down_scales: Tensor | None,
) -> Case:
    (num_tokens, top_k), (num_experts, dim, inner) = ids.shape, down.shape
    return Case(x.dtype, num_tokens, top_k, num_experts, dim, inner, gate_up_scales is not None)


def _case(kind: tuple[torch.dtype, bool], shape: tuple[int, int], fp8_shape: tuple[int, int], **fields) -> Case:
    dtype, scaled = kind
    dim, inner = fp8_shape if scaled else shape
    num_experts = fields["num_experts"]
    return Case(
        dtype=dtype, dim=dim, inner=inner, scaled=scaled, **fields | {"top_k": min(fields["top_k"], num_experts)}
    )


def strategy(st, *, small: bool):
    plain = torch.float16 if small else torch.bfloat16
    kinds = [(plain, False), (torch.float32 if small else torch.float16, False), (plain, True), (E4M3, True)]
    return st.builds(
        _case,
        kind=st.sampled_from(kinds),
        shape=st.sampled_from(
            [(16, 16), (64, 24), (72, 80)] if small else [(64, 24), (2048, 768), (1000, 136), (512, 256)]
        ),
        # Whole blocks of scales, and partial last ones.
        fp8_shape=st.sampled_from(
            [(128, 128), (144, 128), (256, 64)] if small else [(512, 384), (1040, 128), (256, 64), (2048, 768)]
        ),
        num_tokens=st.one_of(st.just(1), st.integers(2, 5), st.integers(6, 20))
        if small
        else st.one_of(st.just(1), st.integers(2, 16), st.integers(17, 300), st.integers(301, 3000)),
        top_k=st.sampled_from([1, 2, 3, 8]),
        num_experts=st.sampled_from([1, 3, 8] if small else [1, 8, 60, 128]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple:
    g = torch.Generator(device).manual_seed(seed)
    ids = routing(case, device, seed)
    # As a router gives them, but for one thing: where no expert is, the weight means nothing.
    weights = torch.rand(ids.shape, generator=g, device=device) + 0.1
    weights = torch.where(ids < 0, torch.nan, weights / weights.sum(dim=-1, keepdim=True))
    x, x_scales = torch.randn(case.num_tokens, case.dim, generator=g, device=device), None
    if case.dtype == E4M3:
        x, scales = quantised(x)
        x_scales = empty_token_scales(case.num_tokens, case.dim, device).copy_(scales)
    else:
        x = x.to(case.dtype)
    gate_up, gate_up_scales = _weight(case, 2, case.inner, case.dim, g, device)
    down, down_scales = _weight(case, 1, case.dim, case.inner, g, device)
    return x, x_scales, ids, weights, gate_up, gate_up_scales, down, down_scales


def _weight(case: Case, num_parts: int, num_rows: int, num_cols: int, g: torch.Generator, device: torch.device):
    """Values as trained weights have, so that gates lie on both sides of zero: a row's products sum to about two."""
    shape = (case.num_experts, num_parts * num_rows, num_cols)
    if not case.scaled:
        return torch.empty(shape, dtype=case.dtype, device=device).normal_(0, 2 * num_cols**-0.5, generator=g), None
    weight = torch.empty(shape, dtype=E4M3, device=device)
    for expert in range(case.num_experts):
        weight[expert] = torch.randn(shape[1:], generator=g, device=device).mul_(64).to(E4M3)
    blocks = (case.num_experts, num_parts * num_fp8_blocks(num_rows), num_fp8_blocks(num_cols))
    scales = torch.rand(blocks, generator=g, device=device) + 0.5
    return weight, scales * (2 * num_cols**-0.5 / 64)


def agrees(args: tuple, out: Tensor, reference_out: Tensor, case: Case) -> str | None:
    """Within the error budget. In FP8 a value of h that lies on the edge between two of e4m3's may fall to either side:
    the tensor cores keep about 14 bits of a sum of FP8 products (arXiv:2412.19437, section 3.5.2), which moves one
    value of a thousand. So there the budget is taken from a run without quantisation of h."""
    truth = moe_gemm.reference(*wide(args))
    if case.scaled:
        x, x_scales, *rest = wide(args)
        x = quantised(x) if x_scales is None else (x, x_scales)
        tokens = x[0].double() * spread(x[1].double(), case.dim)
        reference_out = mixed(tokens, lambda h: h, *rest).to(reference_out.dtype)
    return disagreement("out", out, reference_out, truth)


def cost(case: Case) -> Cost:
    weight_bytes = 1 if case.scaled else case.dtype.itemsize
    num_weights = int(case.experts_hit * 3 * case.dim * case.inner)
    out_bytes = 2 if case.dtype == E4M3 else case.dtype.itemsize
    num_bytes = weight_bytes * num_weights + case.num_tokens * (
        case.dim * (case.dtype.itemsize + out_bytes) + 8 * case.top_k
    )
    return Cost(num_bytes, int(6 * case.products * case.dim * case.inner))
