from nanodeploy.ops.registry import room

linear = room(__name__)
