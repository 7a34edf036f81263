"""Token by token, each program one sequence, head and slice of its values: for fp32, and for rows too few for chunks.

Everything is fp32. No matrix product: what a state has seen is a sum along its rows (Triton's reductions).
"""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.gdn_scan.reference import gdn_scan
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

VALUES = 32  # of a program
NUM_WARPS = 4


@triton.jit
def log_decay(a, a_log, dt_bias):
    """-exp(a_log) softplus(a + dt_bias), fp32."""
    x = a.to(tl.float32) + dt_bias
    e = tl.exp(-tl.abs(x))
    # log(1 + e), where that sum would drop digits of e by its series
    near_zero = e * (1 - e * (0.5 - e * (0.33333334 - e * 0.25)))
    return -tl.exp(a_log) * (tl.maximum(x, 0.0) + tl.where(e < 0.03, near_zero, tl.log(1 + e)))


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def places(values, KEY_DIM: tl.constexpr):
    """Offsets of some values' rows in a head's state, [values, KEY_DIM / 32, 32].

    So shaped, eight lanes share 32 keys of a row and a thread has the same keys of a few rows: sums along keys take
    three shuffles, and few registers hold what goes with a row.
    """
    WIDTH: tl.constexpr = 32 if KEY_DIM > 32 else KEY_DIM
    block = tl.arange(0, KEY_DIM // WIDTH) * WIDTH
    return values[:, None, None] * KEY_DIM + block[None, :, None] + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def delta(state, query, key, value, decay, beta):
    """One token: (the state after it, what it reads [V], not yet over sqrt(K)). State as `places` has it, query and key
    [K] as they come.

    Both sums are over the state as it was: S' q = decay S q + u (k q), where u k^T is what the token adds.
    """
    query = query * tl.rsqrt(tl.sum(query * query, 0) + 1e-6)
    key = key * tl.rsqrt(tl.sum(key * key, 0) + 1e-6)
    both = tl.sum(query * key, 0)
    query = query.reshape((state.shape[1], state.shape[2]))[None, :, :]
    key = key.reshape((state.shape[1], state.shape[2]))[None, :, :]
    seen = decay * tl.sum(tl.sum(state * key, 1), 1)
    read = decay * tl.sum(tl.sum(state * query, 1), 1)
    added = beta * (value - seen)
    return state * decay + added[:, None, None] * key, read + added * both


@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs"],
    do_not_specialize_on_alignment=["cu_q_lens", "read_slots", "write_slots"],
)
def _steps(
    qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots, out, num_tokens, num_seqs, scale,
    stride_qkv, stride_a, stride_b,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, VALUES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (slice of values, head, sequence); of one sequence too many, which clears the rows that are nobody's."""
    go(PDL)
    head, seq = tl.program_id(1), tl.program_id(2)
    values = tl.program_id(0) * VALUES + tl.arange(0, VALUES)
    keys = tl.arange(0, KEY_DIM)
    rate, bias = tl.load(a_log + head), tl.load(dt_bias + head)
    wait(PDL)
    to = out + head * VALUE_DIM + values
    if seq == num_seqs:
        begin, end = tl.load(cu_q_lens), tl.load(cu_q_lens + num_seqs)
        for i in range(begin + num_tokens - end):
            row = tl.where(i < begin, begin * 0, end - begin) + i
            tl.store(to + row.to(tl.int64) * (HEADS * VALUE_DIM), tl.zeros((VALUES,), out.dtype.element_ty))
    else:
        begin, end = tl.load(cu_q_lens + seq), tl.load(cu_q_lens + seq + 1)
        slot = tl.load(read_slots + seq).to(tl.int64)
        part = head * VALUE_DIM * KEY_DIM + places(values, KEY_DIM)
        stride_slot: tl.constexpr = HEADS * VALUE_DIM * KEY_DIM
        known = (slot >= 0) & (begin < end) & (part >= 0)
        state = tl.load(states + slot * stride_slot + part, mask=known, other=0.0).to(tl.float32)
        tl.debug_barrier()  # warps may hold the same elements, and the slot may be the one written
        key_at = head // (HEADS // KEY_HEADS) * KEY_DIM + keys
        value_at = 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + values
        for i in range(end - begin):
            at = (begin + i).to(tl.int64)
            query = tl.load(qkv + at * stride_qkv + key_at).to(tl.float32)
            key = tl.load(qkv + at * stride_qkv + KEY_HEADS * KEY_DIM + key_at).to(tl.float32)
            value = tl.load(qkv + at * stride_qkv + value_at).to(tl.float32)
            decay = tl.exp(log_decay(tl.load(a + at * stride_a + head), rate, bias))
            beta = sigmoid(tl.load(b + at * stride_b + head).to(tl.float32))
            state, read = delta(state, query, key, value, decay, beta)
            tl.store(to + at * (HEADS * VALUE_DIM), (read * scale).to(out.dtype.element_ty))
            kept = tl.load(write_slots + at).to(tl.int64)
            if kept >= 0:
                tl.store(states + kept * stride_slot + part, state.to(states.dtype.element_ty))


def power_of_two(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def _aot():
    pointers = dict.fromkeys(("qkv", "a", "b", "out"), "*bf16")
    pointers |= dict.fromkeys(("a_log", "dt_bias", "states"), "*fp32")
    pointers |= dict.fromkeys(("cu_q_lens", "read_slots", "write_slots"), "*i32")
    names = "num_tokens", "num_seqs", "stride_qkv", "stride_a", "stride_b"
    signature = pointers | dict.fromkeys(names, "i32") | {"scale": "fp32"}
    constexprs = {"HEADS": 32, "KEY_HEADS": 16, "KEY_DIM": 128, "VALUE_DIM": 128, "VALUES": VALUES, "PDL": True}
    divisible = "qkv", "a", "b", "out", "states", "stride_qkv"
    return [Aot(_steps, signature, constexprs, num_warps=NUM_WARPS, divisible=divisible)]


@gdn_scan.kernel(
    needs="sm80",
    when=lambda case: power_of_two(case.key_dim) and power_of_two(case.value_dim),
    batch_invariant=True,
    aot=_aot,
)
def steps(qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots):
    num_tokens, num_seqs = qkv.shape[0], read_slots.shape[0]
    sizes = sizes_of(qkv, a, b, states)
    values = min(VALUES, sizes["VALUE_DIM"])
    out = torch.empty((num_tokens, *states.shape[1:3]), dtype=qkv.dtype, device=qkv.device)
    _steps[(sizes["VALUE_DIM"] // values, sizes["HEADS"], num_seqs + 1)](
        qkv, a, b, a_log, dt_bias, states, cu_q_lens, read_slots, write_slots, out, num_tokens, num_seqs,
        sizes["KEY_DIM"] ** -0.5, qkv.stride(0), a.stride(0), b.stride(0), **sizes, VALUES=values,
        num_warps=NUM_WARPS, **overlap.launch(),
    )  # fmt: skip
    return out


def sizes_of(qkv, a, b, states) -> dict[str, int]:
    """The kernels' constants, and a check of what they take for granted of strides."""
    _, num_heads, value_dim, key_dim = states.shape
    assert states.is_contiguous() and qkv.stride(1) == 1 and ((a.stride(1) == 1 and b.stride(1) == 1) or num_heads == 1)
    key_heads = (qkv.shape[1] - num_heads * value_dim) // (2 * key_dim)
    return {"HEADS": num_heads, "KEY_HEADS": key_heads, "KEY_DIM": key_dim, "VALUE_DIM": value_dim}
