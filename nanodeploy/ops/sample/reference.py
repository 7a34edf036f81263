import torch
from torch import Tensor

from nanodeploy.ops.registry import op

MIN_TEMPERATURE = 1e-5  # anything colder counts as 0: the largest logit
LARGEST = torch.finfo(torch.float32).max
WORD = 0xFFFFFFFF


@op(
    out=lambda logits, temperature, top_k, top_p, min_p, seeds, positions: logits.new_empty(
        logits.shape[0], dtype=torch.int64
    )
)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token id per row, by the Gumbel-max trick (arXiv:1411.0030, section 3): argmax(logit / temperature + noise).

    logits [S, V], rows may be strided; temperature, top_p, min_p [S] fp32; top_k [S] int32; seeds, positions [S]
    int64. Returns [S] int64. A temperature under 1e-5 takes the largest logit, the lowest id of equals. Otherwise the
    filters leave, in this order: the top_k likeliest (<= 0: off; ties with the k-th all stay); of these, renormalised,
    the smallest set of the likeliest whose mass reaches top_p (>= 1: off; ties with the last all stay); those with
    p >= min_p * p_max (<= 0: off). The noise of a token is a pure function of (seed, position, token id), see
    `gumbel`, so a row's token depends on nothing else in the batch. A logit of -inf or NaN is never chosen, +inf
    counts as the largest float; a row with nothing to choose gives 0. Computed in fp64.
    """
    x = torch.nan_to_num(logits.double(), nan=-torch.inf, posinf=LARGEST, neginf=-torch.inf)
    tokens = x.argmax(dim=-1)
    warm = (temperature >= MIN_TEMPERATURE).nonzero().squeeze(1)
    if len(warm):
        x, t = x[warm], temperature[warm].double()[:, None]
        kept = survivors(x, t, top_k[warm], top_p[warm], min_p[warm])
        score = x / t + gumbel(seeds[warm], positions[warm], x.shape[1])
        tokens[warm] = score.masked_fill(~kept, -torch.inf).argmax(dim=-1)
    return tokens


def survivors(x: Tensor, t: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens the filters leave, bool [S, V], for x [S, V] fp64 and t [S, 1] fp64."""
    vocab_size = x.shape[1]
    falling = x.sort(dim=-1, descending=True).values
    largest = falling[:, :1]
    k = torch.where(top_k > 0, top_k, vocab_size).clamp(max=vocab_size).long()[:, None]
    least = falling.gather(1, k - 1)
    mass = ((falling - largest) / t).exp() * (falling >= least)
    likelier = mass.cumsum(dim=-1) - mass
    p = top_p.double()[:, None]
    num_kept = ((likelier < p * mass.sum(dim=-1, keepdim=True)) | (p >= 1)).sum(dim=-1, keepdim=True).clamp(min=1)
    least = torch.maximum(least, falling.gather(1, num_kept - 1))
    return (x >= least) & ((x - largest) / t >= min_p.double().clamp(min=0)[:, None].log())


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The noise of every token, [S, V] fp64: a standard Gumbel variable from 32 random bits.

    Token i takes word i % 4 of the Philox block with counter (i // 4, 0, position low, position high) and key
    (seed low, seed high), 32 bits each. The word r becomes u = min((fp32(r) + 0.5) * 2^-32, 1 - 2^-24) in fp32, which
    is fine-grained near 0, where the winners are; the noise is -log(-log(1 - u)).
    """
    block = torch.arange(-(-vocab_size // 4), device=seeds.device)[None, :]
    zero = torch.zeros_like(block)
    lows, highs = zip(*((v[:, None] & WORD, v[:, None] >> 32 & WORD) for v in (positions, seeds)))
    words = philox((block, zero, lows[0], highs[0]), (lows[1], highs[1]))
    r = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    u = ((r.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -(-torch.log1p(-u.double())).log()


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al., SC11) on words held in int64: four counter words, two key words, four results."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The low 64 bits of an int64 product are the unsigned ones, whatever the sign says.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & WORD) ^ c1 ^ k0, b & WORD, (a >> 32 & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3
