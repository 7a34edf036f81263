from nanodeploy.ops.registry import room

moe_gemm = room(__name__)
