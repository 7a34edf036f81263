from nanodeploy.ops.registry import room

moe_route = room(__name__)
