from nanodeploy.ops.registry import room

rms_norm = room(__name__)
