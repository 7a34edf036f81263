"""Each program plans some of the sequences: it counts the items of all that come before them, and writes its own."""

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.plan_decode import reference
from nanodeploy.ops.plan_decode.reference import extent, plan_decode
from nanodeploy.ops.registry import Aot

BLOCK_S, BLOCK_T = 32, 128  # sequences of one program, and how many it looks at at a time
CONSTANTS = {
    "MIN_SHARED": reference.MIN_SHARED,
    "FIELDS": reference.FIELDS,
    "PLACES": reference.PLACES,
    "BLOCK_S": BLOCK_S,
    "BLOCK_T": BLOCK_T,
}


@triton.jit
def _read(kv_lens, prefixes, seqs, num_seqs, num_queries, window, tile, UNIT: tl.constexpr, MIN_SHARED: tl.constexpr):
    """Of sequences: length, first own token, own units, first row of the group, tokens shared, units of the shared
    items that the sequence leads. A sequence that does not exist has length 0."""
    valid = seqs < num_seqs
    kv_len = tl.load(kv_lens + seqs, mask=valid, other=0)
    if prefixes is None:
        group = seqs
        shared = tl.zeros_like(seqs)
        begin = tl.where(window > 0, tl.maximum(kv_len - num_queries + 1 - window, 0), 0)
    else:
        group = tl.load(prefixes + 2 * seqs, mask=valid, other=-1)
        before = tl.load(prefixes + 2 * seqs - 2, mask=valid & (seqs > 0), other=-2)
        after = tl.load(prefixes + 2 * seqs + 2, mask=seqs + 1 < num_seqs, other=-2)
        shared = tl.load(prefixes + 2 * seqs + 1, mask=valid, other=0)
        in_company = (before == group) | (after == group)
        shared = tl.where(in_company & (shared >= MIN_SHARED), shared, 0)
        begin = tl.minimum(shared, kv_len)
    units = tl.maximum(tl.cdiv(kv_len, UNIT) - begin // UNIT, 0)
    leads = (shared > 0) & ((seqs - group) % tile == 0)
    return kv_len, begin, units, group, shared, tl.where(leads, tl.cdiv(shared, UNIT), 0)


@triton.jit
def _cut(units, longest):
    """(stretches, units of each but the last), as `reference.cut`."""
    per_stretch = tl.maximum(tl.cdiv(units, tl.maximum(tl.cdiv(units, longest), 1)), 1)
    return tl.maximum(tl.cdiv(units, per_stretch), 1), per_stretch


@triton.jit
def _item(at, mask, first, num, begin, end, slot, own, count):
    """Write the fields of the items at pointers `at`."""
    tl.store(at, first, mask=mask)
    tl.store(at + 1, num, mask=mask)
    tl.store(at + 2, begin, mask=mask)
    tl.store(at + 3, end, mask=mask)
    tl.store(at + 4, slot, mask=mask)
    tl.store(at + 5, own, mask=mask)
    tl.store(at + 6, count, mask=mask)
    tl.store(at + 7, 0, mask=mask)


@triton.jit
def _clear(plan, begin, end, BLOCK_T: tl.constexpr):
    """Zero plan[begin:end], all programs together."""
    for first in range(begin + tl.program_id(0) * BLOCK_T, end, tl.num_programs(0) * BLOCK_T):
        at = first + tl.arange(0, BLOCK_T)
        tl.store(plan + at, tl.zeros([BLOCK_T], tl.int32), mask=at < end)


@triton.jit(
    do_not_specialize=[
        "num_seqs", "num_queries", "window", "target", "tile", "num_shared", "num_own", "counters_at", "length"
    ]
)  # fmt: skip
def _plan(
    kv_lens,
    prefixes,
    plan,
    num_seqs,
    num_queries,
    window,
    target,
    tile,
    num_shared,
    num_own,
    counters_at,
    length,
    UNIT: tl.constexpr,
    MIN_SHARED: tl.constexpr,
    FIELDS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PDL: tl.constexpr,
):
    go(PDL)
    wait(PDL)
    total = 0
    for start in range(0, num_seqs, BLOCK_T):
        others = start + tl.arange(0, BLOCK_T)
        _, _, units, _, _, led = _read(kv_lens, prefixes, others, num_seqs, num_queries, window, tile, UNIT, MIN_SHARED)
        total += tl.sum(units + led, 0)
    longest = tl.maximum(tl.cdiv(total, target), 1)

    seqs = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = seqs < num_seqs
    kv_len, begin, units, group, shared, led = _read(
        kv_lens, prefixes, seqs, num_seqs, num_queries, window, tile, UNIT, MIN_SHARED
    )
    count, per_stretch = _cut(units, longest)
    leader = seqs - (seqs - group) % tile  # whose shared items hold this sequence
    own_before = tl.zeros([BLOCK_S], tl.int32)
    shared_before = tl.zeros([BLOCK_S], tl.int32)
    shared_count = tl.zeros([BLOCK_S], tl.int32)
    members = tl.zeros([BLOCK_S], tl.int32)
    all_own = 0
    all_shared = 0
    for start in range(0, num_seqs, BLOCK_T):
        others = start + tl.arange(0, BLOCK_T)
        _, _, their_units, their_group, _, their_led = _read(
            kv_lens, prefixes, others, num_seqs, num_queries, window, tile, UNIT, MIN_SHARED
        )
        their_count, their_stretch = _cut(their_units, longest)
        their_count = tl.where(others < num_seqs, their_count, 0)
        longer = their_stretch[None, :] > per_stretch[:, None]
        earlier = (their_stretch[None, :] == per_stretch[:, None]) & (others[None, :] < seqs[:, None])
        own_before += tl.sum(tl.where(longer | earlier, their_count[None, :], 0), 1)
        all_own += tl.sum(their_count, 0)
        if prefixes is not None:
            cuts, _ = _cut(their_led, longest)
            cuts = tl.where(their_led > 0, cuts, 0)
            shared_before += tl.sum(tl.where(others[None, :] < leader[:, None], cuts[None, :], 0), 1)
            shared_count += tl.sum(tl.where(others[None, :] == leader[:, None], cuts[None, :], 0), 1)
            all_shared += tl.sum(cuts, 0)
            near = (others[None, :] >= seqs[:, None]) & (others[None, :] < seqs[:, None] + tile)
            members += tl.sum((near & (their_group[None, :] == group[:, None])).to(tl.int32), 1)

    own_slot = num_shared * tile + own_before
    direct = (count == 1) & (shared == 0)
    first_unit = begin // UNIT
    for i in range(tl.max(tl.where(valid, count, 0), 0)):
        item_begin = tl.maximum(begin, (first_unit + i * per_stretch) * UNIT)
        item_end = tl.minimum(kv_len, (first_unit + (i + 1) * per_stretch) * UNIT)
        slot = tl.where(direct, -1, own_slot + i)
        at = plan + (num_shared + own_before + i) * FIELDS
        _item(at, valid & (i < count), seqs, 1, item_begin, item_end, slot, own_slot, count)
    if prefixes is not None:
        shared_count = tl.where(shared > 0, shared_count, 0)
        _, led_stretch = _cut(led, longest)
        leads = led > 0
        for i in range(tl.max(tl.where(leads, shared_count, 0), 0)):
            item_begin = i * led_stretch * UNIT
            item_end = tl.minimum(item_begin + led_stretch * UNIT, shared)
            slot = (shared_before + i) * tile
            at = plan + (shared_before + i) * FIELDS
            _item(at, leads & (i < shared_count), seqs, members, item_begin, item_end, slot, 0, 0)
        at = plan + (num_shared + num_own) * FIELDS + seqs * PLACES
        tl.store(at, own_slot, mask=valid)
        tl.store(at + 1, count, mask=valid)
        tl.store(at + 2, tl.where(shared > 0, shared_before * tile + seqs - leader, 0), mask=valid)
        tl.store(at + 3, shared_count, mask=valid)
    _clear(plan, all_shared * FIELDS, num_shared * FIELDS, BLOCK_T)
    _clear(plan, (num_shared + all_own) * FIELDS, (num_shared + num_own) * FIELDS, BLOCK_T)
    _clear(plan, counters_at, length, BLOCK_T)


def _aot():
    pointers = {"kv_lens": "*i32", "prefixes": "*i32", "plan": "*i32"}
    numbers = ("num_seqs", "num_queries", "window", "target", "tile", "num_shared", "num_own", "counters_at", "length")
    signature = pointers | dict.fromkeys(numbers, "i32")
    constexprs = CONSTANTS | {"UNIT": reference.UNIT, "PDL": True}
    yield Aot(_plan, signature, constexprs, 4, 3, ("plan",))
    without = {name: kind for name, kind in signature.items() if name != "prefixes"}
    yield Aot(_plan, without, constexprs | {"prefixes": None}, 4, 3, ("plan",))


@plan_decode.kernel(needs="sm80", aot=_aot)
def ranks(kv_lens, prefixes, num_queries, num_heads, num_kv_heads, window, unit=reference.UNIT):
    num_seqs = kv_lens.shape[0]
    assert kv_lens.is_contiguous() and (prefixes is None or prefixes.is_contiguous())
    room = extent(num_seqs, num_queries, num_heads, num_kv_heads, prefixes is not None and not window)
    plan = torch.empty(room.length, dtype=torch.int32, device=kv_lens.device)
    _plan[(triton.cdiv(num_seqs, BLOCK_S),)](
        kv_lens,
        prefixes if room.shares else None,
        plan,
        num_seqs,
        num_queries,
        window,
        room.target,
        room.tile,
        room.num_shared,
        room.num_own,
        room.counters_at,
        room.length,
        UNIT=unit,
        **CONSTANTS,
        num_warps=4,
        **overlap.launch(),
    )
    return plan
