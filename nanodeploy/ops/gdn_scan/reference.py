import torch
from torch import Tensor

from nanodeploy.ops.registry import op

CHUNK = 64  # rows that kernels take together: where chunks of a prompt are cut at its multiples, bits stay the same


@op(
    out=lambda qkv, a, b, a_log, dt_bias, states, *_: qkv.new_empty((qkv.shape[0], *states.shape[1:3])),
    mutates=("states",),
)
def gdn_scan(
    qkv: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    states: Tensor,
    cu_q_lens: Tensor,
    read_slots: Tensor,
    write_slots: Tensor,
) -> Tensor:
    """The gated delta rule over each sequence's tokens (Gated DeltaNet, arXiv:2412.06464, equation 10).

    qkv [T, C], rows may be strided: a token's queries [J, K], keys [J, K] and values [H, V], C = 2 J K + H V;
    a, b [T, H]; a_log, dt_bias [H] fp32; states [N, H, V, K] fp32 or bf16; cu_q_lens [S + 1] int32, rising;
    read_slots [S] and write_slots [T] int32 (ops/states.py). Value head h has the query and key of head h // (H / J).
    Rows cu_q_lens[s] : cu_q_lens[s + 1] are sequence s. Of each token in turn, with q and k made unit vectors
    (x / sqrt(sum x^2 + 1e-6)), decay = exp(-exp(a_log) softplus(a + dt_bias)) and beta = sigmoid(b):
      S = decay S;  S += beta (v - S k) k^T;  out = S q / sqrt(K);  states[write_slots[t]] = S
    Returns [T, H, V] in qkv.dtype, contiguous; rows before cu_q_lens[0] and from cu_q_lens[S] on are zero, and write
    nothing. All in fp32 but what goes out; kernels may round to qkv.dtype what goes into a product, as tensor cores
    take it, and are judged by that (cases.py, near).
    """
    _, num_heads, value_dim, key_dim = states.shape
    q, k, v = split_heads(qkv, num_heads, value_dim, key_dim)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_zeros(v.shape)
    group = num_heads // k.shape[1]
    bounds, kept = cu_q_lens.tolist(), write_slots.tolist()
    for seq, slot in enumerate(read_slots.tolist()):
        begin, end = bounds[seq], bounds[seq + 1]
        state = (states[slot] if slot >= 0 else states.new_zeros(states.shape[1:])).to(wide)
        for row in range(begin, end):
            query, key = (unit(x[row].to(wide)).repeat_interleave(group, 0) for x in (q, k))
            decay, beta = gates(a[row].to(wide), b[row].to(wide), a_log.to(wide), dt_bias.to(wide))
            state, mixed = delta(state, query, key, v[row].to(wide), decay, beta)
            out[row] = mixed.to(out.dtype)
            if kept[row] >= 0:
                states[kept[row]] = state.to(states.dtype)
    return out


def split_heads(qkv: Tensor, num_heads: int, value_dim: int, key_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [T, 2 J K + H V] as views [T, J, K], [T, J, K], [T, H, V]."""
    values = num_heads * value_dim
    keys = (qkv.shape[1] - values) // 2
    q, k, v = qkv.split([keys, keys, values], dim=-1)
    return q.unflatten(-1, (-1, key_dim)), k.unflatten(-1, (-1, key_dim)), v.unflatten(-1, (num_heads, value_dim))


def gates(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the state stays, and how much of the new value is written, [H] or [T, H], all fp32 or wider."""
    return (-a_log.exp() * torch.nn.functional.softplus(a + dt_bias)).exp(), b.sigmoid()


def unit(x: Tensor) -> Tensor:
    """Unit vectors of the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of all heads: the state after it, and what it reads. state [H, V, K]; query and key [H, K] are units.

    Products and sums, no matrix product of a library, so that a head's bits depend on nothing else.
    """
    state = state * decay[:, None, None]
    seen = (state * key[:, None, :]).sum(-1)
    state = state + (beta[:, None] * (value - seen))[:, :, None] * key[:, None, :]
    return state, (state * query[:, None, :]).sum(-1) * key.shape[-1] ** -0.5
