from nanodeploy.ops.registry import room

head_linear = room(__name__)
