from nanodeploy.ops.registry import room

rope_store_latent = room(__name__)
