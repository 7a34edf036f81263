"""DeepGEMM (github.com/deepseek-ai/DeepGEMM), built from its own source at the tag in ops/registry.py: SOURCES.

It compiles a kernel for each weight shape on first use, with nvcc.
"""

import torch

from nanodeploy.ops.layouts import num_fp8_blocks
from nanodeploy.ops.linear_fp8.reference import linear_fp8
from nanodeploy.ops.linear_fp8.tiles import for_tma


def _takes(case) -> bool:
    whole = case.in_dim % 128 == 0 and case.out_dim % 64 == 0
    return case.dtype == torch.bfloat16 and case.num_tokens > 0 and whole


@linear_fp8.kernel(needs="sm90a", when=_takes, requires="deep_gemm", interpretable=False)
def deep_gemm(x, x_scales, weight, weight_scales, dtype):
    import deep_gemm as vendor

    out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    padded = -(-x.shape[0] // 4) * 4  # it insists on the shortest rows that TMA takes
    scales = torch.empty((num_fp8_blocks(x.shape[1]), padded), dtype=torch.float32, device=x.device).t()[: x.shape[0]]
    vendor.fp8_gemm_nt((for_tma(x), scales.copy_(x_scales)), (weight, weight_scales), out)
    return out
