"""Absorbed, for --deterministic: contexts are summed in the order of ops/running_softmax.py, as mla_decode's are there.

What mla_decode's kernel of this order must do alike, beside that file's functions: tiles of tile_tokens(rank) tokens;
a score is one chain over the latent, then over the rotated key; fp8 latents are multiplied by their scales, exactly,
in the queries' dtype. One program keeps two states, that of the stretch and that of all before it, of half the columns
of a latent of 512 values: the two halves are two launches, each of which works out all scores. Decodes, of which there
may be few over long contexts, have a program for every stretch, and a second kernel that adds these up in turn.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanodeploy.config import triton_interpret
from nanodeploy.ops.head_linear.tiles import MANY, config, product
from nanodeploy.ops.layouts import SPLIT_TOKENS
from nanodeploy.ops.mla_prefill.absorbed import ROWS, find, takes
from nanodeploy.ops.mla_prefill.reference import mla_prefill
from nanodeploy.ops.mla_prefill.tokens import dims, load_tokens, strides, views
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E, add_stretch, add_tile, finish, places, tile_tokens

MAX_WIDTH = 256  # columns of a latent that a program adds up
NUM_WARPS, NUM_STAGES = 8, 2
ADDED_ROWS = 4  # rows whose stretches one program adds up
MAX_PARTIAL_BYTES = 2**29  # of the stretches' states; if they want more, one program takes them in turn


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
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROPE: tl.constexpr,
    UNIT: tl.constexpr,
    SLOT: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    SPREAD: tl.constexpr,
):
    """Program (tile of rows): columns PART * WIDTH on of their results. From the last rows to the first.

    Rows, tiles and loads are told in absorbed.py. PARTS (1 or 2) times WIDTH is what a latent takes. With SPREAD
    program (tile of rows, stretch), whose state goes to partial fp32 [stretches, T * H, RANK] and stats [.., 2].
    """
    KIND: tl.constexpr = q.dtype.element_ty
    tile_id = tl.num_programs(0) - 1 - tl.program_id(0)
    seq, q_begin, q_end, first_row = find(cu_q_lens, tile_id, num_heads, num_tokens, num_seqs, ROWS)
    if first_row >= (q_end - q_begin) * num_heads:
        return

    local = tl.arange(0, ROWS)
    rows = first_row + local
    present = rows < (q_end - q_begin) * num_heads
    dims = tl.arange(0, WIDTH)
    rope_dims = tl.arange(0, ROPE)
    output = tl.cast(q_begin, tl.int64) * num_heads + first_row
    inner = local[:, None] * RANK + dims[None, :]
    there = present[:, None] & (PART * WIDTH + dims < RANK)[None, :]
    if (seq < 0) | (seq == num_seqs):
        tl.store(out + output * RANK + PART * WIDTH + inner, tl.zeros([ROWS, WIDTH], KIND), mask=there)
        return

    kv_len = tl.load(kv_lens + seq)
    from_q = q + output * RANK + inner
    queries = tl.load(from_q, mask=present[:, None] & (dims < RANK)[None, :], other=0.0)
    if PARTS == 2:
        more_queries = tl.load(from_q + WIDTH, mask=present[:, None] & (WIDTH + dims < RANK)[None, :], other=0.0)
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
    if SPREAD:
        begin = tl.program_id(1) * SPLIT
        end = tl.minimum(end, begin + SPLIT)
        if begin >= end:
            return
    table = page_table + tl.cast(seq, tl.int64) * stride_table
    all_highest = tl.full([ROWS], float("-inf"), tl.float32)
    all_total = tl.zeros([ROWS], tl.float32)
    all_mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        columns = start + tl.arange(0, TILE)
        valid = columns < end
        page, offset = places(table, start, end, PAGE, TILE)
        at = page * stride_page + offset * SLOT
        latent, key = load_tokens(latents, scales, keys, at, valid, 0, WIDTH, RANK, R, ROPE, UNIT, KIND)
        # A product that Triton sees feed another works out each score twice (absorbed.py); hence the mask in between.
        seen = columns[None, :] <= limits[:, None]
        scores = tl.dot(queries, latent.T, input_precision="ieee")
        if start >= full:
            scores = tl.where(seen, scores, float("-inf"))
        values = latent
        if PARTS == 2:
            more, key = load_tokens(latents, scales, keys, at, valid, WIDTH, WIDTH, RANK, R, ROPE, UNIT, KIND)
            scores = tl.dot(more_queries, more.T, scores, input_precision="ieee")
            if start >= full:
                scores = tl.where(seen, scores, float("-inf"))
            if PART == 1:
                values = more
        scores = tl.dot(rotated, key.T, scores, input_precision="ieee")
        if start >= full:
            scores = tl.where(seen, scores, float("-inf"))
        if start % SPLIT == 0:  # the stretch before is complete
            all_highest, all_total, all_mixed = add_stretch(all_highest, all_total, all_mixed, highest, total, mixed)
            highest = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mixed = tl.zeros([ROWS, WIDTH], tl.float32)
        highest, total, mixed = add_tile(highest, total, mixed, scores, values, 127, 127, scale_log2, False)
    if SPREAD:
        output += tl.program_id(1).to(tl.int64) * num_tokens * num_heads
        tl.store(stats + output * 2 + local * 2, highest, mask=present)
        tl.store(stats + output * 2 + local * 2 + 1, total, mask=present)
        tl.store(partial + output * RANK + PART * WIDTH + inner, mixed, mask=there)
    else:
        all_highest, all_total, all_mixed = add_stretch(all_highest, all_total, all_mixed, highest, total, mixed)
        result = finish(all_highest, all_total, all_mixed, rows, present, False, False)
        tl.store(out + output * RANK + PART * WIDTH + inner, result.to(KIND), mask=there)


@triton.jit(do_not_specialize=["num_rows", "num_heads", "num_queries"])
def _add(
    partial, stats, kv_lens, out, num_rows, num_heads, num_queries,
    RANK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program p: rows (token, head) p * ROWS on of decodes with num_queries tokens each, the sum of their stretches."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < num_rows
    query = rows // num_heads
    kv_len = tl.load(kv_lens + query // num_queries, mask=present, other=0)
    seen = (kv_len - num_queries + query % num_queries + 1).to(tl.int32)  # tokens
    dims = tl.arange(0, WIDTH)
    inside = (dims < RANK)[None, :]
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(0, tl.max(seen, 0), SPLIT):
        at = tl.cast(start // SPLIT, tl.int64) * num_rows + rows
        there = start < seen
        its_highest = tl.load(stats + at * 2, mask=there, other=float("-inf"))
        its_total = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
        its_mixed = tl.load(partial + at[:, None] * RANK + dims[None, :], mask=there[:, None] & inside, other=0.0)
        highest, total, mixed = add_stretch(highest, total, mixed, its_highest, its_total, its_mixed)
    result = finish(highest, total, mixed, rows, present, False, False)
    tl.store(
        out + rows[:, None] * RANK + dims[None, :], result.to(out.dtype.element_ty), mask=present[:, None] & inside
    )


def attend(
    q: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    scale: float,
    num_queries: int = 0,
) -> Tensor:
    """Attention between the two products: q [T, H, rank] contiguous; returns [T, H, rank].

    num_queries: of decodes, how many tokens each sequence has; 0: chunks of any length.
    """
    num_tokens, num_heads, rank = q.shape
    num_seqs, rope_dim = page_table.shape[0], q_rope.shape[2]
    assert q.is_contiguous() and q_rope.stride(2) == pages.stride(2) == page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty_like(q)
    if num_tokens == 0:
        return out
    shape = dims(rank, rope_dim, pages)
    padded = shape.pop("WIDTH")
    width = min(padded, MAX_WIDTH)
    parts = triton.cdiv(rank, width)
    num_rows = num_tokens * num_heads
    stretches = triton.cdiv(page_table.shape[1] * pages.shape[1], SPLIT_TOKENS)
    spread = num_queries > 0 and stretches > 1 and stretches * num_rows * rank * 4 <= MAX_PARTIAL_BYTES
    rows = stretches * num_rows if spread else 0
    partial = torch.empty((rows, rank), dtype=torch.float32, device=q.device)
    stats = torch.empty((rows, 2), dtype=torch.float32, device=q.device)
    # Every fused multiply-add is written out: none is left to the compiler.
    options = {"enable_fp_fusion": False}
    for part in range(parts):
        _attend[(num_rows // ROWS + num_seqs + 2, stretches if spread else 1)](
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
            WIDTH=width,
            PARTS=parts,
            PART=part,
            ROWS=ROWS,
            TILE=tile_tokens(rank),
            SPLIT=SPLIT_TOKENS,
            STAGES=NUM_STAGES,
            SPREAD=spread,
            num_warps=NUM_WARPS,
            **shape,
            **options,
        )
    if spread:
        _add[(triton.cdiv(num_rows, ADDED_ROWS),)](
            *(partial, stats, kv_lens, out, num_rows, num_heads, num_queries),
            RANK=rank,
            WIDTH=padded,
            ROWS=ADDED_ROWS,
            SPLIT=SPLIT_TOKENS,
            num_warps=4,
            **options,
        )
    return out


def _aot():
    rope_strides = ("stride_rope", "stride_rope_head")
    integers = ("num_heads", "num_tokens", "num_seqs", *rope_strides, "stride_page", "stride_table")
    indices = dict.fromkeys(("page_table", "kv_lens", "cu_q_lens"), "*i32")
    for fp8, part, spread in (
        (False, 0, False),
        (False, 1, False),
        (True, 1, False),
        (False, 1, True),
        (True, 0, True),
    ):
        pointers = {"q": "*bf16", "q_rope": "*bf16", "latents": "*fp8e4nv" if fp8 else "*bf16", "keys": "*bf16"}
        pointers |= {"out": "*bf16", "partial": "*fp32", "stats": "*fp32"} | ({"scales": "*fp32"} if fp8 else {})
        constexprs = {
            "SPREAD": spread,
            "RANK": 512,
            "R": 64,
            "WIDTH": 256,
            "PARTS": 2,
            "PART": part,
            "ROPE": 64,
            "UNIT": 16,
        }
        constexprs |= {"SLOT": 41 if fp8 else 72, "PAGE": 64, "ROWS": ROWS, "TILE": tile_tokens(512)}
        yield Aot(
            _attend,
            pointers | indices | {"scale_log2": "fp32"} | dict.fromkeys(integers, "i32"),
            constexprs | {"SPLIT": SPLIT_TOKENS, "STAGES": NUM_STAGES} | ({} if fp8 else {"scales": None}),
            NUM_WARPS,
            divisible=(*pointers, *rope_strides, "stride_page"),
            wants=("wgmma", "cp.async"),
            max_spills=256 if fp8 else 8,  # a tile on its way from e4m3 takes registers
        )


def _each_head(x: Tensor, weight: Tensor) -> Tensor:
    """head_linear in its order k16: with any tiles; but NumPy, in the interpreter, sums by the shape of a tile."""
    num_tokens, num_heads, _ = x.shape
    chosen = MANY if triton_interpret() else config(num_tokens, num_heads, weight.shape[1])
    return product(x, weight, x.new_empty((num_tokens, num_heads, weight.shape[1])), chosen)


@mla_prefill.kernel(needs="sm80", when=takes, batch_invariant=True, order="stretches", aot=_aot)
def fixed_order(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, num_context):
    q = _each_head(q_nope, w_uk.transpose(1, 2))
    return _each_head(attend(q, q_rope, pages, page_table, kv_lens, cu_q_lens, scale), w_uv)
