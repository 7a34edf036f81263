from nanodeploy.ops.registry import room

add_rms_norm = room(__name__)
