from nanodeploy.ops.registry import room

silu_mul_fp8 = room(__name__)
