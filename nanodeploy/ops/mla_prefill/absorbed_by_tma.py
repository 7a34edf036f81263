"""Absorbed, with one warp that does nothing but copy latents by TMA, and eight that multiply: Gluon, sm_90 alone.

The rest is as absorbed.py tells. A tile of 64 tokens is one page or a part of one: nine boxes of 64 columns. Two tiles
are in flight; the eight warps neither work out addresses nor wait for page numbers. A row's total is kept by column, in
the layout of its weights, and added up at the end. Tiles go from the last to the first, so the masked ones come first.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanodeploy.ops.head_linear import head_linear
from nanodeploy.ops.mla_prefill import absorbed
from nanodeploy.ops.mla_prefill.reference import mla_prefill
from nanodeploy.ops.mla_prefill.tokens import gather
from nanodeploy.ops.prefill_attention.warp_groups import BOX, FAR, LOWEST, _tile
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E

RANK = gl.constexpr(512)
ROWS = gl.constexpr(64)
TILE = gl.constexpr(64)
STAGES = gl.constexpr(2)
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def _extent(cu_q_lens, kv_lens, num_heads, num_tokens, num_seqs, SPLIT: gl.constexpr, WARPS: gl.constexpr):
    """What this program does: sequence, its first token, rows, first row; context before its queries; tiles [first,
    last) of its context, none where there is nothing to do."""
    num_tiles = gl.num_programs(0)
    _, seq, q_begin, q_len, first_row = _tile(
        gl.program_id(0), cu_q_lens, num_heads, num_tokens, num_seqs, num_tiles, num_tiles, ROWS, True, WARPS
    )
    num_rows = q_len * num_heads
    owned = (seq >= 0) & (seq < num_seqs) & (first_row < num_rows)
    kv_len = gl.load(kv_lens + seq, mask=owned, other=0)
    context = kv_len - q_len
    end = gl.minimum(context + (first_row + ROWS - 1) // num_heads + 1, kv_len)
    first = 0
    last = gl.where(owned, (gl.maximum(end, 0) + TILE - 1) // TILE, 0)
    if SPLIT:
        size = (last + gl.num_programs(1) - 1) // gl.num_programs(1)
        first = gl.program_id(1) * size
        last = gl.minimum(last, first + size)
    return seq, q_begin, num_rows, first_row, context, kv_len, first, last


@gluon.jit
def _produce(
    pages,
    page_table,
    kv_lens,
    cu_q_lens,
    num_heads,
    num_tokens,
    num_seqs,
    stride_table,
    ring,
    rope_ring,
    full,
    empty,
    PAGE: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """One warp: the tiles of this program, each as soon as there is room. Rows past the context's end become zeros."""
    seq, _q_begin, _rows, _first_row, _context, kv_len, first, last = _extent(
        cu_q_lens, kv_lens, num_heads, num_tokens, num_seqs, SPLIT, 1
    )
    table = page_table + seq.to(gl.int64) * stride_table
    SLICES: gl.constexpr = RANK // BOX
    next_page = gl.load(table + (last - 1) * TILE // PAGE, mask=last > first, other=0)
    for done in range(last - first):
        tile = last - 1 - done
        stage = done % STAGES
        start = tile * TILE
        page = next_page
        next_page = gl.load(table + (tile - 1) * TILE // PAGE, mask=tile > first, other=0)  # the wait hides its latency
        valid = gl.minimum(kv_len - start, TILE)
        row = page * PAGE + start % PAGE
        mbarrier.wait(empty.index(stage), (done // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), TILE * (RANK + BOX) * 2)
        for part in gl.static_range(SLICES + 1):
            if part < SLICES:
                box = ring.index(stage * SLICES + part)
            else:
                box = rope_ring.index(stage)
            tma.async_copy_global_to_shared(
                pages,
                [FAR, row + valid, FAR - valid, part * BOX],
                full.index(stage),
                box._reinterpret(box.dtype, [1, 1, TILE, BOX], pages.layout),
            )


@gluon.jit
def _round(
    queries, rotated, latents, rope_ring, weights_room, full, empty, done, tile, mixed, highest, totals, limits,
    scale_log2, MASK: gl.constexpr,
):  # fmt: skip
    """One tile added: its scores, weights, and their product with the same latents."""
    SCORES: gl.constexpr = totals.type.layout
    stage = done % STAGES
    mbarrier.wait(full.index(stage), done // STAGES & 1)
    latent = latents.index(stage)
    zeros = gl.zeros([ROWS, TILE], gl.float32, SCORES)
    scores = warpgroup_mma(queries, latent.permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma(rotated, rope_ring.index(stage).permute((1, 0)), scores, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    if MASK:
        columns = tile * TILE + gl.arange(0, TILE, layout=gl.SliceLayout(0, SCORES))
        scores = gl.where(gl.expand_dims(columns, 0) <= gl.expand_dims(limits, 1), scores, float("-inf"))
    risen = gl.maximum(highest, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(risen, 1))
    shrink = gl.exp2(highest - risen)
    totals = totals * gl.expand_dims(shrink, 1) + weights
    weights_room.store(weights.to(weights_room.dtype))
    mixed = mixed * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, mixed.type.layout)), 1)
    fence_async_shared()
    gl.thread_barrier()
    mixed = warpgroup_mma(weights_room, latent, mixed, is_async=True)
    mixed = warpgroup_mma_wait(0, deps=[mixed])
    gl.thread_barrier()  # both halves of the warps have read the tile and the weights
    mbarrier.arrive(empty.index(stage), count=1)
    return mixed, risen, totals


@gluon.jit
def _consume(
    q,
    q_rope,
    kv_lens,
    cu_q_lens,
    out,
    partial,
    stats,
    scale_log2,
    num_heads,
    num_tokens,
    num_seqs,
    stride_rope,
    stride_rope_head,
    queries,
    rotated,
    weights_room,
    ring,
    rope_ring,
    full,
    empty,
    SPLIT: gl.constexpr,
):
    """Eight warps: all rows; each four of them half of a tile's tokens, then half of a latent's columns."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, TILE // 2, 16])
    MIXED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANK // 2, 16])
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 2], [1, 0])  # 16 bytes a thread
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    latents = ring._reinterpret(DTYPE, [STAGES, TILE, RANK], SWIZZLED)
    seq, q_begin, num_rows, first_row, context, kv_len, first, last = _extent(
        cu_q_lens, kv_lens, num_heads, num_tokens, num_seqs, SPLIT, 8
    )
    # A sequence's rows lie one after another in q and out.
    output = q_begin.to(gl.int64) * num_heads + first_row
    wide_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    dims = gl.expand_dims(gl.arange(0, RANK, layout=gl.SliceLayout(0, WIDE)), 0)
    inner = gl.expand_dims(wide_rows * RANK, 1) + dims
    there = gl.expand_dims(first_row + wide_rows < num_rows, 1)
    if first < last:
        queries.store(gl.load(q + output * RANK + inner, mask=there, other=0.0))
        rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, NARROW))
        at = (q_begin + rows // num_heads).to(gl.int64) * stride_rope + rows % num_heads * stride_rope_head
        rope_dims = gl.expand_dims(gl.arange(0, BOX, layout=gl.SliceLayout(0, NARROW)), 0)
        present = gl.expand_dims(rows < num_rows, 1)
        rotated.store(gl.load(q_rope + gl.expand_dims(at, 1) + rope_dims, mask=present, other=0.0))
        fence_async_shared()
        gl.thread_barrier()
        rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
        limits = gl.minimum(context + rows // num_heads, kv_len - 1)  # the last position that each row sees
        # Every row sees all of the tiles before `unmasked`.
        unmasked = gl.maximum(gl.minimum((context + first_row // num_heads + 1) // TILE, last), first)
        highest = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
        totals = gl.zeros([ROWS, TILE], gl.float32, SCORES)
        mixed = gl.zeros([ROWS, RANK], gl.float32, MIXED)
        done = 0
        for tile in range(last - 1, unmasked - 1, -1):
            mixed, highest, totals = _round(
                queries, rotated, latents, rope_ring, weights_room, full, empty, done, tile, mixed, highest, totals,
                limits, scale_log2, True,
            )  # fmt: skip
            done += 1
        for tile in range(unmasked - 1, first - 1, -1):
            mixed, highest, totals = _round(
                queries, rotated, latents, rope_ring, weights_room, full, empty, done, tile, mixed, highest, totals,
                limits, scale_log2, False,
            )  # fmt: skip
            done += 1
        total = gl.sum(totals, 1)
        if SPLIT:
            output += gl.program_id(1).to(gl.int64) * num_tokens * num_heads
            local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
            present = first_row + local < num_rows
            gl.store(stats + output * 2 + local * 2, highest, mask=present)
            gl.store(stats + output * 2 + local * 2 + 1, total, mask=present)
            local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MIXED))
            columns = gl.expand_dims(gl.arange(0, RANK, layout=gl.SliceLayout(0, MIXED)), 0)
            where = partial + output * RANK + (gl.expand_dims(local * RANK, 1) + columns)
            gl.store(where, mixed, mask=gl.expand_dims(first_row + local < num_rows, 1))
        else:
            inverse = 1.0 / gl.where(total > 0, total, 1.0)  # a decode's query may lie before its context
            inverse = gl.convert_layout(inverse, gl.SliceLayout(1, MIXED))
            queries.store((mixed * gl.expand_dims(inverse, 1)).to(DTYPE))  # through the queries' room: wide stores
            gl.store(out + output * RANK + inner, queries.load(WIDE), mask=there)
    elif first_row < num_rows:
        nothing = gl.program_id(1) == 0
        if SPLIT:
            local = gl.arange(0, ROWS, layout=gl.SliceLayout(1, SCORES))
            at = gl.program_id(1).to(gl.int64) * num_tokens * num_heads + output + local
            if (seq >= 0) & (seq < num_seqs):
                nothing = False
                empty_total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
                gl.store(stats + at * 2 + 1, empty_total, mask=first_row + local < num_rows)
        if nothing:
            gl.store(out + output * RANK + inner, gl.zeros([ROWS, RANK], DTYPE, WIDE), mask=there)


# One compilation for any lengths and any slice of the batch's rows.
@gluon.jit(
    do_not_specialize=["num_heads", "num_tokens", "num_seqs", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens", "cu_q_lens"],
)
def _attend(
    q,
    q_rope,
    pages,
    page_table,
    kv_lens,
    cu_q_lens,
    out,
    partial,
    stats,
    scale_log2,
    num_heads,
    num_tokens,
    num_seqs,
    stride_rope,
    stride_rope_head,
    stride_table,
    PAGE: gl.constexpr,
    SPLIT: gl.constexpr,
):
    """Program (tile of rows, part of its context); see absorbed._attend."""
    DTYPE: gl.constexpr = out.dtype.element_ty
    queries = gl.allocate_shared_memory(DTYPE, [ROWS, RANK], SWIZZLED)
    rotated = gl.allocate_shared_memory(DTYPE, [ROWS, BOX], SWIZZLED)
    weights_room = gl.allocate_shared_memory(DTYPE, [ROWS, TILE], SWIZZLED)
    ring = gl.allocate_shared_memory(DTYPE, [STAGES * (RANK // BOX), TILE, BOX], SWIZZLED)
    rope_ring = gl.allocate_shared_memory(DTYPE, [STAGES, TILE, BOX], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    q, q_rope, kv_lens, cu_q_lens, out, partial, stats, scale_log2, num_heads, num_tokens, num_seqs,
                    stride_rope, stride_rope_head, queries, rotated, weights_room, ring, rope_ring, full, empty, SPLIT,
                ),
            ),
            (
                _produce,
                (
                    pages, page_table, kv_lens, cu_q_lens, num_heads, num_tokens, num_seqs, stride_table,
                    ring, rope_ring, full, empty, PAGE, SPLIT,
                ),
            ),
        ],
        [1],
        [24],
    )  # fmt: skip


NUM_WARPS = 8
MAX_REGS = 168  # per thread at the start: 65536 for the eight warps and a warp group of which one warp works


def describe(pages: Tensor) -> TensorDescriptor:
    """Pages as rows [P * page_size, rank + R] for TMA, in boxes that may end after any row: see
    prefill_attention/warp_groups.describe."""
    row = pages.shape[2]
    shape, strides = [0x7FFF0000, 0x7FFF0000, FAR.value, row], [2**34 - row, row, row, 1]
    return TensorDescriptor(pages, shape, strides, [1, 1, TILE.value, BOX.value], gl.NVMMASharedLayout(128, 16, 4))


def attend(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    scale: float,
    parts: int | None = None,
) -> Tensor:
    """As absorbed.attend, for contiguous pages of q's dtype."""
    num_tokens, num_heads, rank = q.shape
    num_seqs = page_table.shape[0]
    assert q.is_contiguous() and pages.is_contiguous() and q_rope.stride(2) == page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    num_tiles = num_tokens * num_heads // ROWS.value + num_seqs + 2
    if parts is None:
        parts = absorbed.num_parts(num_tiles, page_table.shape[1] * pages.shape[1])
    rows = parts * num_tokens * num_heads if parts > 1 else 0
    partial = torch.empty((rows, rank), dtype=torch.float32, device=q.device)
    stats = torch.empty((rows, 2), dtype=torch.float32, device=q.device)
    _attend[(num_tiles, parts)](
        q,
        q_rope,
        describe(pages),
        page_table,
        kv_lens,
        cu_q_lens,
        out,
        partial,
        stats,
        scale * LOG2_E,
        num_heads,
        num_tokens,
        num_seqs,
        *q_rope.stride()[:2],
        page_table.stride(0),
        PAGE=pages.shape[1],
        SPLIT=parts > 1,
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGS,
    )
    if parts > 1:
        absorbed.add(partial, stats, cu_q_lens, out, parts)
    return out


def _aot():
    pages = f"tensordesc<bf16[1, 1, {TILE.value}, {BOX.value}],{gl.NVMMASharedLayout(128, 16, 4)!r}>"
    pointers = {"q": "*bf16", "q_rope": "*bf16", "out": "*bf16", "partial": "*fp32", "stats": "*fp32"}
    indices = dict.fromkeys(("page_table", "kv_lens", "cu_q_lens"), "*i32")
    rope_strides = ("stride_rope", "stride_rope_head")
    integers = dict.fromkeys(("num_heads", "num_tokens", "num_seqs", *rope_strides, "stride_table"), "i32")
    for split in (False, True):
        yield Aot(
            _attend,
            {**pointers, "pages": pages, **indices, "scale_log2": "fp32", **integers},
            {"PAGE": 64, "SPLIT": split},
            NUM_WARPS,
            divisible=(*pointers, *rope_strides),
            wants=("wgmma", "tma", "setmaxnreg"),
            max_spills=128,  # of what the end wants
            maxnreg=MAX_REGS,
        )


def takes(case) -> bool:
    """Pages of 64 tokens or a multiple, DeepSeek-V3's latents."""
    return absorbed.takes(case) and (case.rank, case.rope_dim) == (512, 64) and case.page_size % TILE.value == 0


def _when(case) -> bool:
    return takes(case) and absorbed.worth_absorbing(case) and (not case.fp8 or case.known)


@mla_prefill.kernel(needs="sm90a", when=_when, interpretable=False, aot=_aot)
def absorbed_by_tma(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, num_context):
    q = head_linear(q_nope, w_uk.transpose(1, 2))
    if pages.dtype == torch.uint8:
        gathered = gather(pages, page_table, kv_lens, num_context, q.shape[2], q_rope.shape[2], q.dtype)
        pages, page_table = gathered.as_pages()
    return head_linear(attend(q, q_rope, pages, page_table, kv_lens, cu_q_lens, scale), w_uv)
