from nanodeploy.ops.registry import room

linear_silu_mul = room(__name__)
