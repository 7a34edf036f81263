from nanodeploy.ops.registry import room

silu_mul = room(__name__)
