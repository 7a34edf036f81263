from nanodeploy.ops.registry import room

gated_rms_norm = room(__name__)
