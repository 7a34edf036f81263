"""Ops: each room holds a reference, its cases and its kernels. Imports torch and triton only."""

from nanodeploy.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
