"""Chunks of 64 rows as matrix products (arXiv:2406.06484, arXiv:2412.06464): four kernels. NOTES.md derives them.

Two take all chunks of all heads at once, and make what does not depend on the state. The third goes through a
sequence's chunks, each program with a slice of one head's state, transposed, in registers. The last makes the
states to keep after rows within chunks, of which there are few. Nothing is added up in an order that depends on other
sequences or on the machine, so bits depend only on where a sequence's chunks begin.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops.causal_conv.taps import FAR, seq_of
from nanodeploy.ops.gdn_scan.reference import CHUNK, gdn_scan
from nanodeploy.ops.gdn_scan.steps import log_decay, power_of_two, sigmoid, sizes_of
from nanodeploy.ops.registry import Aot

# What the first kernel says of a chunk's rows, fp32.
SEEN = tl.constexpr(0)  # the decay since the chunk's beginning
ADDED = tl.constexpr(1)  # the decay until the chunk's end
LOGS = tl.constexpr(2)  # the binary logarithm of SEEN
FACTORS = tl.constexpr(3)
LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """How the third kernel is cut, which is the one that takes the time; bits do not depend on it."""

    values: int  # of a head's, to a program
    warps: int
    stages: int = 2


FEW = Config(64, 4)  # more programs, for few heads of few sequences
MANY = Config(128, 8)  # one program reads a chunk's keys and squares for all values
WITHIN_VALUES = 32
PREPARE_WARPS = 4


def config_for(num_seqs: int, num_heads: int, value_dim: int) -> Config:
    """FEW as long as programs of MANY would leave SMs of an H200 idle."""
    return FEW if value_dim < 128 or num_seqs * num_heads < 132 else MANY


@triton.jit
def _flip(x):
    """Each block of [blocks, n, n] transposed. Of an accumulator it is a right operand without moving a value."""
    return tl.permute(x.to(tl.float16), (0, 2, 1))


@triton.jit
def _block_inverses(x, x_t):
    """(1 + x)^-1 of strictly lower triangular blocks [4, 16, 16], by inverses of ever larger blocks on the diagonal:
    each pair of those, L and M with B between them, gives -M^-1 B L^-1 there. x_t are the transposes, whose inverses
    are made along: a product's right operand is the transpose of what the other made."""
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    apart = row ^ column
    one = tl.where(apart == 0, 1.0, 0.0)
    inverse, inverse_t = one - tl.where(apart == 1, x, 0.0), one - tl.where(apart == 1, x_t, 0.0)
    for level in tl.static_range(1, 4):
        size = 1 << level
        between = tl.where((apart >= size) & (apart < 2 * size), x, 0.0)
        half, half_t = inverse.to(tl.float16), inverse_t.to(tl.float16)
        product_t = tl.dot(half_t, _flip(between)).to(tl.float16)
        inverse -= tl.dot(half, _flip(product_t))
        inverse_t -= tl.dot(product_t, _flip(half))
    return inverse


@triton.jit
def _inverse(x, alike, logs, beta):
    """(1 + x)^-1 of the part below the diagonal of a lower triangular [64, 64],
    x [i, j] = alike [i, j] beta [i] exp2(logs [i] - logs [j]).

    Its entries are at most 1 (what a row adds to a state only makes it smaller), so that products of fp16 have enough
    digits, and blocks on the diagonal keep what they cancel apart, as in substitution."""
    row, column = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    block_row, block_column = tl.arange(0, 4)[:, None, None, None], tl.arange(0, 4)[None, None, :, None]
    diagonal = tl.sum(tl.where(block_row == block_column, alike.reshape((4, 16, 4, 16)), 0.0), 2)
    logs, beta = logs.reshape((4, 16)), beta.reshape((4, 16))
    off = tl.exp2(-tl.abs(logs[:, :, None] - logs[:, None, :])) * diagonal
    lower = tl.where(row > column, off * beta[:, :, None], 0.0)
    upper = tl.where(row < column, off * beta[:, None, :], 0.0)
    blocks = _block_inverses(lower, upper).reshape((4, 16, 1, 16))
    inverse = tl.where(block_row == block_column, blocks, 0.0).reshape((64, 64))
    row, column = tl.arange(0, 64)[:, None], tl.arange(0, 64)[None, :]
    for level in tl.static_range(4, 6):
        apart = (row >> level) ^ (column >> level)
        half = inverse.to(tl.float16)
        between = tl.dot(tl.where(apart == 1, x, 0.0).to(tl.float16), half)
        inverse = tl.dot(-half, between.to(tl.float16), inverse)
    return inverse


@triton.jit(do_not_specialize=["num_tokens", "num_seqs"], do_not_specialize_on_alignment=["cu_q_lens", "write_slots"])
def _units(
    qkv, cu_q_lens, write_slots, queries, keys, inner, out, num_tokens, num_seqs, scale, stride_qkv,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (key head, chunk): its queries and keys as units, rows after the end as zeros; clears rows that are
    nobody's; counts rows within the chunk after which the state is kept."""
    key_head, chunk = tl.program_id(0), tl.program_id(1)
    seq, begin, place = seq_of(chunk, cu_q_lens, num_seqs, CHUNK)
    end = tl.load(cu_q_lens + seq + 1, mask=seq < num_seqs, other=num_tokens)
    begin += place * CHUNK
    mine = (seq >= 0) & (seq < num_seqs)
    lanes = tl.arange(0, CHUNK)
    live = begin + lanes < end
    at = (begin + lanes).to(tl.int64)
    if key_head == 0:
        within = mine & (lanes < CHUNK - 1) & (begin + lanes < end - 1)
        marked = tl.load(write_slots + begin + lanes, mask=within, other=-1) >= 0
        tl.store(inner + chunk, tl.sum(marked.to(tl.int32), 0))
    if begin < end:
        if mine:
            dims = tl.arange(0, KEY_DIM)[None, :]
            to = (chunk.to(tl.int64) * KEY_HEADS + key_head) * (CHUNK * KEY_DIM) + lanes[:, None] * KEY_DIM + dims
            head_at = qkv + at[:, None] * stride_qkv + key_head * KEY_DIM + dims
            query = tl.load(head_at, mask=live[:, None], other=0.0).to(tl.float32)
            query = query * (tl.rsqrt(tl.sum(query * query, 1) + 1e-6) * scale)[:, None]
            tl.store(queries + to, query.to(queries.dtype.element_ty))
            key = tl.load(head_at + KEY_HEADS * KEY_DIM, mask=live[:, None], other=0.0).to(tl.float32)
            key = key * tl.rsqrt(tl.sum(key * key, 1) + 1e-6)[:, None]
            tl.store(keys + to, key.to(keys.dtype.element_ty))
        else:
            GROUP: tl.constexpr = HEADS // KEY_HEADS
            for i in range(GROUP):
                to = out + (at * (HEADS * VALUE_DIM) + (key_head * GROUP + i) * VALUE_DIM)[:, None]
                zeros = tl.zeros((CHUNK, VALUE_DIM), out.dtype.element_ty)
                tl.store(to + tl.arange(0, VALUE_DIM)[None, :], zeros, mask=live[:, None])


@triton.jit(do_not_specialize=["num_seqs"], do_not_specialize_on_alignment=["cu_q_lens", "a", "b"])
def _prepare(
    a, b, a_log, dt_bias, cu_q_lens, queries, keys, inverses, mixings, factors, num_seqs, stride_a, stride_b,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (value head, chunk): (1 + A)^-1 diag(beta), where A [i, j] is how much row i sees of what row j adds; how
    much row i reads of what row j adds; and factors."""
    head, chunk = tl.program_id(0), tl.program_id(1)
    seq, begin, place = seq_of(chunk, cu_q_lens, num_seqs, CHUNK)
    end = tl.load(cu_q_lens + seq + 1, mask=seq < num_seqs, other=0)
    begin += place * CHUNK
    if (seq >= 0) & (begin < end):
        lanes = tl.arange(0, CHUNK)
        row, column = lanes[:, None], lanes[None, :]
        live = begin + lanes < end
        at = (begin + lanes).to(tl.int64)
        key_item = (chunk.to(tl.int64) * KEY_HEADS + head // (HEADS // KEY_HEADS)) * (CHUNK * KEY_DIM)
        tile = lanes[:, None] * KEY_DIM + tl.arange(0, KEY_DIM)[None, :]
        key = tl.load(keys + key_item + tile)
        query = tl.load(queries + key_item + tile)
        logs = log_decay(
            tl.load(a + at * stride_a + head, mask=live, other=0.0), tl.load(a_log + head), tl.load(dt_bias + head)
        )
        logs = tl.where(live, logs * LOG2_E, 0.0)
        beta = tl.where(live, sigmoid(tl.load(b + at * stride_b + head, mask=live, other=0.0).to(tl.float32)), 0.0)
        since = tl.cumsum(logs, 0)
        item = chunk.to(tl.int64) * HEADS + head
        factor = factors + item * (FACTORS * CHUNK) + lanes
        tl.store(factor + SEEN * CHUNK, tl.exp2(since))
        tl.store(factor + ADDED * CHUNK, tl.exp2(tl.minimum(tl.sum(logs, 0) - since, 0.0)))
        tl.store(factor + LOGS * CHUNK, since)
        decay = tl.exp2(tl.where(row >= column, since[:, None] - since[None, :], float("-inf")))
        square = item * (CHUNK * CHUNK) + row * CHUNK + column
        reads = tl.dot(query, tl.trans(key)) * decay
        tl.store(mixings + square, reads.to(mixings.dtype.element_ty))
        alike = tl.dot(key, tl.trans(key))
        inverse = _inverse(alike * decay * beta[:, None], alike, since, beta)
        tl.store(inverses + square, (inverse * beta[None, :]).to(inverses.dtype.element_ty))


@triton.jit
def _load_values(
    qkv, row, end, head, values, stride_qkv, FIRST: tl.constexpr, VALUE_DIM: tl.constexpr, CHUNK: tl.constexpr
):
    """A chunk's values, transposed, [values, rows]; after the end zeros."""
    lanes = tl.arange(0, CHUNK)[None, :]
    at = qkv + row.to(tl.int64) * stride_qkv + FIRST + head * VALUE_DIM
    return tl.load(at + lanes * stride_qkv + values[:, None], mask=lanes < end - row, other=0.0)


@triton.jit(do_not_specialize_on_alignment=["cu_q_lens", "read_slots", "write_slots"])
def _scan(
    qkv, states, cu_q_lens, read_slots, write_slots, queries, keys, inverses, mixings, factors, inner, out, stride_qkv,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Program (slice of values, head, sequence). Everything is transposed, [values, rows], so that the state, and what
    is made of it, is the left operand of each product, which tensor cores take from registers."""
    head, seq = tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(cu_q_lens + seq), tl.load(cu_q_lens + seq + 1)
    slot = tl.load(read_slots + seq).to(tl.int64)
    dtype = qkv.dtype.element_ty
    values = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    lanes, dims = tl.arange(0, CHUNK), tl.arange(0, KEY_DIM)
    part = head * (VALUE_DIM * KEY_DIM) + values[:, None] * KEY_DIM + dims[None, :]
    STRIDE_SLOT: tl.constexpr = HEADS * VALUE_DIM * KEY_DIM
    state = tl.load(states + slot * STRIDE_SLOT + part, mask=(slot >= 0) & (begin < end) & (part >= 0), other=0.0)
    state = state.to(tl.float32)
    tl.debug_barrier()  # warps may hold the same elements, and the slot may be the one written
    first_chunk = begin // CHUNK + seq + 1
    second = tl.arange(0, 2)[:, None]  # SEEN, ADDED
    square = lanes[:, None] * CHUNK + lanes[None, :]
    tile = lanes[:, None] * KEY_DIM + dims[None, :]
    out_part = lanes[None, :] * (HEADS * VALUE_DIM) + head * VALUE_DIM + values[:, None]
    for step in tl.range(0, tl.cdiv(end - begin, CHUNK), num_stages=STAGES):
        row = begin + step * CHUNK
        chunk = (first_chunk + step).to(tl.int64)
        item = chunk * HEADS + head
        key_item = (chunk * KEY_HEADS + head // (HEADS // KEY_HEADS)) * (CHUNK * KEY_DIM)
        key = tl.load(keys + key_item + tile)
        query = tl.load(queries + key_item + tile)
        inverse = tl.load(inverses + item * (CHUNK * CHUNK) + square)
        mixing = tl.load(mixings + item * (CHUNK * CHUNK) + square)
        factor = factors + item * (FACTORS * CHUNK)
        # Loaded apart they would be held by each thread, in sixteen registers apiece.
        both = tl.load(factor + second * CHUNK + lanes[None, :])
        seen_factor = tl.sum(tl.where(second == 0, both, 0.0), 0)[None, :]
        added_factor = tl.sum(tl.where(second == 1, both, 0.0), 0)[None, :]
        last = tl.minimum(row + CHUNK, end) - 1
        if tl.load(inner + chunk) > 0:
            for i in range(CHUNK - 1):
                inner_slot = tl.load(write_slots + row + i, mask=row + i < last, other=-1).to(tl.int64)
                if inner_slot >= 0:  # the state before the chunk, for the last kernel to go on from
                    tl.store(states + inner_slot * STRIDE_SLOT + part, state.to(states.dtype.element_ty))

        seen = tl.dot(state.to(dtype), tl.trans(key)) * seen_factor
        value = _load_values(qkv, row, end, head, values, stride_qkv, 2 * KEY_HEADS * KEY_DIM, VALUE_DIM, CHUNK)
        fresh = (value.to(tl.float32) - seen).to(dtype)
        read = tl.dot(state.to(dtype), tl.trans(query)) * seen_factor
        added = tl.dot(fresh, tl.trans(inverse))
        read = tl.dot(added.to(dtype), tl.trans(mixing), read)
        to = out + row.to(tl.int64) * (HEADS * VALUE_DIM) + out_part
        tl.store(to, read.to(dtype), mask=(lanes < end - row)[None, :])
        decay = tl.load(factor + (SEEN * CHUNK + CHUNK - 1))
        state = tl.dot((added * added_factor).to(dtype), key, state * decay)
        kept = tl.load(write_slots + last).to(tl.int64)
        if kept >= 0:
            tl.store(states + kept * STRIDE_SLOT + part, state.to(states.dtype.element_ty))


@triton.jit(do_not_specialize=["num_seqs", "num_chunks"], do_not_specialize_on_alignment=["cu_q_lens", "write_slots"])
def _within(
    qkv, states, cu_q_lens, write_slots, keys, inverses, factors, inner, num_seqs, num_chunks, stride_qkv,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Program (slice of values, head): the states after marked rows within chunks, whose slots hold the state before
    the chunk. All chunks are looked through; few have any."""
    head = tl.program_id(1)
    dtype = qkv.dtype.element_ty
    values = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    lanes, dims = tl.arange(0, CHUNK), tl.arange(0, KEY_DIM)
    part = head * (VALUE_DIM * KEY_DIM) + values[:, None] * KEY_DIM + dims[None, :]
    STRIDE_SLOT: tl.constexpr = HEADS * VALUE_DIM * KEY_DIM
    for first in range(0, num_chunks, 128):
        several = first + tl.arange(0, 128)
        marked = tl.load(inner + several, mask=several < num_chunks, other=0) > 0
        chunk = tl.min(tl.where(marked, several, FAR), 0)
        while chunk < FAR:
            seq, begin, place = seq_of(chunk, cu_q_lens, num_seqs, CHUNK)
            end = tl.load(cu_q_lens + seq + 1)
            row = begin + place * CHUNK
            key_item = (chunk.to(tl.int64) * KEY_HEADS + head // (HEADS // KEY_HEADS)) * (CHUNK * KEY_DIM)
            item = chunk.to(tl.int64) * HEADS + head
            key = tl.load(keys + key_item + lanes[:, None] * KEY_DIM + dims[None, :])
            inverse = tl.load(inverses + item * (CHUNK * CHUNK) + lanes[:, None] * CHUNK + lanes[None, :])
            value = _load_values(qkv, row, end, head, values, stride_qkv, 2 * KEY_HEADS * KEY_DIM, VALUE_DIM, CHUNK)
            factor = factors + item * (FACTORS * CHUNK)
            seen_factor = tl.load(factor + SEEN * CHUNK + lanes)[None, :]
            logs = tl.load(factor + LOGS * CHUNK + lanes)
            last = tl.minimum(row + CHUNK, end) - 1
            for i in range(CHUNK - 1):
                slot = tl.load(write_slots + row + i, mask=row + i < last, other=-1).to(tl.int64)
                if slot >= 0:
                    at = states + slot * STRIDE_SLOT + part
                    state = tl.load(at).to(tl.float32)
                    seen = tl.dot(state.to(dtype), tl.trans(key)) * seen_factor
                    added = tl.dot((value.to(tl.float32) - seen).to(dtype), tl.trans(inverse))
                    now = tl.load(factor + LOGS * CHUNK + i)
                    weight = tl.where(lanes <= i, tl.exp2(tl.minimum(now - logs, 0.0)), 0.0)[None, :]
                    state = tl.dot((added * weight).to(dtype), key, state * tl.exp2(now))
                    tl.store(at, state.to(states.dtype.element_ty))
            chunk = tl.min(tl.where(marked & (several > chunk), several, FAR), 0)


def launch(qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots, config: Config):
    """bench/sweeps/gdn.py calls this too."""
    num_tokens, num_seqs = qkv.shape[0], read_slots.shape[0]
    sizes = sizes_of(qkv, a, b, states)
    num_heads, value_dim = sizes["HEADS"], sizes["VALUE_DIM"]
    out = torch.empty((num_tokens, num_heads, value_dim), dtype=qkv.dtype, device=qkv.device)
    num_chunks = num_tokens // CHUNK + num_seqs + 2
    units = torch.empty(
        (2, num_chunks, sizes["KEY_HEADS"], CHUNK, sizes["KEY_DIM"]), dtype=qkv.dtype, device=qkv.device
    )
    squares = torch.empty((2, num_chunks, num_heads, CHUNK, CHUNK), dtype=qkv.dtype, device=qkv.device)
    factors = torch.empty((num_chunks, num_heads, FACTORS.value, CHUNK), dtype=torch.float32, device=qkv.device)
    inner = torch.empty(num_chunks, dtype=torch.int32, device=qkv.device)
    key_sizes = {"HEADS": num_heads, "KEY_HEADS": sizes["KEY_HEADS"], "KEY_DIM": sizes["KEY_DIM"], "CHUNK": CHUNK}
    _units[(sizes["KEY_HEADS"], num_chunks)](
        qkv, cu_q_lens, write_slots, *units, inner, out, num_tokens, num_seqs, sizes["KEY_DIM"] ** -0.5, qkv.stride(0),
        **sizes, CHUNK=CHUNK, num_warps=PREPARE_WARPS,
    )  # fmt: skip
    _prepare[(num_heads, num_chunks)](
        a, b, a_log, dt_bias, cu_q_lens, *units, *squares, factors, num_seqs, a.stride(0), b.stride(0), **key_sizes,
        num_warps=PREPARE_WARPS,
    )  # fmt: skip
    values = min(config.values, value_dim)
    _scan[(value_dim // values, num_heads, num_seqs)](
        qkv, states, cu_q_lens, read_slots, write_slots, *units, *squares, factors, inner, out, qkv.stride(0), **sizes,
        VALUES=values, CHUNK=CHUNK, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    values = min(WITHIN_VALUES, value_dim)
    _within[(value_dim // values, num_heads)](
        qkv, states, cu_q_lens, write_slots, units[1], squares[0], factors, inner, num_seqs, num_chunks,
        qkv.stride(0), **sizes, VALUES=values, CHUNK=CHUNK, num_warps=PREPARE_WARPS,
    )  # fmt: skip
    return out


def aot(config: Config, num_heads: int, num_key_heads: int = 16) -> list[Aot]:
    """Both kernels, to compile offline."""
    whole = dict.fromkeys(("qkv", "a", "b", "queries", "keys", "inverses", "mixings", "out"), "*bf16")
    whole |= dict.fromkeys(("a_log", "dt_bias", "states", "factors"), "*fp32")
    whole |= dict.fromkeys(("cu_q_lens", "read_slots", "write_slots", "inner"), "*i32")
    whole |= dict.fromkeys(("num_tokens", "num_seqs", "num_chunks", "stride_qkv", "stride_a", "stride_b"), "i32") | {
        "scale": "fp32"
    }
    odd = ("a", "b", "cu_q_lens", "read_slots", "write_slots", "num_tokens", "num_seqs", "num_chunks", "scale")
    sizes = {"HEADS": num_heads, "KEY_HEADS": num_key_heads, "KEY_DIM": 128, "VALUE_DIM": 128, "CHUNK": CHUNK}

    def one(fn, constexprs, num_warps, wants):
        signature = {name: kind for name, kind in whole.items() if name in fn.arg_names}
        divisible = tuple(name for name in signature if name not in odd)
        constants = {n: v for n, v in (sizes | constexprs).items() if n in fn.arg_names}
        return Aot(fn, signature, constants, num_warps=num_warps, divisible=divisible, wants=wants)

    return [
        one(_units, {}, PREPARE_WARPS, ()),
        one(_prepare, {}, PREPARE_WARPS, ("wgmma",)),
        one(_scan, {"VALUES": config.values, "STAGES": config.stages}, config.warps, ("wgmma", "cp.async")),
        one(_within, {"VALUES": WITHIN_VALUES}, PREPARE_WARPS, ()),
    ]


def _takes(case) -> bool:
    dims = power_of_two(case.key_dim) and power_of_two(case.value_dim) and case.key_dim <= 128
    return dims and case.dtype in (torch.bfloat16, torch.float16)


@gdn_scan.kernel(
    needs="sm80", when=_takes, batch_invariant=True, aot=lambda: aot(FEW, num_heads=32) + aot(MANY, num_heads=64)
)
def chunks(qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots):
    config = config_for(read_slots.shape[0], *states.shape[1:3])
    return launch(qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots, config)
