from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import num_fp8_blocks
from nanodeploy.ops.quantize_fp8.reference import spread

SAME_SCALE = 1e-5  # relative: scales of values that were summed in another order
FEW = 0.02  # share of the elements that may be rounded to the other side


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    dim: int  # K
    gap: int = 0  # elements between the rows of x


POINTS = {
    "qwen3-8b T1": Case(torch.bfloat16, 1, 4096),
    "qwen3-8b T64": Case(torch.bfloat16, 64, 4096),
    "qwen3-8b T256": Case(torch.bfloat16, 256, 4096),
    "qwen3-8b T8192": Case(torch.bfloat16, 8192, 4096),
    "deepseek-v3 T8192": Case(torch.bfloat16, 8192, 16384),
}

FAR = Case(torch.bfloat16, 2**17 + 1, 16384)  # addresses past 2**31 elements

ROWS = ("x",)  # arguments split by row when a row is run alone


def of(x: Tensor) -> Case:
    return Case(x.dtype, x.shape[0], x.shape[1], x.stride(0) - x.shape[1])


def strategy(st, *, small: bool):
    return st.builds(
        Case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 6 if small else 300),
        dim=st.sampled_from([1, 63, 128, 144, 384] if small else [1, 63, 128, 144, 2048, 4096, 7168, 12288]),
        gap=st.sampled_from([0, 1, 64]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor]:
    x = blocks_of_all_sizes(case.num_tokens, case.dim + case.gap, device, seed)
    return (x.to(case.dtype)[:, : case.dim],)


def blocks_of_all_sizes(num_tokens: int, dim: int, device: torch.device, seed: int) -> Tensor:
    """fp32 [T, dim] whose blocks differ by orders of magnitude, with outliers; some blocks are of zeros."""
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(num_tokens, dim, generator=g, device=device)
    x[torch.rand(x.shape, generator=g, device=device) < 0.01] *= 20
    sizes = torch.randint(-6, 7, (num_tokens, num_fp8_blocks(dim)), generator=g, device=device).float().exp2()
    sizes[torch.rand(sizes.shape, generator=g, device=device) < 0.05] = 0
    return x * spread(sizes, dim)


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * case.dim
    num_scales = case.num_tokens * num_fp8_blocks(case.dim)
    return Cost(num_values * (case.dtype.itemsize + 1) + 4 * num_scales, 2 * num_values)


def agrees(args: tuple, out: tuple[Tensor, ...], reference_out: tuple[Tensor, ...], case: Case) -> str | None:
    return quantised_alike(out[:2], reference_out[:2])


def quantised_alike(got: tuple[Tensor, ...], ref: tuple[Tensor, ...]) -> str | None:
    """A complaint unless (values, scales) are the reference's, but for what a last bit of fp32 may do.

    Scales equal within SAME_SCALE. A value that lay on the edge between two of e4m3's may have fallen to the other
    side: few of them, none by more than one step.
    """
    for name, g, r in zip(("values", "scales"), got, ref, strict=True):
        if (g.shape, g.dtype, g.stride()) != (r.shape, r.dtype, r.stride()):
            form = " ".join(str(part) for part in (g.dtype, tuple(g.shape), g.stride()))
            return f"{name} are {form}; the reference gives {r.dtype} {tuple(r.shape)} {r.stride()}"
    wrong = (got[1] - ref[1]).abs() > SAME_SCALE * ref[1]
    if wrong.any() or got[1].isnan().any():
        at = wrong.flatten().int().argmax()
        pair = got[1].flatten()[at].item(), ref[1].flatten()[at].item()
        return f"scales: {int(wrong.sum())} of {wrong.numel()} differ, as {pair[0]} from the reference's {pair[1]}"
    # As whole numbers in the order of the values: e4m3's codes are sign and magnitude.
    raw = [v.view(torch.uint8).int() for v in (got[0], ref[0])]
    if ((raw[0] % 128 == 127) != (raw[1] % 128 == 127)).any():
        return "values: there are NaN in one, not in the other"
    codes = [torch.where(t >= 128, 128 - t, t) for t in raw]
    steps = (codes[0] - codes[1]).abs()
    if (steps > 1).any():
        at = steps.flatten().argmax()
        pair = got[0].flatten()[at].item(), ref[0].flatten()[at].item()
        return f"values: {int((steps > 1).sum())} of {steps.numel()} are wrong, as {pair[0]} for {pair[1]}"
    if (moved := int((steps > 0).sum())) > max(2, FEW * steps.numel()):
        return f"values: {moved} of {steps.numel()} differ by one step of e4m3; they are not rounded to nearest"
    return None
