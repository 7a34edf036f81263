"""One program a head of a sequence: its state comes into registers once, passes through the tokens, and goes out.

The tails of queries and keys are read by all programs of heads that share them, so the last of these to arrive writes
them anew: a counter, left zero, of each sequence and key head. Nobody waits.
"""

import functools

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.gdn_scan.steps import delta, log_decay, places, power_of_two, sigmoid, sizes_of
from nanodeploy.ops.gdn_step.reference import gdn_step
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

NUM_WARPS = 8
MAXNREG = 128  # of steps of one token: two programs fit an SM; more tokens would spill
COUNTERS = 2**16  # sequences times key heads of one launch


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def _window(qkv, tails, slot, seq, token, tokens, stride_qkv, CHANNELS: tl.constexpr, columns):
    """The four inputs up to a token of some channels, [channels, 4], the oldest first; of a new sequence zeros."""
    place = (token - 3 + tl.arange(0, 4))[None, :]
    new = tl.load(qkv + (seq.to(tl.int64) * tokens + place) * stride_qkv + columns[:, None], mask=place >= 0, other=0.0)
    at = tails + (slot * 3 + 3 + place) * CHANNELS + columns[:, None]
    old = tl.load(at, mask=(place < 0) & (slot >= 0), other=0.0)
    return tl.where(place >= 0, new, old)


@triton.jit
def _conv(weight, columns, window):
    """SiLU of the convolution, rounded as causal_conv rounds it, then fp32 again."""
    taps = tl.load(weight + columns[:, None] * 4 + tl.arange(0, 4)[None, :]).to(tl.float32)
    return _silu(tl.sum(taps * window.to(tl.float32), 1)).to(window.dtype).to(tl.float32)


@triton.jit
def _keep(tails, kept, CHANNELS: tl.constexpr, columns, window):
    """The last three of a window become the tail of slot `kept`."""
    row = (tl.arange(0, 4) - 1)[None, :]
    tl.store(tails + (kept * 3 + row) * CHANNELS + columns[:, None], window, mask=(row >= 0) & (columns >= 0)[:, None])


@triton.jit
def _keep_all(
    qkv, tails, write_slots, slot, seq, tokens, stride_qkv, CHANNELS: tl.constexpr, q_at, k_at, v_at,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Tails after the tokens that are kept, of values or (SHARED) of queries and keys: the slot that was read last."""
    for own in tl.static_range(2):
        for token in range(tokens):
            kept = tl.load(write_slots + seq * tokens + token).to(tl.int64)
            if (kept >= 0) & ((kept == slot) == (own == 1)):
                if SHARED:
                    q = _window(qkv, tails, slot, seq, token, tokens, stride_qkv, CHANNELS, q_at)
                    k = _window(qkv, tails, slot, seq, token, tokens, stride_qkv, CHANNELS, k_at)
                    tl.debug_barrier()  # warps may hold the same elements
                    _keep(tails, kept, CHANNELS, q_at, q)
                    _keep(tails, kept, CHANNELS, k_at, k)
                else:
                    v = _window(qkv, tails, slot, seq, token, tokens, stride_qkv, CHANNELS, v_at)
                    tl.debug_barrier()
                    _keep(tails, kept, CHANNELS, v_at, v)


@triton.jit(do_not_specialize_on_alignment=["read_slots", "write_slots", "a", "b"])
def _step(
    qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, out, arrived,
    tokens, scale, eps, stride_qkv, stride_z, stride_a, stride_b,
    HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (head, sequence). arrived int32 [S, KEY_HEADS], 0 before and after."""
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    CHANNELS: tl.constexpr = 2 * KEY_HEADS * KEY_DIM + HEADS * VALUE_DIM
    go(PDL)
    head, seq = tl.program_id(0), tl.program_id(1)
    key_head = head // GROUP
    keys, values = tl.arange(0, KEY_DIM), tl.arange(0, VALUE_DIM)
    q_at = key_head * KEY_DIM + keys
    k_at = KEY_HEADS * KEY_DIM + q_at
    v_at = 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + values
    rate, bias = tl.load(a_log + head), tl.load(dt_bias + head)
    norm = tl.load(norm_weight + values).to(tl.float32)
    wait(PDL)
    slot = tl.load(read_slots + seq).to(tl.int64)
    part = head * VALUE_DIM * KEY_DIM + places(values, KEY_DIM)
    state = tl.load(states + slot * (HEADS * VALUE_DIM * KEY_DIM) + part, mask=(slot >= 0) & (part >= 0), other=0.0)
    state = state.to(tl.float32)
    for token in range(tokens):
        row = seq.to(tl.int64) * tokens + token
        gate = tl.load(z + row * stride_z + head * VALUE_DIM + values).to(tl.float32)
        decay = tl.exp(log_decay(tl.load(a + row * stride_a + head), rate, bias))
        beta = sigmoid(tl.load(b + row * stride_b + head).to(tl.float32))
        kept = tl.load(write_slots + row).to(tl.int64)
        query = _conv(conv_weight, q_at, _window(qkv, tails, slot, seq, token, tokens, stride_qkv, CHANNELS, q_at))
        key = _conv(conv_weight, k_at, _window(qkv, tails, slot, seq, token, tokens, stride_qkv, CHANNELS, k_at))
        value = _conv(conv_weight, v_at, _window(qkv, tails, slot, seq, token, tokens, stride_qkv, CHANNELS, v_at))
        state, read = delta(state, query, key, value, decay, beta)
        tl.debug_barrier()  # warps may hold the same elements, and the slot may be the one that was read
        if kept >= 0:
            to = states + kept * (HEADS * VALUE_DIM * KEY_DIM) + part
            tl.store(to, state.to(states.dtype.element_ty))
        read = (read * scale).to(out.dtype.element_ty).to(tl.float32)  # as gdn_scan rounds it
        inverse = tl.rsqrt(tl.sum(read * read, 0) / VALUE_DIM + eps)
        result = read * inverse * norm * _silu(gate)
        tl.store(out + row * (HEADS * VALUE_DIM) + head * VALUE_DIM + values, result.to(out.dtype.element_ty))
    _keep_all(qkv, tails, write_slots, slot, seq, tokens, stride_qkv, CHANNELS, q_at, k_at, v_at, SHARED=False)
    last = True
    if GROUP > 1:
        counter = arrived + seq * KEY_HEADS + key_head
        last = tl.atomic_add(counter, 1, sem="acq_rel") == GROUP - 1
        if last:
            tl.store(counter, 0)
    if last:
        _keep_all(qkv, tails, write_slots, slot, seq, tokens, stride_qkv, CHANNELS, q_at, k_at, v_at, SHARED=True)


@functools.cache
def _arrived(device: torch.device) -> torch.Tensor:
    """Counters of programs that are done with a tail. Each launch leaves them at 0; launches run one by one."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


def _aot():
    pointers = dict.fromkeys(("qkv", "z", "a", "b", "conv_weight", "tails", "out"), "*bf16")
    pointers |= dict.fromkeys(("a_log", "dt_bias", "norm_weight", "states"), "*fp32")
    pointers |= dict.fromkeys(("read_slots", "write_slots", "arrived"), "*i32")
    strides = "stride_qkv", "stride_z", "stride_a", "stride_b"
    signature = pointers | dict.fromkeys(("scale", "eps"), "fp32") | dict.fromkeys(strides, "i32")
    divisible = (*(p for p in pointers if p not in ("a", "b", "read_slots", "write_slots")), *strides)
    for heads in (32, 64):
        sizes = {"HEADS": heads, "KEY_HEADS": 16, "KEY_DIM": 128, "VALUE_DIM": 128, "PDL": True}
        yield Aot(_step, signature | {"tokens": "i32"}, sizes, num_warps=NUM_WARPS, divisible=divisible)
        yield Aot(_step, signature, sizes | {"tokens": 1}, num_warps=NUM_WARPS, divisible=divisible, maxnreg=MAXNREG)


def _takes(case) -> bool:
    dims = power_of_two(case.key_dim) and power_of_two(case.value_dim) and case.key_dim * case.value_dim <= 2**14
    return dims and case.num_seqs * case.num_key_heads <= COUNTERS


@gdn_step.kernel(needs="sm80", when=_takes, batch_invariant=True, aot=lambda: list(_aot()))
def one_pass(qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, eps):
    return run(
        *(qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, eps),
        NUM_WARPS,
        MAXNREG if qkv.shape[0] == read_slots.shape[0] else None,
    )


def run(
    qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, eps, num_warps,
    maxnreg,
):  # fmt: skip
    """bench/sweeps/gdn.py calls this too."""
    rows, num_heads, value_dim = z.shape
    num_seqs = read_slots.shape[0]
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if num_seqs == 0:
        return out
    assert rows % num_seqs == 0 and conv_weight.shape[1] == 4 and conv_weight.is_contiguous() and tails.is_contiguous()
    assert z.stride(2) == 1 and (num_heads == 1 or z.stride(1) == value_dim), "a token's heads must be contiguous"
    _step[(num_heads, num_seqs)](
        qkv, z, a, b, conv_weight, a_log, dt_bias, norm_weight, tails, states, read_slots, write_slots, out,
        _arrived(z.device), rows // num_seqs, states.shape[3] ** -0.5, eps, qkv.stride(0), z.stride(0), a.stride(0),
        b.stride(0), **sizes_of(qkv, a, b, states), num_warps=num_warps, maxnreg=maxnreg, **overlap.launch(),
    )  # fmt: skip
    return out
