from nanodeploy.ops.registry import room

store_kv = room(__name__)
