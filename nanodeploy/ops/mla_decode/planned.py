"""Decoding by the plan of plan_decode: each program does one item of it for up to TILE_ROWS of the query rows.

A tile of latents is loaded once and is both: keys [tokens, rank] and values. The running softmax is arXiv:2205.14135's;
what several items of a sequence found is merged by a second kernel, in the items' order. The grid depends on shapes
alone: a CUDA graph that holds plan_decode as well is right for any lengths.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops import overlap
from nanodeploy.ops.mla_decode.reference import TILE_ROWS, mla_decode, num_tiles
from nanodeploy.ops.mla_prefill.absorbed import takes
from nanodeploy.ops.mla_prefill.tokens import dims, load_tokens, strides, views
from nanodeploy.ops.overlap import go, wait
from nanodeploy.ops.plan_decode import plan_decode
from nanodeploy.ops.plan_decode.reference import FIELDS, extent
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E, places

NEVER = tl.constexpr(-1e30)  # below every score; finite, so that what saw nothing has a difference of 0 to itself


# One compilation for any batch and any slice of its rows.
@triton.jit(
    do_not_specialize=["num_queries", "num_heads", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens"],
)
def _attend(
    q,
    q_rope,
    latents,
    scales,
    keys,
    page_table,
    kv_lens,
    plan,
    out,
    partial,
    lse,
    scale_log2,
    num_queries,
    num_heads,
    stride_rope,
    stride_rope_head,
    stride_page,
    stride_table,
    RANK: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    UNIT: tl.constexpr,
    SLOT: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (tile of rows, item). latents, scales, keys, RANK to PAGE: as load_tokens has them. STRIDE: rows from one
    tile to the next. MASKED: not every row sees every token of its item; with 64 rows each tile finds out."""
    go(PDL)
    wait(PDL)
    item = plan + tl.program_id(1) * FIELDS
    if tl.load(item + 1) == 0:
        return
    seq = tl.load(item)
    begin = tl.load(item + 2)
    end = tl.load(item + 3)
    slot = tl.load(item + 4)

    KIND: tl.constexpr = q.dtype.element_ty
    num_rows = num_queries * num_heads
    rows = tl.program_id(0) * STRIDE + tl.arange(0, ROWS)
    present = rows < num_rows
    columns = tl.arange(0, WIDTH)
    rope_columns = tl.arange(0, ROPE)
    inside = present[:, None] & (columns < RANK)[None, :]
    from_row = (seq.to(tl.int64) * num_rows + rows)[:, None] * RANK + columns[None, :]
    queries = tl.load(q + from_row, mask=inside, other=0.0)
    token = seq.to(tl.int64) * num_queries + rows // num_heads
    rotated = tl.load(
        q_rope + (token * stride_rope + rows % num_heads * stride_rope_head)[:, None] + rope_columns[None, :],
        mask=present[:, None] & (rope_columns < R)[None, :],
        other=0.0,
    )
    before = tl.load(kv_lens + seq) - num_queries
    limits = before + rows // num_heads  # the last position that each row sees
    full = tl.minimum(end, before + 1)  # every row sees all that is before
    table = page_table + seq.to(tl.int64) * stride_table
    highest = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        tokens = start + tl.arange(0, TILE)
        valid = tokens < end
        page, offset = places(table, start, end, PAGE, TILE)
        at = page * stride_page + offset * SLOT
        latent, key = load_tokens(latents, scales, keys, at, valid, 0, WIDTH, RANK, R, ROPE, UNIT, KIND)
        scores = tl.dot(queries, latent.T, input_precision="ieee")
        if ROWS >= 64:
            # Triton gives a product that it sees feed another one axis of warps, which with 64 rows would be each score
            # twice. It does not see through an `if` (mla_prefill/absorbed.py).
            if start + TILE > full:
                scores = tl.where(tokens[None, :] <= limits[:, None], scores, float("-inf"))
            scores = tl.dot(rotated, key.T, scores, input_precision="ieee")
            if start + TILE > full:
                scores = tl.where(valid[None, :], scores, float("-inf"))
            scores *= scale_log2
        else:
            scores = tl.dot(rotated, key.T, scores, input_precision="ieee") * scale_log2
            seen = valid[None, :]
            if MASKED:
                seen = seen & (tokens[None, :] <= limits[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - risen[:, None])
        shrink = tl.exp2(highest - risen)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(KIND), latent, mixed * shrink[:, None], input_precision="ieee")
        highest = risen

    total = tl.where(total == 0, 1.0, total)  # nothing seen: zeros
    mixed = mixed / total[:, None]
    if slot < 0:
        tl.store(out + from_row, mixed.to(KIND), mask=inside)
    else:
        to_row = slot.to(tl.int64) * num_rows + rows
        tl.store(partial + to_row[:, None] * RANK + columns[None, :], mixed, mask=inside)
        tl.store(lse + to_row, highest + tl.log2(total), mask=present)


# One compilation for any batch.
@triton.jit(do_not_specialize=["num_rows", "num_items"])
def _merge(
    plan,
    out,
    partial,
    lse,
    num_rows,
    num_items,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    FIELDS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (ROWS rows, WIDTH columns, sequence): the softmax-weighted mean over the sequence's items, if it has
    several, PARTS of them at a time."""
    go(PDL)
    wait(PDL)
    seq = tl.program_id(2)
    own_slot = -1
    num_own = 0
    for first in range(0, num_items, 256):  # programs over items instead would be many, and most of them for nothing
        at = first + tl.arange(0, 256)
        there = at < num_items
        items = plan + at * FIELDS
        mine = (tl.load(items, mask=there, other=-1) == seq) & (tl.load(items + 1, mask=there, other=0) > 0)
        own_slot = tl.maximum(own_slot, tl.max(tl.load(items + 5, mask=mine, other=-1), 0))
        num_own = tl.maximum(num_own, tl.max(tl.load(items + 6, mask=mine, other=0), 0))
    if num_own < 2:
        return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    highest = tl.full([ROWS], NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, num_own, PARTS):
        parts = first + tl.arange(0, PARTS)
        there = (parts < num_own)[:, None] & (rows < num_rows)[None, :]
        at = (own_slot + parts).to(tl.int64)[:, None] * num_rows + rows[None, :]
        logs = tl.load(lse + at, mask=there, other=float("-inf"))
        where = partial + at[:, :, None] * RANK + columns[None, None, :]
        results = tl.load(where, mask=there[:, :, None] & (columns < RANK)[None, None, :], other=0.0)
        risen = tl.maximum(highest, tl.max(logs, 0))
        weights = tl.exp2(logs - risen[None, :])
        shrink = tl.exp2(highest - risen)
        total = total * shrink + tl.sum(weights, 0)
        mixed = mixed * shrink[:, None] + tl.sum(results * weights[:, :, None], 0)
        highest = risen
    result = mixed / tl.where(total == 0, 1.0, total)[:, None]
    to = out + (seq.to(tl.int64) * num_rows + rows)[:, None] * RANK + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < RANK)[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


def merging(num_seqs: int, num_rows: int, width: int) -> dict[str, int]:
    """How a program of `_merge` takes its share: few sequences have many items each, and few programs to merge them."""
    if num_seqs * num_rows <= 512:
        return {"PARTS": 32, "ROWS": 1, "WIDTH": min(width, 128)}
    return {"PARTS": 4, "ROWS": 2, "WIDTH": width}


@dataclass(frozen=True)
class Config:
    """How an item is done."""

    tokens: int  # per tile
    num_warps: int
    num_stages: int  # Triton halves it, as the page id's load comes before the page's: 5 gives 2 tiles in flight


def pick(rows: int) -> Config:
    """The configuration for a product of `rows` rows with latents of 512; NOTES.md has what was measured."""
    if rows < TILE_ROWS:
        return Config(32, 4, 5)
    return Config(64, 8, 2)


def configs(rows: int) -> list[Config]:
    """What a sweep tries; the first is `pick`'s."""
    shipped = pick(rows)
    tried = [Config(*c) for c in ((32, 4, 5), (32, 8, 5), (64, 8, 5), (16, 4, 9), (64, 8, 2), (32, 8, 3))]
    return [shipped, *(c for c in tried if c != shipped)]


def block_rows(num_rows: int) -> int:
    """Rows of the matrix product for sequences of `num_rows` query rows."""
    return min(TILE_ROWS, max(16, triton.next_power_of_2(num_rows)))


def launch(q, q_rope, pages, page_table, kv_lens, plan, scale, *, config: Config | None = None):
    num_tokens, num_heads, rank = q.shape
    num_seqs, rope_dim = kv_lens.shape[0], q_rope.shape[2]
    assert q.is_contiguous() and q_rope.stride(2) == pages.stride(2) == page_table.stride(1) == 1
    assert kv_lens.is_contiguous()
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    num_queries = num_tokens // num_seqs
    tiles, num_rows = num_tiles(num_queries, num_heads), num_queries * num_heads
    if plan is None:
        plan = plan_decode(kv_lens, None, num_queries, num_heads, tiles, 0)
    room = extent(num_seqs, num_queries, num_heads, tiles, False)
    assert plan.shape[0] == room.length and plan.is_contiguous(), "the plan of another batch"
    shape = dims(rank, rope_dim, pages)
    rows = block_rows(num_rows)
    config = config or pick(rows)
    partial = torch.empty((room.num_slots, num_rows, rank), dtype=torch.float32, device=q.device)
    lse = torch.empty((room.num_slots, num_rows), dtype=torch.float32, device=q.device)
    _attend[(tiles, room.num_items)](
        q,
        q_rope,
        *views(pages),
        page_table,
        kv_lens,
        plan,
        out,
        partial,
        lse,
        scale * LOG2_E,
        num_queries,
        num_heads,
        *q_rope.stride()[:2],
        strides(pages)[1],
        page_table.stride(0),
        STRIDE=TILE_ROWS,
        ROWS=rows,
        TILE=config.tokens,
        STAGES=config.num_stages,
        MASKED=num_queries > 1,
        FIELDS=FIELDS,
        num_warps=config.num_warps,
        **shape,
        **overlap.launch(),
    )
    share = merging(num_seqs, num_rows, shape["WIDTH"])
    _merge[(triton.cdiv(num_rows, share["ROWS"]), triton.cdiv(rank, share["WIDTH"]), num_seqs)](
        plan,
        out,
        partial,
        lse,
        num_rows,
        room.num_items,
        RANK=rank,
        FIELDS=FIELDS,
        num_warps=4,
        **share,
        **overlap.launch(),
    )
    return out


def _aot():
    rope_strides = ("stride_rope", "stride_rope_head")
    integers = ("num_queries", "num_heads", *rope_strides, "stride_page", "stride_table")
    indices = dict.fromkeys(("page_table", "kv_lens", "plan"), "*i32")
    for fp8, rows in ((False, 16), (False, 64), (True, 16), (True, 64)):
        config = pick(rows)
        pointers = {"q": "*bf16", "q_rope": "*bf16", "latents": "*fp8e4nv" if fp8 else "*bf16", "keys": "*bf16"}
        pointers |= {"out": "*bf16", "partial": "*fp32", "lse": "*fp32"} | ({"scales": "*fp32"} if fp8 else {})
        constexprs = {"RANK": 512, "R": 64, "WIDTH": 512, "ROPE": 64, "UNIT": 16, "SLOT": 41 if fp8 else 72, "PAGE": 64}
        constexprs |= {"STRIDE": TILE_ROWS, "ROWS": rows, "TILE": config.tokens, "STAGES": config.num_stages}
        constexprs |= {"MASKED": False, "FIELDS": FIELDS, "PDL": True}
        yield Aot(
            _attend,
            pointers | indices | {"scale_log2": "fp32"} | dict.fromkeys(integers, "i32"),
            constexprs | ({} if fp8 else {"scales": None}),
            config.num_warps,
            divisible=(*pointers, *rope_strides, "stride_page"),
            wants=("wgmma" if rows == 64 else "mma", "cp.async"),
            max_spills=160 if fp8 == (rows == 16) else 0,  # none in the loop
        )
    pointers = {"plan": "*i32", "out": "*bf16", "partial": "*fp32", "lse": "*fp32"}
    for num_seqs in (1, 64):
        constexprs = {"RANK": 512, "FIELDS": FIELDS, "PDL": True, **merging(num_seqs, 16, 512)}
        yield Aot(
            *(_merge, pointers | {"num_rows": "i32", "num_items": "i32"}, constexprs, 4),
            divisible=("out", "partial", "lse"),
            wants=("ld.v4",),
        )


@mla_decode.kernel(needs="sm80", when=takes, aot=_aot)
def planned(q, q_rope, pages, page_table, kv_lens, plan, scale):
    return launch(q, q_rope, pages, page_table, kv_lens, plan, scale)
