import torch
from torch import Tensor

from nanodeploy.ops.registry import op


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
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
        head, rest = wide[..., : cos_sin.shape[1]], wide[..., cos_sin.shape[1] :]
        a, b = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
        pair = a * cos - b * sin, b * cos + a * sin
        head = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return torch.cat((head, rest), dim=-1).to(x.dtype)

    return turned(q, q_norm), turned(k, k_norm)
