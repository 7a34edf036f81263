from nanodeploy.ops.registry import room

prefill_attention = room(__name__)
