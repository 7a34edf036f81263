from nanodeploy.ops.registry import room

decode_attention = room(__name__)
