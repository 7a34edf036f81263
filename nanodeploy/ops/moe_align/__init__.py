from nanodeploy.ops.registry import room

moe_align = room(__name__)
