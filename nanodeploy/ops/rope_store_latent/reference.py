import torch
from torch import Tensor

from nanodeploy.ops.layouts import pack_latents
from nanodeploy.ops.registry import op
from nanodeploy.ops.rope.reference import turned


def stored(latent: Tensor, angles: Tensor, norm_weight: Tensor, eps: float, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The normed latents [T, rank] and the rotated keys [T, R] of latent [T, rank + R], in its dtype."""
    latents, keys = latent.split((norm_weight.shape[0], angles.shape[-1]), dim=-1)
    latents = latents * torch.rsqrt(latents.square().mean(-1, keepdim=True) + eps) * norm_weight.to(latent.dtype)
    return latents, turned(keys.unsqueeze(1), angles.unsqueeze(1), None, 0.0, interleaved).squeeze(1)


@op(
    out=lambda q, latent, pages, positions, slots, cos_sin, *_: q.new_empty((*q.shape[:2], cos_sin.shape[1])),
    mutates=("pages",),
)
def rope_store_latent(
    q: Tensor,
    latent: Tensor,
    pages: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    norm_weight: Tensor,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """What stands between the projections of latent attention and attention itself (arXiv:2405.04434, section 2.1).

    q [T, H, nope + R]: the last R values of each head are rotated, the others are not looked at. latent [T, rank + R],
    what kv_a projects to: an RMS norm (norm_weight [rank], eps) of its first rank values, and a rotation of the key in
    the last R, are written into the cache. q and latent may be strided views. positions [T] int64, rows of cos_sin
    [N, R] fp32 (first R/2 columns cosines, last R/2 sines); slots [T] int64 = page * page_size + offset, all different,
    or -1: nothing is stored. pages [P, page_size, rank + R] in q.dtype, or [P, page_size, token_bytes] uint8
    (ops/layouts.py), rounded to nearest, and only there.
    The pairs that turn are (i, i + R/2), or (2i, 2i + 1) if interleaved; values stay in their places, in the cache too.
    Returns q', [T, H, R] in q.dtype, contiguous. Computed in fp32.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    angles = cos_sin[positions]
    rotated = turned(q[..., -angles.shape[-1] :].to(wide), angles.unsqueeze(1), None, 0.0, interleaved).to(q.dtype)
    rows = (slots >= 0).nonzero().squeeze(1)
    latents, keys = stored(latent[rows].to(wide), angles[rows], norm_weight, eps, interleaved)
    page, offset = slots[rows] // pages.shape[1], slots[rows] % pages.shape[1]
    if pages.dtype == torch.uint8:
        pages[page, offset] = pack_latents(latents, keys)
    else:
        pages[page, offset] = torch.cat((latents, keys), dim=-1).to(pages.dtype)
    return rotated
