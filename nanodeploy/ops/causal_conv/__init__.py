from nanodeploy.ops.registry import room

causal_conv = room(__name__)
