from nanodeploy.ops.registry import room

linear_fp8 = room(__name__)
