"""A warp per row: its scores stay in registers, and every round takes the best that is left.

A score and its expert's id make one 64-bit key, so that a single reduction finds both and no two keys are equal.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.moe_route.reference import SCORINGS, TINY, moe_route
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.registry import Aot

MAX_EXPERTS = 512
MAX_TOP_K = 16
LOWEST = tl.constexpr(-(2**63))
SOFTMAX, SIGMOID = tl.constexpr(SCORINGS.index("softmax")), tl.constexpr(SCORINGS.index("sigmoid"))
_TINY = tl.constexpr(TINY)


@triton.jit
def _score(logits, highest, total, SCORING: tl.constexpr):
    """highest and total: of a softmax."""
    if SCORING == SOFTMAX:
        return tl.exp(logits - highest) / total
    elif SCORING == SIGMOID:
        return 1 / (1 + tl.exp(-logits))
    else:
        # softplus(x) = max(x, 0) + log1p(exp(-|x|)); log1p(e) = 2 atanh(e / (2 + e)), whose argument is at most 1/3.
        e = tl.exp(-tl.abs(logits))
        s = e / (2 + e)
        square = s * s
        series = tl.zeros_like(s)
        for i in tl.static_range(9):
            series = series * square + 1.0 / (17 - 2 * i)
        return tl.sqrt(tl.maximum(logits, 0.0) + 2 * s * series)


@triton.jit
def _key(values, ids):
    """Keys int64 that rise with the value and, among equal values, fall with the id."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (ids ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def _value(key):
    rising = (key >> 32).to(tl.int32)
    return (rising ^ ((rising >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _highest(values):
    return tl.max(tl.max(values, axis=1), axis=0)


@triton.jit
def _route(
    logits, bias, slots, ids, weights, stride_logits, scale,
    SCORING: tl.constexpr, TOP_K: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, SIZE: tl.constexpr,
    RENORMALISE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of SIZE experts, KEPT of which are kept. bias, slots: None if there are none."""
    go(PDL)
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_G)
    members = tl.arange(0, BLOCK_S)[None, :]
    experts = groups[:, None] * SIZE + members
    there = (groups < GROUPS)[:, None] & (members < SIZE)
    if bias is not None:
        shift = tl.load(bias + experts, mask=there, other=0.0)
    wait(PDL)
    mine = logits + row * stride_logits
    values = tl.load(mine + experts, mask=there, other=-float("inf"))
    highest, total = 0.0, 1.0
    if SCORING == SOFTMAX:
        highest = _highest(values)
        total = tl.sum(tl.sum(tl.exp(values - highest), axis=1), axis=0)
    choice = _score(values, highest, total, SCORING)
    if bias is not None:
        choice += shift
    broken = _highest((there & (choice != choice)).to(tl.int32)) > 0
    key = tl.where(there, _key(choice, experts), LOWEST)
    if GROUPS > 1:
        first = tl.max(key, axis=1)
        score = _value(first)
        if SIZE > 1:
            score += _value(tl.max(tl.where(key == first[:, None], LOWEST, key), axis=1))
        group_key = tl.where(groups < GROUPS, _key(score, groups), LOWEST)
        left = group_key
        for _ in tl.static_range(KEPT):
            best = tl.max(left, axis=0)
            left = tl.where(left == best, LOWEST, left)
        kept = (groups < GROUPS) & (left == LOWEST)
        key = tl.where(kept[:, None], key, LOWEST)
    places = tl.arange(0, BLOCK_K)
    chosen = places
    for place in tl.static_range(TOP_K):
        best = _highest(key)
        chosen = tl.where(places == place, (best & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF, chosen)
        key = tl.where(key == best, LOWEST, key)
    chosen = tl.where(broken, places, chosen)
    wanted = places < TOP_K
    weight = _score(tl.load(mine + chosen, mask=wanted, other=0.0), highest, total, SCORING)
    weight = tl.where(wanted, weight, 0.0)
    if RENORMALISE:
        weight = weight / (tl.sum(weight, axis=0) + _TINY)
    weight = tl.where(broken, float("nan"), weight * scale)
    if slots is not None:
        padding = tl.load(slots + row) < 0
        chosen = tl.where(padding, -1, chosen)
        weight = tl.where(padding, 0.0, weight)
    tl.store(ids + row * TOP_K + places, chosen, mask=wanted)
    tl.store(weights + row * TOP_K + places, weight, mask=wanted)


def _constexprs(
    scoring: str, num_experts: int, top_k: int, num_groups: int, top_groups: int, renormalise: bool
) -> dict[str, int]:
    size = num_experts // num_groups
    blocks = {"BLOCK_G": triton.next_power_of_2(num_groups), "BLOCK_S": triton.next_power_of_2(size)}
    shape = {"TOP_K": top_k, "GROUPS": num_groups, "KEPT": top_groups, "SIZE": size}
    how = {"SCORING": SCORINGS.index(scoring), "RENORMALISE": renormalise}
    return {**how, **shape, **blocks, "BLOCK_K": triton.next_power_of_2(top_k)}


def _aot():
    pointers = {"logits": "*fp32", "bias": "*fp32", "slots": "*i64", "ids": "*i32", "weights": "*fp32"}
    for scoring, num_experts, top_k, num_groups, top_groups in (
        ("softmax", 128, 8, 1, 1),
        ("sigmoid", 256, 8, 8, 4),
        ("sigmoid", 384, 8, 1, 1),
        ("sqrt_softplus", 256, 6, 1, 1),
        ("softmax", 512, 10, 1, 1),
    ):
        constexprs: dict[str, Any] = _constexprs(scoring, num_experts, top_k, num_groups, top_groups, True)
        constexprs["PDL"] = True
        signature = pointers | {"stride_logits": "i32", "scale": "fp32"}
        if scoring == "softmax":
            del signature["bias"]
            constexprs["bias"] = None
        divisible = tuple(name for name in signature if name != "scale")
        wants = ("griddepcontrol.wait", "shfl.sync")
        yield Aot(_route, signature, constexprs, num_warps=1, divisible=divisible, wants=wants)


def _takes(case) -> bool:
    return case.dtype == torch.float32 and case.num_experts <= MAX_EXPERTS and case.top_k <= MAX_TOP_K


@moe_route.kernel(needs="sm80", when=_takes, batch_invariant=True, aot=_aot)
def one_warp(logits, bias, slots, scoring, top_k, num_groups, top_groups, renormalise, scale):
    num_tokens, num_experts = logits.shape
    assert logits.stride(1) == 1 or num_experts == 1, "rows must be contiguous"
    ids = torch.empty((num_tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((num_tokens, top_k), dtype=torch.float32, device=logits.device)
    if num_tokens:
        _route[(num_tokens,)](
            logits, bias, slots, ids, weights, logits.stride(0), scale,
            **_constexprs(scoring, num_experts, top_k, num_groups, top_groups, renormalise),
            num_warps=1, **overlap.launch(),
        )  # fmt: skip
    return ids, weights
