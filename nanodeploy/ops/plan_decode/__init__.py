from nanodeploy.ops.registry import room

plan_decode = room(__name__)
