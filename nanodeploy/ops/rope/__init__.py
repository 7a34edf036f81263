from nanodeploy.ops.registry import room

rope = room(__name__)
