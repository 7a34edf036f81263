from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import num_fp8_blocks
from nanodeploy.ops.quantize_fp8.cases import quantised_alike
from nanodeploy.ops.silu_mul.cases import FAR, POINTS, ROWS, Case, make, of, strategy

__all__ = ["FAR", "POINTS", "ROWS", "Case", "agrees", "cost", "make", "of", "strategy"]


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * case.dim
    num_scales = case.num_tokens * num_fp8_blocks(case.dim)
    return Cost(num_values * (2 * case.dtype.itemsize + 1) + 4 * num_scales, 7 * num_values)


def agrees(args: tuple, out: tuple[Tensor, ...], reference_out: tuple[Tensor, ...], case: Case) -> str | None:
    return quantised_alike(out, reference_out)
