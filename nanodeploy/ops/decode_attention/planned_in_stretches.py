"""Decoding for --deterministic by the plan of plan_decode, in the order of ops/running_softmax.py.

As planned.py, but an item takes the stretches that end inside of it, whole, whatever the plan: the plan decides
who works out a stretch, never how. A sequence of one item sums its stretches as it goes; of more, each leaves its
stretches' states, and the last to end adds all of the sequence up in turn. fixed_order.py gives a token the same bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.decode_attention.planned import MAX_ROWS, _write, chunk
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.layouts import SPLIT_TOKENS
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.plan_decode.reference import FIELDS, extent
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E, add_stretch, add_tile, finish, places, tile_tokens


@triton.jit
def _leave(partial, stats, at, present, highest, total, mixed, HEAD_DIM: tl.constexpr):
    """Store the state of a stretch, its rows at `at`."""
    dims = tl.arange(0, HEAD_DIM)
    tl.store(partial + at.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :], mixed, mask=present[:, None])
    tl.store(stats + at * 2, highest, mask=present)
    tl.store(stats + at * 2 + 1, total, mask=present)


@triton.jit
def _add_up(
    partial,
    stats,
    at,
    step,
    first,
    last,
    num_rows,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The sum of stretches first to last - 1 in turn, of which the first one's rows begin at `at`."""
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, HEAD_DIM)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for begin in range(first, last, CHUNK):
        for i in tl.static_range(CHUNK):  # CHUNK stretches on their way at once, past the first-level cache
            there = begin + i < last
            where = at + (begin + i - first) * step + rows
            mask = there & (rows < num_rows)
            stretch_highest = tl.load(stats + where * 2, mask=mask, other=0.0, cache_modifier=".cg")
            stretch_total = tl.load(stats + where * 2 + 1, mask=mask, other=0.0, cache_modifier=".cg")
            values = partial + where.to(tl.int64)[:, None] * HEAD_DIM + dims[None, :]
            stretch_mixed = tl.load(values, mask=mask[:, None], other=0.0, cache_modifier=".cg")
            risen, sum_total, sum_mixed = add_stretch(
                highest, total, mixed, stretch_highest, stretch_total, stretch_mixed
            )
            highest = tl.where(there, risen, highest)
            total = tl.where(there, sum_total, total)
            mixed = tl.where(there, sum_mixed, mixed)
    return highest, total, mixed


# One compilation for any batch and any slice of its rows.
@triton.jit(
    do_not_specialize=["num_queries", "group", "window", "num_stretches", "counters_at", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens"],
)
def _attend(
    q,
    kv_pages,
    page_table,
    kv_lens,
    plan,
    sinks,
    out,
    partial,
    stats,
    scale_log2,
    num_queries,
    group,
    window,
    num_stretches,
    counters_at,
    stride_q_token,
    stride_q_head,
    stride_page,
    stride_kv,
    stride_slot,
    stride_head,
    stride_table,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (kv head, item). partial [S, num_stretches, K, rows, E], stats [S, num_stretches, K, rows, 2] fp32.
    MASKED: not every row sees every token of its item."""
    go(PDL)
    wait(PDL)
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    item = plan + tl.program_id(1) * FIELDS
    if tl.load(item + 1) == 0:
        return
    seq = tl.load(item)
    begin = tl.load(item + 2) // SPLIT * SPLIT
    end = tl.load(item + 3)
    alone = tl.load(item + 4) < 0
    num_own = tl.load(item + 6)
    kv_len = tl.load(kv_lens + seq)
    hidden = 0  # tokens that no query sees
    if WINDOW:
        hidden = tl.maximum(kv_len - num_queries + 1 - window, 0) // TILE * TILE
    if end < kv_len:
        end = end // SPLIT * SPLIT

    num_rows = num_queries * group
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    tile = tl.arange(0, TILE)
    present = rows < num_rows
    heads = kv_head * group + rows % group
    tokens_at = q + (seq.to(tl.int64) * num_queries + rows // group) * stride_q_token + heads * stride_q_head
    queries = tl.load(tokens_at[:, None] + dims[None, :], mask=present[:, None], other=0.0)
    limits = kv_len - num_queries + rows // group  # the last position that each row sees
    table = page_table + seq.to(tl.int64) * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, :]
    state_at = (seq * num_stretches * num_kv_heads + kv_head) * num_rows
    state_step = num_kv_heads * num_rows
    all_highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    all_total = tl.zeros([BLOCK_M], tl.float32)
    all_mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    first = tl.maximum(begin, hidden)
    for start in range(first, end, TILE):
        tokens = start + tile
        valid = tokens < end
        page, inside = places(table, start, end, PAGE, TILE)
        at = (page * stride_page + inside * stride_slot)[:, None]
        k = tl.load(keys + at, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
        v = tl.load(keys + at + stride_kv, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
        scores = tl.dot(queries, k.T, input_precision="ieee")
        seen = valid[None, :]
        if MASKED:
            seen = seen & (tokens[None, :] <= limits[:, None])
        if WINDOW:
            seen = seen & (tokens[None, :] > limits[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        if (start % SPLIT == 0) & (start > first):  # the stretch before is complete
            if not alone:
                before = state_at + (start // SPLIT - 1) * state_step + rows
                _leave(partial, stats, before, present, highest, total, mixed, HEAD_DIM)
            all_highest, all_total, all_mixed = add_stretch(all_highest, all_total, all_mixed, highest, total, mixed)
            highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        highest, total, mixed = add_tile(highest, total, mixed, scores, v, 127, 127, scale_log2, False)

    if alone:
        all_highest, all_total, all_mixed = add_stretch(all_highest, all_total, all_mixed, highest, total, mixed)
        result = finish(all_highest, all_total, all_mixed, sinks + heads, present, SINKS, False)
        _write(out, result, seq, kv_head, num_kv_heads, num_queries, group, HEAD_DIM, BLOCK_M)
    else:
        if first < end:
            before = state_at + (end - 1) // SPLIT * state_step + rows
            _leave(partial, stats, before, present, highest, total, mixed, HEAD_DIM)
        tl.debug_barrier()  # all of this program's stores come before its arrival
        counter = plan + counters_at + seq * num_kv_heads + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel") == num_own - 1:
            row = tl.arange(0, ROWS)
            sum_highest, sum_total, sum_mixed = _add_up(
                partial,
                stats,
                state_at + hidden // SPLIT * state_step,
                state_step,
                hidden // SPLIT,
                tl.cdiv(kv_len, SPLIT),
                num_rows,
                HEAD_DIM,
                ROWS,
                CHUNK,
            )
            sinks_at = sinks + kv_head * group + row % group
            result = finish(sum_highest, sum_total, sum_mixed, sinks_at, row < num_rows, SINKS, False)
            _write(out, result, seq, kv_head, num_kv_heads, num_queries, group, HEAD_DIM, ROWS)
            tl.store(counter, 0)  # for the next layer


@dataclass(frozen=True)
class Config:
    num_warps: int
    num_stages: int  # Triton halves it, as the page id's load comes before the page's: 5 gives 2 tiles in flight
    max_regs: int | None = None  # per thread, where the compiler would take more than lets programs share an SM


def pick(head_dim: int, block_m: int) -> Config:
    """The configuration for `block_m` rows."""
    if block_m > 64 or (block_m == 64 and head_dim == 256):
        return Config(8, 5)
    return Config(4, 7 if head_dim == 64 else 5)


def configs(head_dim: int, block_m: int = 16) -> list[Config]:
    """What a sweep tries; the first is `pick`'s."""
    shipped = pick(head_dim, block_m)
    tried = [Config(*c) for c in ((4, 5), (4, 7), (4, 9), (4, 7, 168), (4, 5, 168), (8, 7))]
    return [shipped, *(c for c in tried if c != shipped)]


def block_rows(num_rows: int) -> int:
    """Rows of the matrix product for sequences of `num_rows` query rows per kv head."""
    return max(16, triton.next_power_of_2(num_rows))


def launch(q, kv_pages, page_table, kv_lens, prefixes, plan, sinks, scale, window, *, config: Config | None = None):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = kv_lens.shape[0]
    assert q.stride(2) == 1 and kv_pages.stride(4) == 1 and page_table.stride(1) == 1 and kv_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_seqs == 0:
        return out
    num_queries, group = num_tokens // num_seqs, num_heads // num_kv_heads
    shape = num_seqs, num_queries, num_heads, num_kv_heads
    if plan is None or extent(*shape, prefixes is not None and not window).shares:  # it goes over no prefix together
        plan = plan_decode(kv_lens, None, num_queries, num_heads, num_kv_heads, window, SPLIT_TOKENS)
    room = extent(*shape, False)
    assert plan.shape[0] == room.length and plan.is_contiguous(), "the plan of another batch"
    num_rows = num_queries * group
    rows, block_m = triton.next_power_of_2(num_rows), block_rows(num_rows)
    config = config or pick(head_dim, block_m)
    num_stretches = triton.cdiv(page_table.shape[1] * page_size, SPLIT_TOKENS)
    states = num_seqs, num_stretches, num_kv_heads, num_rows
    partial = torch.empty((*states, head_dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((*states, 2), dtype=torch.float32, device=q.device)
    options: dict[str, Any] = {"maxnreg": config.max_regs} if config.max_regs and overlap.supported() else {}
    _attend[(num_kv_heads, room.num_items)](
        q,
        kv_pages,
        page_table,
        kv_lens,
        plan,
        sinks if sinks is not None else stats,
        out,
        partial,
        stats,
        scale * LOG2_E,
        num_queries,
        group,
        window,
        num_stretches,
        room.counters_at,
        *q.stride()[:2],
        *kv_pages.stride()[:4],
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        BLOCK_M=block_m,
        TILE=tile_tokens(head_dim),
        SPLIT=SPLIT_TOKENS,
        MASKED=num_queries > 1,
        WINDOW=window > 0,
        SINKS=sinks is not None,
        ROWS=rows,
        CHUNK=min(8, chunk(rows, head_dim)),
        FIELDS=FIELDS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,  # every fused multiply-add is written out: none is left to the compiler
        **options,
        **overlap.launch(),
    )
    return out


def aot_of(head_dim: int, page_size: int, config: Config, rows: int = 4) -> Aot:
    signature = {"q": "*bf16", "kv_pages": "*bf16", "page_table": "*i32", "kv_lens": "*i32", "plan": "*i32"}
    signature |= {"sinks": "*fp32", "out": "*bf16", "partial": "*fp32", "stats": "*fp32", "scale_log2": "fp32"}
    strides = ("stride_q_token", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    numbers = ("num_queries", "group", "window", "num_stretches", "counters_at", *strides, "stride_table")
    constexprs = {"HEAD_DIM": head_dim, "PAGE": page_size, "BLOCK_M": block_rows(rows), "TILE": tile_tokens(head_dim)}
    constexprs |= {"SPLIT": SPLIT_TOKENS, "MASKED": rows > 16, "WINDOW": False, "SINKS": False}
    constexprs |= {"ROWS": triton.next_power_of_2(rows), "CHUNK": min(8, chunk(rows, head_dim))}
    return Aot(
        _attend,
        signature | dict.fromkeys(numbers, "i32"),
        constexprs | {"FIELDS": FIELDS, "PDL": True},
        config.num_warps,
        config.num_stages,
        ("q", "kv_pages", "out", "partial", "stats", *strides),
        ("mma", "cp.async"),
        maxnreg=config.max_regs,
    )


def _aot():
    for head_dim, page_size in ((128, 64), (128, 16), (64, 64), (256, 64)):
        yield aot_of(head_dim, page_size, pick(head_dim, 16))
    yield aot_of(128, 64, pick(128, 32), rows=32)


def _takes(case) -> bool:
    fits = case.head_dim in (64, 128, 256) and case.page_size % 16 == 0 and case.num_queries * case.group <= MAX_ROWS
    return fits and not case.fp8 and case.dtype in (torch.bfloat16, torch.float16)


@decode_attention.kernel(needs="sm80", when=_takes, batch_invariant=True, order="stretches", aot=_aot)
def planned_in_stretches(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    return launch(q, kv_pages, page_table, kv_lens, prefixes, plan, sinks, scale, window)
