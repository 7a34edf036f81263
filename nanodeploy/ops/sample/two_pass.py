"""Two launches, no sort. The second looks only where the first saw that a kept token can be.

`_survey`, one program per row and chunk of 4096 tokens: a row without filters gets the chunk's best perturbed logit
(its largest, if greedy). A filtered row gets the largest logit and the sum of exponentials of every 64 tokens (a
group). `_finish`, one program per row: without filters, the best of the chunks. With filters, the group maxima bound
the answer: the k-th largest of them is at most the k-th largest logit, and the groups' sums say below which logit less
than 1 - top_p of the mass can lie. Only groups whose maximum reaches that bound can hold a kept token; in these, the
exact threshold is found by bisection on the integers that order as the logits do, and the best perturbed logit above
it wins. Counts and masses are integers (a probability in units of 2^-44 of the likeliest), so their sums have no order.
All tiles are fixed, so a row's bits depend on nothing else in the batch.
"""

import torch
import triton
import triton.language as tl

from nanodeploy.config import triton_interpret
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.sample.reference import LARGEST, MIN_TEMPERATURE, sample

CHUNK = 4096  # tokens per program of the first pass
GROUP = 64  # tokens under one maximum
TILE = 64  # groups that the second pass holds in registers
SHIFTS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}  # fp32 bits that the dtype never sets

_LARGEST = tl.constexpr(LARGEST)
_MIN_TEMPERATURE = tl.constexpr(MIN_TEMPERATURE)
_NO_TOKEN = tl.constexpr(2**31 - 1)
_LOWEST = tl.constexpr(-0x7F800001)  # _order(-inf, 0)
_UNIT = tl.constexpr(2.0**44)  # 2^18 tokens of mass 1 stay below 2^63


@triton.jit
def _clean(x):
    """fp32; NaN becomes -inf, +inf the largest float, -0 becomes 0."""
    x = x.to(tl.float32)
    x = tl.where(x == x, tl.minimum(x, _LARGEST), float("-inf"))
    return tl.where(x == 0.0, 0.0, x)


@triton.jit
def _order(x, SHIFT: tl.constexpr):
    """Integers that order as the fp32 values do. SHIFT drops the bits that the logits' own dtype never sets."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _uniform(seed, position, blocks):
    """The four numbers u of each Philox block, [*blocks.shape, 2, 2]; `gumbel` in reference.py defines them.

    Written out, not tl.philox: a product of 64 bits is one instruction, its two halves by themselves are two.
    """
    wide = tl.zeros_like(blocks).to(tl.uint64)
    a, b = blocks.to(tl.uint32), wide.to(tl.uint32)
    c, d = (position.to(tl.uint64) + wide).to(tl.uint32), ((position >> 32).to(tl.uint64) + wide).to(tl.uint32)
    k, l = seed.to(tl.uint64).to(tl.uint32), (seed >> 32).to(tl.uint64).to(tl.uint32)
    for _ in tl.static_range(10):
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, b, c, d = (
            (second >> 32).to(tl.uint32) ^ b ^ k,
            second.to(tl.uint32),
            (first >> 32).to(tl.uint32) ^ d ^ l,
            first.to(tl.uint32),
        )
        k, l = (k.to(tl.uint64) + 0x9E3779B9).to(tl.uint32), (l.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    r = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.minimum((r.to(tl.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)


@triton.jit
def _gumbel(u):
    """The noise -log(-log(1 - u)). The inner logarithm is a series near 0, where 1 - u would lose the digits that
    matter."""
    series = 1 / 8
    for n in tl.static_range(7, 0, -1):
        series = series * u + 1 / n
    return -tl.log(tl.where(u < 0.125, series * u, -tl.log(1 - u)))


@triton.jit
def _bound(u, INTERPRETED: tl.constexpr):
    """A little more than the noise: the inner logarithm's series cut short, the outer one the hardware's."""
    short = u * (1 + u * (1 / 2 + u * (1 / 3)))
    if INTERPRETED:
        log2 = tl.log2(short)
    else:
        log2 = tl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [short], tl.float32, True, 1)
    return log2 * -0.6931471805599453


@triton.jit
def _exact(x, token, t, seed, position):
    """The score of one token with logit x."""
    four = tl.reshape(_uniform(seed, position, token // 4 + tl.zeros((1,), tl.int32)), (4,))
    u = tl.sum(tl.where(tl.arange(0, 4) == token % 4, four, 0.0), axis=0)
    return x * (1 / t) + _gumbel(u)


@triton.jit
def _filtered(t, k, p, floor, vocab_size):
    return (t >= _MIN_TEMPERATURE) & (((k > 0) & (k < vocab_size)) | (p < 1) | (floor > 0))


@triton.jit
def _survey(
    logits, temperature, top_k, top_p, min_p, seeds, positions, chunk_best, chunk_token, group_max, group_sum,
    stride, vocab_size, num_chunks,
    CHUNK: tl.constexpr, GROUP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _clean(tl.load(logits + row * stride + tokens, mask=tokens < vocab_size, other=float("-inf")))
    t = tl.load(temperature + row)
    if _filtered(t, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), vocab_size):
        groups = (row * num_chunks + chunk) * (CHUNK // GROUP) + tl.arange(0, CHUNK // GROUP)
        grouped = tl.reshape(x, (CHUNK // GROUP, GROUP))
        largest = tl.max(grouped, axis=1)
        safe = tl.where(largest == float("-inf"), 0.0, largest)
        tl.store(group_max + groups, largest)
        tl.store(group_sum + groups, tl.sum(tl.exp((grouped - safe[:, None]) * (1 / t)), axis=1))
    else:
        if t >= _MIN_TEMPERATURE:
            # The true noise costs several times its bound: it is worked out for the token with the best bound only,
            # and for all of them in the rare chunk where another bound comes near that token's score.
            seed, position = tl.load(seeds + row), tl.load(positions + row)
            blocks = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
            u = tl.reshape(_uniform(seed, position, blocks), (CHUNK,))
            bound = x * (1 / t) + _bound(u, INTERPRETED)
            bound = tl.where(x == float("-inf"), float("-inf"), bound)
            _, at = tl.max(bound, axis=0, return_indices=True)
            token = chunk * CHUNK + at
            mine = _clean(tl.load(logits + row * stride + token, mask=token < vocab_size, other=float("-inf")))
            best = _exact(mine, token, t, seed, position)
            rival = tl.max(tl.where(tokens == token, float("-inf"), bound), axis=0)
            if (rival > float("-inf")) & (rival + 1e-5 * (64 + tl.abs(rival)) >= best):
                score = x * (1 / t) + _gumbel(u)
                best = tl.max(score, axis=0)
                token = tl.min(tl.where(score == best, tokens, _NO_TOKEN), axis=0)
        else:
            best = tl.max(x, axis=0)
            token = tl.min(tl.where(x == best, tokens, _NO_TOKEN), axis=0)
        tl.store(chunk_best + row * num_chunks + chunk, best)
        tl.store(chunk_token + row * num_chunks + chunk, token)


@triton.jit
def _tile(logits, groups, index, num_groups, vocab_size, GROUP: tl.constexpr, TILE: tl.constexpr):
    """Tile number `index` of the listed groups: (their numbers [TILE], token ids and logits [TILE, GROUP])."""
    at = index * TILE + tl.arange(0, TILE)
    group = tl.load(groups + at, mask=at < num_groups, other=0)
    tokens = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = (at < num_groups)[:, None] & (tokens < vocab_size)
    return group, tokens, _clean(tl.load(logits + tokens, mask=there, other=float("-inf")))


@triton.jit
def _mass(x, top, t):
    """exp((x - top) / t) in units of 2^-44, integer."""
    return (tl.exp((x - top) / t) * _UNIT).to(tl.int64)


@triton.jit
def _best(x, tokens, group, least, floor, top, t, seed, position, SHIFT: tl.constexpr, GROUP: tl.constexpr):
    """The best perturbed logit of a tile that passes the filters, and its token."""
    blocks = group[:, None] * (GROUP // 4) + tl.arange(0, GROUP // 4)[None, :]
    noise = _gumbel(tl.reshape(_uniform(seed, position, blocks), x.shape))
    kept = (_order(x, SHIFT) >= least) & ((x - top) / t >= floor)
    score = tl.where(kept, x / t + noise, float("-inf"))
    best = tl.max(score)
    return best, tl.min(tl.where(score == best, tokens, _NO_TOKEN))


@triton.jit
def _finish(
    logits, temperature, top_k, top_p, min_p, seeds, positions, chunk_best, chunk_token, group_max, group_sum,
    candidates, out, stride, vocab_size, num_chunks,
    GROUP: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, CHUNKS: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, k, p, floor = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    if not _filtered(t, k, p, floor, vocab_size):
        chunks = tl.arange(0, CHUNKS)
        there = chunks < num_chunks
        scores = tl.load(chunk_best + row * num_chunks + chunks, mask=there, other=float("-inf"))
        winners = tl.load(chunk_token + row * num_chunks + chunks, mask=there, other=_NO_TOKEN)
        winner = tl.min(tl.where(scores == tl.max(scores, axis=0), winners, _NO_TOKEN), axis=0)
        tl.store(out + row, winner.to(tl.int64))
    else:
        GROUPS: tl.constexpr = CHUNKS * (CHUNK // GROUP)
        COARSE: tl.constexpr = 16  # bits that bounds leave open
        num_groups = num_chunks * (CHUNK // GROUP)
        limited = (k > 0) & (k < vocab_size)
        floor = tl.where(floor > 0, tl.log(tl.maximum(floor, 2.0**-126)), float("-inf"))
        at = tl.arange(0, GROUPS)
        largest = tl.load(group_max + row * num_groups + at, mask=at < num_groups, other=float("-inf"))
        top = tl.max(largest, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)

        # A bound on the threshold, as an integer with its last 16 bits open: every kept token reaches it.
        coarse = _order(largest, COARSE)
        ceiling = tl.max(coarse, axis=0)
        bound = tl.min(coarse, axis=0)
        reach = tl.exp((largest - top) / t)  # the likeliest token of each group; the likeliest of all is 1
        mass = tl.load(group_sum + row * num_groups + at, mask=at < num_groups, other=0.0) * reach
        total = tl.sum(mass.to(tl.float64), axis=0)
        if limited:
            high = ceiling
            while bound < high:
                middle = bound + (high - bound + 1) // 2
                enough = tl.sum((coarse >= middle).to(tl.int32), axis=0) >= k
                bound = tl.where(enough, middle, bound)
                high = tl.where(enough, high, middle - 1)
        elif p < 1:
            # What may lie below a bound: all of a group under it; of another, no more than 63 tokens just below it.
            allowed = (1 - p) * total.to(tl.float32) * 0.999
            high = ceiling
            while bound < high:
                middle = bound + (high - bound + 1) // 2
                bits = middle << COARSE
                line = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
                inside = tl.minimum(mass - reach, (GROUP - 1) * tl.exp((line - top) / t))
                below = tl.sum(tl.where(coarse >= middle, inside, mass), axis=0)
                bound = tl.where(below <= allowed, middle, bound)
                high = tl.where(below <= allowed, high, middle - 1)
        if (floor > float("-inf")) & ((p >= 1) | (not limited)):
            line = top + floor * t
            line -= 1e-5 * (tl.abs(top) + tl.abs(floor * t))
            bound = tl.maximum(bound, tl.max(_order(line + tl.zeros((1,), tl.float32), COARSE), axis=0))

        reaching = (coarse >= bound) & (at < num_groups)
        num_reaching = tl.sum(reaching.to(tl.int32), axis=0)
        candidates += row * num_groups
        tl.store(candidates + tl.cumsum(reaching.to(tl.int32), axis=0) - 1, at, mask=reaching)
        tl.debug_barrier()  # other threads read the list
        logits += row * stride
        num_tiles = tl.cdiv(num_reaching, TILE)
        group, tokens, x = _tile(logits, candidates, 0, num_reaching, vocab_size, GROUP, TILE)
        order = _order(x, SHIFT)

        # The exact threshold, as an integer: `least` always keeps enough, anything above `high` does not.
        least = tl.maximum(bound.to(tl.int64) << COARSE, _LOWEST) >> SHIFT
        last = tl.max(_order(top + tl.zeros((1,), tl.float32), SHIFT), axis=0).to(tl.int64)
        if limited:
            high = last
            while least < high:
                middle = least + (high - least + 1) // 2
                count = tl.sum((order >= middle).to(tl.int32))
                for index in range(1, num_tiles):
                    _, _, more = _tile(logits, candidates, index, num_reaching, vocab_size, GROUP, TILE)
                    count += tl.sum((_order(more, SHIFT) >= middle).to(tl.int32))
                least = tl.where(count >= k, middle, least)
                high = tl.where(count >= k, high, middle - 1)
        if p < 1:
            weight = _mass(x, top, t)
            whole = total * _UNIT
            if limited:
                kept = tl.sum(tl.where(order >= least, weight, 0))
                for index in range(1, num_tiles):
                    _, _, more = _tile(logits, candidates, index, num_reaching, vocab_size, GROUP, TILE)
                    kept += tl.sum(tl.where(_order(more, SHIFT) >= least, _mass(more, top, t), 0))
                whole = kept.to(tl.float64)
            target = p.to(tl.float64) * whole
            high = last
            while least < high:
                middle = least + (high - least + 1) // 2
                kept = tl.sum(tl.where(order >= middle, weight, 0))
                for index in range(1, num_tiles):
                    _, _, more = _tile(logits, candidates, index, num_reaching, vocab_size, GROUP, TILE)
                    kept += tl.sum(tl.where(_order(more, SHIFT) >= middle, _mass(more, top, t), 0))
                enough = kept.to(tl.float64) >= target
                least = tl.where(enough, middle, least)
                high = tl.where(enough, high, middle - 1)

        seed, position = tl.load(seeds + row), tl.load(positions + row)
        best, token = _best(x, tokens, group, least, floor, top, t, seed, position, SHIFT, GROUP)
        for index in range(1, num_tiles):
            group, tokens, x = _tile(logits, candidates, index, num_reaching, vocab_size, GROUP, TILE)
            score, one = _best(x, tokens, group, least, floor, top, t, seed, position, SHIFT, GROUP)
            token = tl.where((score > best) | ((score == best) & (one < token)), one, token)
            best = tl.maximum(best, score)
        tl.store(out + row, token.to(tl.int64))


def _aot():
    tensors = {
        "logits": "*bf16", "temperature": "*fp32", "top_k": "*i32", "top_p": "*fp32", "min_p": "*fp32",
        "seeds": "*i64", "positions": "*i64", "chunk_best": "*fp32", "chunk_token": "*i32", "group_max": "*fp32",
        "group_sum": "*fp32",
    }  # fmt: skip
    sizes = {"stride": "i32", "vocab_size": "i32", "num_chunks": "i32"}
    for dtype, name in ((torch.bfloat16, "*bf16"), (torch.float16, "*fp16"), (torch.float32, "*fp32")):
        signature = tensors | {"logits": name}
        divisible = (*tensors, "stride", "vocab_size")
        yield Aot(
            _survey, signature | sizes, {"CHUNK": CHUNK, "GROUP": GROUP, "INTERPRETED": False},
            num_warps=8, divisible=divisible, wants=("ld.v4",),
        )  # fmt: skip
        yield Aot(
            _finish, signature | {"candidates": "*i32", "out": "*i64"} | sizes,
            {"GROUP": GROUP, "CHUNK": CHUNK, "TILE": TILE, "CHUNKS": 64, "SHIFT": SHIFTS[dtype]},
            num_warps=16, divisible=(*divisible, "candidates", "out"),
        )  # fmt: skip


@sample.kernel(
    needs="sm80", when=lambda case: case.dtype in SHIFTS and case.vocab_size <= 2**18, batch_invariant=True, aot=_aot
)
def two_pass(logits, temperature, top_k, top_p, min_p, seeds, positions):
    num_seqs, vocab_size = logits.shape
    assert vocab_size == 1 or logits.stride(1) == 1, "rows must be contiguous"
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    num_groups = num_chunks * (CHUNK // GROUP)

    def fresh(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    out = fresh(num_seqs, dtype=torch.int64)
    if num_seqs:
        chunks = fresh(num_seqs, num_chunks, dtype=torch.float32), fresh(num_seqs, num_chunks, dtype=torch.int32)
        groups = (fresh(num_seqs, num_groups, dtype=torch.float32) for _ in range(2))
        candidates = fresh(num_seqs, num_groups, dtype=torch.int32)
        rows = (logits, temperature, top_k, top_p, min_p, seeds, positions, *chunks, *groups)
        sizes = (logits.stride(0), vocab_size, num_chunks)
        _survey[(num_chunks, num_seqs)](
            *rows, *sizes, CHUNK=CHUNK, GROUP=GROUP, INTERPRETED=triton_interpret(), num_warps=8
        )
        _finish[(num_seqs,)](
            *rows, candidates, out, *sizes,
            GROUP=GROUP, CHUNK=CHUNK, TILE=TILE, CHUNKS=triton.next_power_of_2(num_chunks),
            SHIFT=SHIFTS[logits.dtype], num_warps=16,
        )  # fmt: skip
    return out
