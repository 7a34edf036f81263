from nanodeploy.ops.registry import room

moe_logits = room(__name__)
