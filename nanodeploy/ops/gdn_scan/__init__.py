from nanodeploy.ops.registry import room

gdn_scan = room(__name__)
