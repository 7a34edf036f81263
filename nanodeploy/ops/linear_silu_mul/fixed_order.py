"""The gated product for --deterministic: gate and up of a tile in one program, summed as in linear/fixed_order.py."""

from nanodeploy.ops.linear.fixed_order import aot, gated_config, run, takes
from nanodeploy.ops.linear_silu_mul.reference import linear_silu_mul


def _aot():
    for num_tokens in (1, 64, 256, 8192):
        yield aot(gated_config(num_tokens), gated=True)


@linear_silu_mul.kernel(needs="sm90", when=takes, batch_invariant=True, order="k16", aot=_aot)
def fixed_order(x, weight):
    return run(x, weight, gated_config(x.shape[0]), gated=True)
