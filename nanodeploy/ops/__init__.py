"""Ops: each room holds a reference, its cases and its kernels. Imports torch and triton only."""

from nanodeploy.ops.add_rms_norm import add_rms_norm
from nanodeploy.ops.decode_attention import decode_attention
from nanodeploy.ops.linear import linear
from nanodeploy.ops.linear_silu_mul import linear_silu_mul
from nanodeploy.ops.paged_attention import paged_attention
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.prefill_attention import prefill_attention
from nanodeploy.ops.rms_norm import rms_norm
from nanodeploy.ops.rope import rope
from nanodeploy.ops.rope_store_kv import rope_store_kv
from nanodeploy.ops.sample import sample
from nanodeploy.ops.silu_mul import silu_mul
from nanodeploy.ops.store_kv import store_kv

__all__ = [
    "add_rms_norm",
    "decode_attention",
    "linear",
    "linear_silu_mul",
    "paged_attention",
    "plan_decode",
    "prefill_attention",
    "rms_norm",
    "rope",
    "rope_store_kv",
    "sample",
    "silu_mul",
    "store_kv",
]
