"""Absorbed: w_uk multiplied into the queries and w_uv into the results, so that all heads read one latent per token.

Between the two products this is attention with one kv head of rank + R values, whose keys are values too. Rows are
(token, head) pairs of one sequence: 64 of them go over its latents together. Eight warps hold their [64, rank] fp32
results, four each half of the columns, and no more rows fit. Few rows over long contexts fill no machine: a context is
then cut into as many parts as it takes, which a second kernel adds up.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanodeploy.ops import machine
from nanodeploy.ops.head_linear import head_linear
from nanodeploy.ops.mla_prefill.reference import mla_prefill
from nanodeploy.ops.mla_prefill.tokens import dims, gather, load_tokens, strides, views
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E, places

ROWS = 64  # (token, head) pairs per program
MAX_SPLITS = 16
ADDED_ROWS = 4  # rows whose parts one program adds up
LEAST_PART = 512  # tokens of context that are worth a program of their own
LEAST_ROWS = 256  # of a sequence, on average: from so many on its fp8 latents are converted once, not by every program
# Queries of a context from so many on, on average, that are always worth making its keys and values for: by count of
# operations it is 170 (NOTES.md). The measured table may say so for fewer.
EXPAND_FROM = 256
LOWEST = tl.constexpr(-3.0e38)  # a maximum before any score: finite, so that a tile of hidden scores adds nothing


@triton.jit
def find(cu_q_lens, tile_id, num_heads, num_tokens, num_seqs, ROWS: tl.constexpr):
    """The sequence of a tile of rows, its first token, its end, and the tile's first row in it.

    Sequence s owns the tiles from cu_q_lens[s] * num_heads // ROWS + s + 1 on, which is always room enough. The tokens
    before the first and after the last sequence are two more, -1 and num_seqs.
    """
    seq = -1
    for block in range(0, num_seqs + 1, 128):
        seqs = block + tl.arange(0, 128)
        inside = seqs <= num_seqs
        starts = tl.load(cu_q_lens + seqs, mask=inside, other=0).to(tl.int64) * num_heads // ROWS + seqs + 1
        seq += tl.sum((inside & (starts <= tile_id)).to(tl.int32), 0)
    q_begin, first_tile, q_end = 0, tl.cast(0, tl.int64), num_tokens
    if seq >= 0:
        q_begin = tl.load(cu_q_lens + seq)
        first_tile = tl.cast(q_begin, tl.int64) * num_heads // ROWS + seq + 1
    if seq < num_seqs:
        q_end = tl.load(cu_q_lens + seq + 1)
    return seq, q_begin, q_end, ((tile_id - first_tile) * ROWS).to(tl.int32)


# One compilation for any lengths and any slice of the batch's rows.
@triton.jit(
    do_not_specialize=["num_heads", "num_tokens", "num_seqs", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens", "cu_q_lens"],
)
def _attend(
    q,
    q_rope,
    latents,
    scales,
    keys,
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
    stride_page,
    stride_table,
    RANK: tl.constexpr,
    R: tl.constexpr,
    WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    UNIT: tl.constexpr,
    SLOT: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Program (tile of rows, part of its context). Tiles run from the last row to the first: long contexts first.

    With SPLIT a part's sum goes to partial fp32 [parts, T * H, RANK], and its (maximum, total) to stats.
    """
    KIND: tl.constexpr = q.dtype.element_ty
    tile_id = tl.num_programs(0) - 1 - tl.program_id(0)
    part = tl.program_id(1)
    seq, q_begin, q_end, first_row = find(cu_q_lens, tile_id, num_heads, num_tokens, num_seqs, ROWS)
    if first_row >= (q_end - q_begin) * num_heads:
        return

    local = tl.arange(0, ROWS)
    rows = first_row + local
    present = rows < (q_end - q_begin) * num_heads
    dims = tl.arange(0, WIDTH)
    rope_dims = tl.arange(0, ROPE)
    # A sequence's rows lie one after another in q and out.
    output = tl.cast(q_begin, tl.int64) * num_heads + first_row
    inner = local[:, None] * RANK + dims[None, :]
    there = present[:, None] & (dims < RANK)[None, :]
    if (seq < 0) | (seq == num_seqs):
        if part == 0:
            tl.store(out + output * RANK + inner, tl.zeros([ROWS, WIDTH], KIND), mask=there)
        return

    kv_len = tl.load(kv_lens + seq)
    queries = tl.load(q + output * RANK + inner, mask=there, other=0.0)
    tokens = (q_begin + rows // num_heads).to(tl.int64)
    rotated = tl.load(
        q_rope + (tokens * stride_rope + rows % num_heads * stride_rope_head)[:, None] + rope_dims[None, :],
        mask=present[:, None] & (rope_dims < R)[None, :],
        other=0.0,
    )
    context = kv_len - (q_end - q_begin)
    limits = context + rows // num_heads  # the last position that each row sees
    end = tl.minimum(context + (first_row + ROWS - 1) // num_heads + 1, kv_len)
    full = (context + first_row // num_heads + 1) // TILE * TILE  # every row sees all that is before
    begin = 0
    if SPLIT:
        size = tl.cdiv(tl.cdiv(end, TILE), tl.num_programs(1)) * TILE
        begin = part * size
        end = tl.minimum(end, begin + size)
        if begin >= end:
            at = tl.cast(part, tl.int64) * num_tokens * num_heads + output + local
            tl.store(stats + at * 2 + 1, tl.zeros([ROWS], tl.float32), mask=present)
            return
    table = page_table + tl.cast(seq, tl.int64) * stride_table
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        columns = start + tl.arange(0, TILE)
        page, offset = places(table, start, end, PAGE, TILE)
        at = page * stride_page + offset * SLOT
        latent, key = load_tokens(latents, scales, keys, at, columns < end, 0, WIDTH, RANK, R, ROPE, UNIT, KIND)
        # Triton gives a product whose result another one takes, as far as it can see, to one axis of warps: here that
        # would be each score twice. It does not see through an `if`.
        scores = tl.dot(queries, latent.T, input_precision="ieee")
        if start >= full:
            scores = tl.where(columns[None, :] <= limits[:, None], scores, float("-inf"))
        scores = tl.dot(rotated, key.T, scores, input_precision="ieee")
        if start >= full:
            scores = tl.where((columns < end)[None, :], scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        shrink = tl.exp2(highest - risen)
        weights = tl.exp2(scores * scale_log2 - risen[:, None])
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(KIND), latent, mixed * shrink[:, None], input_precision="ieee")
        highest = risen
    if SPLIT:
        output += part.to(tl.int64) * num_tokens * num_heads
        tl.store(stats + output * 2 + local * 2, highest, mask=present)
        tl.store(stats + output * 2 + local * 2 + 1, total, mask=present)
        tl.store(partial + output * RANK + inner, mixed, mask=there & (total > 0)[:, None])
    else:
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]  # a decode's query may lie before its context
        tl.store(out + output * RANK + inner, result.to(KIND), mask=there)


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_seqs", "num_parts"])
def _add(
    partial, stats, cu_q_lens, out, num_rows, num_heads, num_seqs, num_parts,
    RANK: tl.constexpr, WIDTH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Program p: rows (token, head) p * HEADS on, each the sum of its parts. Rows of nobody are zero already."""
    rows = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    first, last = tl.load(cu_q_lens), tl.load(cu_q_lens + num_seqs)
    present = (rows >= tl.cast(first, tl.int64) * num_heads) & (rows < tl.cast(last, tl.int64) * num_heads)
    dims = tl.arange(0, WIDTH)
    inside = (dims < RANK)[None, :]
    highest = tl.full([HEADS], LOWEST, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mixed = tl.zeros([HEADS, WIDTH], tl.float32)
    for part in range(num_parts):
        at = tl.cast(part, tl.int64) * num_rows + rows
        its_total = tl.load(stats + at * 2 + 1, mask=present, other=0.0)
        its_highest = tl.load(stats + at * 2, mask=its_total > 0, other=LOWEST)
        its_mixed = tl.load(
            partial + at[:, None] * RANK + dims[None, :], mask=(its_total > 0)[:, None] & inside, other=0.0
        )
        risen = tl.maximum(highest, its_highest)
        shrink, weight = tl.exp2(highest - risen), tl.exp2(its_highest - risen)
        total = total * shrink + its_total * weight
        mixed = mixed * shrink[:, None] + its_mixed * weight[:, None]
        highest = risen
    result = mixed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out + rows[:, None] * RANK + dims[None, :], result.to(out.dtype.element_ty), mask=present[:, None] & inside
    )


@dataclass(frozen=True)
class Config:
    tile: int  # tokens of context per round
    num_warps: int
    num_stages: int


def pick(fp8: bool) -> Config:
    return Config(32, 8, 2) if fp8 else Config(64, 8, 2)


def configs(fp8: bool) -> list[Config]:
    """What a sweep tries; the first is `pick`'s."""
    shapes = [(32, 8, 3), (64, 8, 1)] if fp8 else [(32, 8, 3), (32, 8, 4), (64, 8, 1)]
    return [pick(fp8), *(Config(*shape) for shape in shapes)]


def num_parts(num_tiles: int, max_context: int) -> int:
    """Into how many parts contexts are cut so that every SM has one: from shapes alone. num_tiles: those with rows."""
    return max(1, min(machine.num_sms() // max(1, num_tiles), MAX_SPLITS, max_context // LEAST_PART))


def attend(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    scale: float,
    config: Config,
    parts: int | None = None,
) -> Tensor:
    """Attention between the two products: q [T, H, rank] contiguous; returns [T, H, rank]."""
    num_tokens, num_heads, rank = q.shape
    num_seqs, rope_dim = page_table.shape[0], q_rope.shape[2]
    assert q.is_contiguous() and q_rope.stride(2) == pages.stride(2) == page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    num_tiles = num_tokens * num_heads // ROWS + num_seqs + 2
    if parts is None:
        parts = num_parts(num_tiles, page_table.shape[1] * pages.shape[1])
    shape = dims(rank, rope_dim, pages)
    rows = parts * num_tokens * num_heads if parts > 1 else 0
    partial = torch.empty((rows, rank), dtype=torch.float32, device=q.device)
    stats = torch.empty((rows, 2), dtype=torch.float32, device=q.device)
    _attend[(num_tiles, parts)](
        q,
        q_rope,
        *views(pages),
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
        strides(pages)[1],
        page_table.stride(0),
        ROWS=ROWS,
        TILE=config.tile,
        STAGES=config.num_stages,
        SPLIT=parts > 1,
        num_warps=config.num_warps,
        **shape,
    )
    if parts > 1:
        add(partial, stats, cu_q_lens, out, parts)
    return out


def add(partial: Tensor, stats: Tensor, cu_q_lens: Tensor, out: Tensor, parts: int) -> None:
    """Into out [T, H, rank] what `_attend` found of the parts."""
    num_tokens, num_heads, rank = out.shape
    num_rows = num_tokens * num_heads
    _add[(triton.cdiv(num_rows, ADDED_ROWS),)](
        *(partial, stats, cu_q_lens, out, num_rows, num_heads, cu_q_lens.shape[0] - 1, parts),
        RANK=rank,
        WIDTH=max(16, triton.next_power_of_2(rank)),
        HEADS=ADDED_ROWS,
        num_warps=4,
    )


def aot_of(config: Config, fp8: bool, split: bool) -> Aot:
    pointers = {"q": "*bf16", "q_rope": "*bf16", "latents": "*fp8e4nv" if fp8 else "*bf16", "keys": "*bf16"}
    pointers |= {"scales": "*fp32"} if fp8 else {}
    pointers |= {"out": "*bf16", "partial": "*fp32", "stats": "*fp32"}
    indices = dict.fromkeys(("page_table", "kv_lens", "cu_q_lens"), "*i32")
    rope_strides = ("stride_rope", "stride_rope_head")
    integers = ("num_heads", "num_tokens", "num_seqs", *rope_strides, "stride_page", "stride_table")
    constexprs = {"RANK": 512, "R": 64, "WIDTH": 512, "ROPE": 64, "ROWS": ROWS}
    constexprs |= {"UNIT": 16, "SLOT": 41 if fp8 else 72, "PAGE": 64}
    constexprs |= {"TILE": config.tile, "STAGES": config.num_stages, "SPLIT": split}
    return Aot(
        _attend,
        pointers | indices | {"scale_log2": "fp32"} | dict.fromkeys(integers, "i32"),
        constexprs | ({} if fp8 else {"scales": None}),
        config.num_warps,
        divisible=(*pointers, *rope_strides, "stride_page"),
        wants=("wgmma", "cp.async"),
        max_spills=160,  # of what the end wants; none in the loop
    )


def _aot():
    for fp8 in (False, True):
        for split in (False, True):
            yield aot_of(pick(fp8), fp8, split)


def takes(case) -> bool:
    sixteen_bits = case.dtype in (torch.bfloat16, torch.float16)
    return sixteen_bits and case.rank <= 512 and case.rope_dim <= 64 and case.page_size % 16 == 0


def expandable(case) -> bool:
    """What expanded.py takes: only where the host knows how long the contexts are, as asking the device would stop the
    host, and fit no graph."""
    return case.known and takes(case) and max(case.nope_dim, case.value_dim) <= 256


def worth_absorbing(case) -> bool:
    return not (expandable(case) and case.tokens_per_seq >= EXPAND_FROM)


@mla_prefill.kernel(needs="sm80", when=lambda case: takes(case) and worth_absorbing(case), aot=_aot)
def absorbed(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, num_context):
    q = head_linear(q_nope, w_uk.transpose(1, 2))
    num_tokens, num_heads, rank = q.shape
    if pages.dtype == torch.uint8 and num_context and num_tokens * num_heads >= LEAST_ROWS * len(kv_lens):
        gathered = gather(pages, page_table, kv_lens, num_context, rank, q_rope.shape[2], q.dtype)
        pages, page_table = gathered.as_pages()
    config = pick(pages.dtype == torch.uint8)
    return head_linear(attend(q, q_rope, pages, page_table, kv_lens, cu_q_lens, scale, config), w_uv)
