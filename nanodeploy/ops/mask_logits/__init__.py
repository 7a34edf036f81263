from nanodeploy.ops.registry import room

mask_logits = room(__name__)
