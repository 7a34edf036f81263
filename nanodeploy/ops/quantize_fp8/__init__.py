from nanodeploy.ops.registry import room

quantize_fp8 = room(__name__)
