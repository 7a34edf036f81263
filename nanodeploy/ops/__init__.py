"""Ops: each room holds a reference, its cases and its kernels. Imports torch and triton only."""

from nanodeploy.ops.add_rms_norm import add_rms_norm
from nanodeploy.ops.add_rms_norm_fp8 import add_rms_norm_fp8
from nanodeploy.ops.causal_conv import causal_conv
from nanodeploy.ops.decode_attention import decode_attention
from nanodeploy.ops.gated_rms_norm import gated_rms_norm
from nanodeploy.ops.gdn_scan import gdn_scan
from nanodeploy.ops.gdn_step import gdn_step
from nanodeploy.ops.head_linear import head_linear
from nanodeploy.ops.latent_attention import latent_attention
from nanodeploy.ops.linear import linear
from nanodeploy.ops.linear_fp8 import linear_fp8
from nanodeploy.ops.linear_silu_mul import linear_silu_mul
from nanodeploy.ops.mask_logits import mask_logits
from nanodeploy.ops.mla_decode import mla_decode
from nanodeploy.ops.mla_prefill import mla_prefill
from nanodeploy.ops.moe_align import moe_align
from nanodeploy.ops.moe_gemm import moe_gemm
from nanodeploy.ops.moe_logits import moe_logits
from nanodeploy.ops.moe_route import moe_route
from nanodeploy.ops.paged_attention import paged_attention
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.prefill_attention import prefill_attention
from nanodeploy.ops.quantize_fp8 import quantize_fp8
from nanodeploy.ops.rms_norm import rms_norm
from nanodeploy.ops.rope import rope
from nanodeploy.ops.rope_store_kv import rope_store_kv
from nanodeploy.ops.rope_store_latent import rope_store_latent
from nanodeploy.ops.sample import sample
from nanodeploy.ops.silu_mul import silu_mul
from nanodeploy.ops.silu_mul_fp8 import silu_mul_fp8
from nanodeploy.ops.store_kv import store_kv

__all__ = [
    "add_rms_norm",
    "add_rms_norm_fp8",
    "causal_conv",
    "decode_attention",
    "gated_rms_norm",
    "gdn_scan",
    "gdn_step",
    "head_linear",
    "latent_attention",
    "linear",
    "linear_fp8",
    "linear_silu_mul",
    "mask_logits",
    "mla_decode",
    "mla_prefill",
    "moe_align",
    "moe_gemm",
    "moe_logits",
    "moe_route",
    "paged_attention",
    "plan_decode",
    "prefill_attention",
    "quantize_fp8",
    "rms_norm",
    "rope",
    "rope_store_kv",
    "rope_store_latent",
    "sample",
    "silu_mul",
    "silu_mul_fp8",
    "store_kv",
]
