import torch
from torch import Tensor

from nanodeploy.ops.registry import op


def turned(x: Tensor, angles: Tensor, weight: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    """Heads x [T, heads, E], normed if there is a weight [E], rotated by angles [T, 1, R]; in x's dtype."""
    if weight is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    cos, sin = angles.chunk(2, dim=-1)
    head, rest = x[..., : angles.shape[-1]], x[..., angles.shape[-1] :]
    a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    pair = a * cos - b * sin, b * cos + a * sin
    head = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((head, rest), dim=-1)


@op(out=lambda q, k, positions, cos_sin, q_norm, k_norm, eps, interleaved: (q.new_empty(q.shape), k.new_empty(k.shape)))
def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by their position (RoPE, arXiv:2104.09864), after an optional RMS norm of each head.

    q [T, H, E], k [T, K, E], may be strided views of one fused qkv; positions [T] int64, rows of cos_sin [N, R] fp32
    (first R/2 columns cosines, last R/2 sines); q_norm, k_norm [E], both or neither; R <= E, the dims past R are only
    normed. The pairs are (i, i + R/2), or (2i, 2i + 1) if interleaved. Returns contiguous (q', k') in q.dtype;
    computed in fp32, rounded once.
    """
    assert (q_norm is None) == (k_norm is None), "norm weights come for both or neither of q and k"
    wide = torch.promote_types(q.dtype, torch.float32)
    angles = cos_sin[positions].unsqueeze(1)
    q, k = (turned(x.to(wide), angles, w, eps, interleaved).to(q.dtype) for x, w in ((q, q_norm), (k, k_norm)))
    return q, k
