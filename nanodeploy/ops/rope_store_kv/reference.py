import torch
from torch import Tensor

from nanodeploy.ops.layouts import E4M3_MAX, scale_bytes, scale_values
from nanodeploy.ops.registry import op
from nanodeploy.ops.rope.reference import turned


@op(
    out=lambda q, *_: q.new_empty(q.shape),
    mutates=("kv_pages", "kv_scales"),
)
def rope_store_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    kv_scales: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """What stands between the qkv projection and attention: norm and rotate q and k, write k and v into the cache.

    q [T, H, E], k and v [T, K, E], may be strided views of one fused qkv; positions, cos_sin, norms, eps and
    interleaved as in ops.rope; slots [T] int64 = page * page_size + offset, all different, or -1: nothing is stored.
    kv_pages [P, 2, page_size, K, E], written in place: in q.dtype, or float8_e4m3fn with kv_scales [P, 2, K, page_size]
    uint8, written too: the least power of two by which the head's values fit (ops/layouts.py), values rounded to
    nearest. Returns q', [T, H, E] in q.dtype, contiguous. In fp32; keys that go to e4m3 are rounded only there.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    cos_sin = cos_sin[positions].unsqueeze(1)
    rotated = turned(q.to(wide), cos_sin, q_norm, eps, interleaved).to(q.dtype)
    page_size = kv_pages.shape[2]
    rows = (slots >= 0).nonzero().squeeze(1)
    page, offset = slots[rows] // page_size, slots[rows] % page_size
    for index, values in enumerate(
        (turned(k[rows].to(wide), cos_sin[rows], k_norm, eps, interleaved), v[rows].to(wide))
    ):
        if kv_scales is not None:
            scales = scale_bytes(values.abs().amax(-1))  # [rows, K]
            kv_scales[page, index, :, offset] = scales
            values = (values / scale_values(scales, wide).unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
        kv_pages[page, index, offset] = values.to(kv_pages.dtype)
    return rotated
