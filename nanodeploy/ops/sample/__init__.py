from nanodeploy.ops.registry import room

sample = room(__name__)
