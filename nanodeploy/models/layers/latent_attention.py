"""Latent attention (MLA, arXiv:2405.04434, section 2.1): of every token one short vector is kept for all heads.

Axes: T tokens of a step, D model, H heads. A head's query and key have two parts, of nope_dim values that are not
rotated and of rope_dim that are; the rotated part of the key is the same for all heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nanodeploy import ops
from nanodeploy.models.batch import Batch, LatentPages
from nanodeploy.models.checkpoint import Stack
from nanodeploy.models.layers.linear import Linear
from nanodeploy.models.layers.norm import RMSNorm
from nanodeploy.ops.latent_attention import latent_attention, planned
from nanodeploy.ops.layouts import LatentCache, Quantised
from nanodeploy.ops.paged_attention import Rows

LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps says: so in the code that published the models


@dataclass(frozen=True)
class LatentDims:
    num_heads: int  # H
    q_rank: int | None  # of the latent that queries are made of; None: they are made of the token itself
    rank: int  # of the latent that keys and values are made of
    nope_dim: int
    rope_dim: int
    value_dim: int


class PerHead(nn.Module):
    """A projection for each head of one input, [sum of a head's rows x H, rank]: attention takes it apart by heads.

    Never in FP8: a head's rows need not end where a block of scales does, and in decodes it is no product of tokens.
    """

    def __init__(self, rank: int, num_heads: int, *rows: int):
        super().__init__()
        self.num_heads, self.rows = num_heads, rows
        self.shard = "rows"
        self.weight = nn.Parameter(torch.empty(num_heads * sum(rows), rank), requires_grad=False)

    def parts(self) -> tuple[Tensor, ...]:
        """Views [H, rows, rank] of the weight."""
        return self.weight.unflatten(0, (self.num_heads, -1)).split(self.rows, dim=1)


class LatentAttention(nn.Module):
    def __init__(self, dim: int, dims: LatentDims, logit_gain: float):
        """logit_gain: by which stretched positions (layers/rope.py) want the logits multiplied."""
        super().__init__()
        self.dims = dims
        self.scale = (dims.nope_dim + dims.rope_dim) ** -0.5 * logit_gain
        q_size, kv_size = dims.num_heads * (dims.nope_dim + dims.rope_dim), dims.rank + dims.rope_dim
        if dims.q_rank is None:
            self.q_proj = Linear(dim, q_size, shard="rows")
            self.kv_a_proj_with_mqa = Linear(dim, kv_size)
        else:
            self.checkpoint = {"qkv_a.weight": Stack("q_a_proj.weight", "kv_a_proj_with_mqa.weight")}
            self.qkv_a = Linear(dim, dims.q_rank, kv_size)
            self.q_a_layernorm = RMSNorm(dims.q_rank, LATENT_EPS)
            self.q_b_proj = Linear(dims.q_rank, q_size, shard="rows")
        self.kv_a_layernorm = RMSNorm(dims.rank, LATENT_EPS)
        self.kv_b_proj = PerHead(dims.rank, dims.num_heads, dims.nope_dim, dims.value_dim)
        self.o_proj = Linear(dims.num_heads * dims.value_dim, dim, shard="cols")

    @property
    def takes_fp8(self) -> bool:
        if self.dims.q_rank is None:
            return self.q_proj.takes_fp8 and self.kv_a_proj_with_mqa.takes_fp8
        return self.qkv_a.takes_fp8

    def cache_need(self) -> LatentPages:
        return LatentPages(self.dims.rank, self.dims.rope_dim)

    def planned(self, rows: Rows) -> Rows:
        """With the plan that all layers like this one share in a step."""
        return planned(rows, self.dims.num_heads)

    def project(self, x: Tensor | Quantised) -> tuple[Tensor, Tensor]:
        """x [T, D] -> the heads' queries [T, H, nope_dim + rope_dim], and what will be kept, [T, rank + rope_dim]."""
        heads = self.dims.num_heads, -1
        if self.dims.q_rank is None:
            return self.q_proj(x).unflatten(-1, heads), self.kv_a_proj_with_mqa(x)
        q_latent, latent = self.qkv_a(x).split(self.qkv_a.parts, dim=-1)
        q_latent = ops.rms_norm(q_latent, self.q_a_layernorm.weight, LATENT_EPS)
        return self.q_b_proj(q_latent).unflatten(-1, heads), latent

    def forward(self, x: Tensor | Quantised, batch: Batch, cache: LatentCache, cos_sin: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        q, latent = self.project(x)
        norm = self.kv_a_layernorm.weight, LATENT_EPS
        q_rope = ops.rope_store_latent(q, latent, *cache, batch.positions, batch.slots, cos_sin, *norm, True)
        q_nope = q[..., : self.dims.nope_dim]
        w_uk, w_uv = self.kv_b_proj.parts()
        mixed = latent_attention(q_nope, q_rope, cache, batch.rows, w_uk, w_uv, self.scale)  # [T, H, dv]
        return self.o_proj(mixed.flatten(1))
