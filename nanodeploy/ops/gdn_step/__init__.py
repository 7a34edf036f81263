from nanodeploy.ops.registry import room

gdn_step = room(__name__)
