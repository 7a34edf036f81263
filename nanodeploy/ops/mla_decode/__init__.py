from nanodeploy.ops.registry import room

mla_decode = room(__name__)
