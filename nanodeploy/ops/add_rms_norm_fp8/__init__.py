from nanodeploy.ops.registry import room

add_rms_norm_fp8 = room(__name__)
