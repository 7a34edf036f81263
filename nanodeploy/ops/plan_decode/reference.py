from typing import NamedTuple

import torch
from torch import Tensor

from nanodeploy.ops import machine
from nanodeploy.ops.registry import op

UNIT = 128  # tokens; stretches of a context begin and end at multiples, where the caller names no other
MIN_SHARED = 256  # tokens that a group must share to be worth a second round
TILE_ROWS = 64  # query rows of one kv head that go over a shared prefix together
PROGRAMS_PER_SM = 2  # of decode_attention; what its shared memory has room for
FIELDS = 8  # numbers of an item
PLACES = 4  # numbers of a row


class Extent(NamedTuple):
    """How much a plan has room for, from shapes and the machine."""

    target: int  # items that fill the machine
    tile: int  # sequences of one shared item
    num_shared: int
    num_own: int
    num_seqs: int
    num_kv_heads: int
    shares: bool

    @property
    def num_items(self) -> int:
        return self.num_shared + self.num_own

    @property
    def num_slots(self) -> int:
        """Partial results of one sequence: an own item makes one, a shared item one for each sequence."""
        return self.num_shared * self.tile + self.num_own

    @property
    def places_at(self) -> int:
        return self.num_items * FIELDS

    @property
    def counters_at(self) -> int:
        return self.places_at + (self.num_seqs * PLACES if self.shares else 0)

    @property
    def length(self) -> int:
        return self.counters_at + self.num_seqs * self.num_kv_heads


def extent(num_seqs: int, num_queries: int, num_heads: int, num_kv_heads: int, shares: bool) -> Extent:
    """`shares`: whether there are prefixes, and no window, with which they count for nothing."""
    target = max(1, PROGRAMS_PER_SM * max(16, machine.num_sms()) // num_kv_heads)
    tile = max(1, TILE_ROWS * num_kv_heads // (num_queries * num_heads))
    shares = shares and tile > 1
    num_shared = 2 * num_seqs // 3 + target if shares else 0  # a group of three makes two tiles of two
    return Extent(target, tile, num_shared, num_seqs + target, num_seqs, num_kv_heads, shares)


def cut(num_units: int, longest: int) -> tuple[int, int]:
    """(stretches, units of each but the last) for `num_units` in stretches of about equal length, none above
    `longest`; one empty stretch for none."""
    per_stretch = -(-num_units // max(1, -(-num_units // longest))) or 1
    return max(1, -(-num_units // per_stretch)), per_stretch


@op(
    out=lambda kv_lens, prefixes, num_queries, num_heads, num_kv_heads, window, unit=UNIT: kv_lens.new_empty(
        extent(kv_lens.shape[0], num_queries, num_heads, num_kv_heads, prefixes is not None and not window).length
    )
)
def plan_decode(
    kv_lens: Tensor,
    prefixes: Tensor | None,
    num_queries: int,
    num_heads: int,
    num_kv_heads: int,
    window: int,
    unit: int = UNIT,
) -> Tensor:
    """How the work of decode_attention is cut, once for all layers of a step that have this window.

    kv_lens [S] int32; prefixes [S, 2] int32 as in decode_attention; num_queries, num_heads, num_kv_heads: its Q, H, K.
    Returns int32 [N], N from shapes and the machine only (`extent`): items, of FIELDS numbers each, first `num_shared`
    items over shared prefixes, then `num_own` items over one sequence each; with prefixes PLACES numbers for each
    sequence; and S * K zeros, in which decode_attention counts arrivals, and which it leaves zero. An item, which is
    done once for each kv head:
      0 its first sequence    1 its sequences, in turn; 0: no item    2, 3 its tokens: from, up to but not including
      4 the slot of its first sequence's partial result; -1: it has a sequence to itself and writes the output
      5 the slot of its sequence's first own item                     6 its sequence's own items       7 nothing
    Slots: shared item i has `tile` from i * tile on, then come the own items with one each. PLACES of a sequence: slot
    and number of its own items; slot of its part of its first shared item, and the number of these.

    A context is cut in units of `unit` tokens, from position 0, into stretches of equal length such that all sequences
    together make about `target` items; the longest stretches come first. Where a group of two or more rows shares
    MIN_SHARED tokens or more, up to `tile` of its sequences at a time go over these together, and their own items hold
    what follows. A window leaves out what no query of the sequence sees.
    """
    room = extent(kv_lens.shape[0], num_queries, num_heads, num_kv_heads, prefixes is not None and not window)
    lens = kv_lens.tolist()
    groups = prefixes.tolist() if prefixes is not None and room.shares else [[seq, 0] for seq in range(len(lens))]
    sizes = {leader: sum(other == leader for other, _ in groups) for leader, _ in groups}
    shared = [num if sizes[leader] > 1 and num >= MIN_SHARED else 0 for leader, num in groups]
    hidden = [max(0, kv_len - num_queries + 1 - window) if window else 0 for kv_len in lens]
    begins = [min(kv_len, max(pair)) for kv_len, *pair in zip(lens, hidden, shared)]
    firsts = [begin // unit for begin in begins]
    units = [max(0, -(-kv_len // unit) - first) for kv_len, first in zip(lens, firsts)]
    leads = [seq for seq in range(len(lens)) if shared[seq] and (seq - groups[seq][0]) % room.tile == 0]
    shared_units = [-(-shared[seq] // unit) for seq in leads]
    longest = max(1, -(-(sum(units) + sum(shared_units)) // room.target))

    items = [[0] * FIELDS for _ in range(room.num_items)]
    places = [[0] * PLACES for _ in lens]
    at = 0
    for lead, num_units in zip(leads, shared_units):
        count, per_stretch = cut(num_units, longest)
        members = [s for s in range(lead, min(lead + room.tile, len(lens))) if groups[s][0] == groups[lead][0]]
        for member, seq in enumerate(members):
            places[seq][2:] = at * room.tile + member, count
        for begin in range(0, count * per_stretch * unit, per_stretch * unit):
            end = min(begin + per_stretch * unit, shared[lead])
            items[at] = [lead, len(members), begin, end, at * room.tile, 0, 0, 0]
            at += 1
    cuts = [cut(num_units, longest) for num_units in units]
    at = room.num_shared
    for seq in sorted(range(len(lens)), key=lambda seq: -cuts[seq][1]):
        count, per_stretch = cuts[seq]
        slot = room.num_shared * (room.tile - 1) + at
        places[seq][:2] = slot, count
        direct = count == 1 and not shared[seq]
        for i in range(count):
            begin = max(begins[seq], (firsts[seq] + i * per_stretch) * unit)
            end = min(lens[seq], (firsts[seq] + (i + 1) * per_stretch) * unit)
            items[at] = [seq, 1, begin, end, -1 if direct else slot + i, slot, count, 0]
            at += 1
    numbers = [n for item in items for n in item] + ([n for place in places for n in place] if room.shares else [])
    return kv_lens.new_tensor(numbers + [0] * (len(lens) * num_kv_heads), dtype=torch.int32)
