from nanodeploy.ops.registry import room

mla_prefill = room(__name__)
