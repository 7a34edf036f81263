import torch
from torch import Tensor

from nanodeploy.ops.add_rms_norm import cases as plain
from nanodeploy.ops.add_rms_norm.cases import POINTS, ROWS, Case, make, of, strategy
from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import num_fp8_blocks
from nanodeploy.ops.quantize_fp8.cases import quantised_alike

__all__ = ["FAR", "POINTS", "ROWS", "Case", "agrees", "cost", "make", "of", "strategy"]

FAR = Case(torch.bfloat16, 2**18 + 1, 8192)  # addresses past 2**31 elements


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * case.dim
    num_bytes = plain.cost(case).num_bytes - (case.dtype.itemsize - 1) * num_values
    return Cost(num_bytes + 4 * case.num_tokens * num_fp8_blocks(case.dim), 7 * num_values)


def agrees(args: tuple, out: tuple[Tensor, ...], reference_out: tuple[Tensor, ...], case: Case) -> str | None:
    complaint = quantised_alike(out[:2], reference_out[:2])
    same = out[2].dtype == reference_out[2].dtype and torch.equal(out[2], reference_out[2])
    return complaint or (None if same else "the new residual is not the rounded sum of x and residual")
