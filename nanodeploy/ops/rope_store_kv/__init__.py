from nanodeploy.ops.registry import room

rope_store_kv = room(__name__)
