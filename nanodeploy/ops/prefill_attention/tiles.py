"""Causal attention in tiles of packed rows: (token, head of one kv head's group) pairs, 128 at a time.

The running softmax is FlashAttention-2's (arXiv:2307.08691). The loop is staggered by one tile, FlashAttention-3's
overlap inside a warp group (arXiv:2407.08608, section 3.2): while the tensor cores multiply tile i-1's weights with its
values, the other units work out tile i's softmax. NOTES.md says what in the source Triton needs for that to come true.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nanodeploy.ops.prefill_attention.reference import prefill_attention
from nanodeploy.ops.registry import Aot

LOG2_E = 1.4426950408889634


# One compilation for any lengths and any slice of the batch's rows.
@triton.jit(
    do_not_specialize=["group", "num_tokens", "num_seqs", "stride_table"],
    do_not_specialize_on_alignment=["page_table", "kv_lens", "cu_q_lens"],
)
def _attend(
    q,
    kv_pages,
    page_table,
    kv_lens,
    cu_q_lens,
    out,
    scale_log2,
    group,
    num_tokens,
    num_seqs,
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
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Program (tile of rows, kv head). Tiles run from the last row to the first: long contexts start early.

    Sequence s owns the tiles from cu_q_lens[s] * group // BLOCK_M + s on, which is always room enough; so the grid
    needs no lengths. The padding rows are one more sequence, whose tiles write zeros.
    """
    tile_id = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = -1
    for first in range(0, num_seqs + 1, 128):
        seqs = first + tl.arange(0, 128)
        inside = seqs <= num_seqs
        starts = tl.load(cu_q_lens + seqs, mask=inside, other=0) * group // BLOCK_M + seqs
        seq += tl.sum((inside & (starts <= tile_id)).to(tl.int32), 0)
    q_begin = tl.load(cu_q_lens + seq)
    q_end = num_tokens
    if seq < num_seqs:
        q_end = tl.load(cu_q_lens + seq + 1)
    first_row = (tile_id - q_begin * group // BLOCK_M - seq) * BLOCK_M
    if first_row >= (q_end - q_begin) * group:
        return

    rows = first_row + tl.arange(0, BLOCK_M)
    present = rows < (q_end - q_begin) * group
    tokens = (q_begin + rows // group).to(tl.int64)
    heads = kv_head * group + rows % group
    dims = tl.arange(0, HEAD_DIM)
    where = out + (tokens * (tl.num_programs(1) * group) + heads)[:, None] * HEAD_DIM + dims[None, :]
    if seq == num_seqs:
        tl.store(where, tl.zeros([BLOCK_M, HEAD_DIM], out.dtype.element_ty), mask=present[:, None])
        return

    kv_len = tl.load(kv_lens + seq)
    queries = tl.load(
        q + (tokens * stride_q_token + heads * stride_q_head)[:, None] + dims[None, :], mask=present[:, None], other=0.0
    )
    context = kv_len - (q_end - q_begin)
    limits = context + rows // group  # the last position that each row sees
    end = tl.minimum(context + (first_row + BLOCK_M - 1) // group + 1, kv_len)
    full = (context + first_row // group + 1) // BLOCK_N * BLOCK_N  # every row sees all that is before
    table = page_table + tl.cast(seq, tl.int64) * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, :]
    tile = tl.arange(0, BLOCK_N)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    # What the tile before left to do: its weights, the shrink of `mixed` that they assume, where its values lie.
    weights = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    shrink = tl.full([BLOCK_M], 1.0, tl.float32)
    if PAGE % BLOCK_N == 0:
        slot_before = tl.full([], 0, tl.int64)
    else:
        slot_before = tl.zeros([BLOCK_N], tl.int64)
    for start in tl.range(0, end + BLOCK_N, BLOCK_N, num_stages=NUM_STAGES):  # the last round: values only
        columns = start + tile
        valid = columns < end
        valid_before = (columns >= BLOCK_N) & (columns - BLOCK_N < end)
        # Page ids and rows past the end are never loaded: the table holds garbage there, the pages other owners' data.
        if PAGE % BLOCK_N == 0:
            page = tl.load(table + start // PAGE, mask=start < end, other=0).to(tl.int64)
            slot = page * stride_page + (start % PAGE) * stride_slot
            at = slot + (tile * stride_slot)[:, None]
            at_before = slot_before + stride_kv + (tile * stride_slot)[:, None]
        else:
            page = tl.load(table + columns // PAGE, mask=valid, other=0).to(tl.int64)
            slot = page * stride_page + (columns % PAGE) * stride_slot
            at = slot[:, None]
            at_before = (slot_before + stride_kv)[:, None]
        k = tl.load(keys + at, mask=valid[:, None], other=0.0)
        v = tl.load(keys + at_before, mask=valid_before[:, None], other=0.0)
        slot_before = slot
        scores = tl.dot(queries, k.T, input_precision="ieee")
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        if start >= full:
            scores = tl.where(valid[None, :] & (columns[None, :] <= limits[:, None]), scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - risen[:, None])
        shrink = tl.exp2(highest - risen)
        total = total * shrink + tl.sum(weights, 1)
        highest = risen
    tl.store(where, (mixed / total[:, None]).to(out.dtype.element_ty), mask=present[:, None])


@dataclass(frozen=True)
class Config:
    block_m: int  # packed rows per program
    block_n: int  # tokens of context per round
    num_warps: int
    num_stages: int


def pick(head_dim: int, itemsize: int) -> Config:
    """The configuration for a head of `head_dim` values of `itemsize` bytes. One per head_dim: a row's bits must not
    depend on how many others there are."""
    if itemsize == 4:
        return Config(32, 16, 8, 2) if head_dim == 256 else Config(32, 16, 4, 3)
    # 64 rows and two programs per SM: one's softmax fills the other's start and end (428 against 417 TFLOP/s at 2x8192).
    return {64: Config(128, 64, 8, 3), 128: Config(64, 64, 4, 3), 256: Config(128, 32, 8, 3)}[head_dim]


def configs(head_dim: int) -> list[Config]:
    """What a sweep tries for 16-bit dtypes; the first is `pick`'s."""
    shipped = pick(head_dim, 2)
    others = {
        64: [(128, 64, 8, 4), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
        128: [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 4), (128, 128, 8, 2), (64, 64, 4, 2)],
        256: [(128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 3)],
    }
    return [shipped, *(Config(*other) for other in others[head_dim])]


def launch(q, kv_pages, page_table, kv_lens, cu_q_lens, scale, config: Config):
    num_tokens, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    num_seqs = page_table.shape[0]
    group = num_heads // num_kv_heads
    assert q.stride(2) == 1 and kv_pages.stride(4) == 1 and page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    num_tiles = num_tokens * group // config.block_m + num_seqs + 1
    _attend[(num_tiles, num_kv_heads)](
        q,
        kv_pages,
        page_table,
        kv_lens,
        cu_q_lens,
        out,
        scale * LOG2_E,
        group,
        num_tokens,
        num_seqs,
        *q.stride()[:2],
        *kv_pages.stride()[:4],
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out


def aot_of(config: Config, head_dim: int, page_size: int, wants: tuple[str, ...], dtype: str = "*bf16") -> Aot:
    pointers = {
        "q": dtype,
        "kv_pages": dtype,
        "page_table": "*i32",
        "kv_lens": "*i32",
        "cu_q_lens": "*i32",
        "out": dtype,
    }
    strides = ("stride_q_token", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    integers = dict.fromkeys(("group", "num_tokens", "num_seqs", *strides, "stride_table"), "i32")
    constexprs = {"HEAD_DIM": head_dim, "PAGE": page_size}
    constexprs |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "NUM_STAGES": config.num_stages}
    return Aot(
        _attend,
        {**pointers, "scale_log2": "fp32", **integers},
        constexprs,
        config.num_warps,
        divisible=("q", "kv_pages", "out", *strides),
        wants=wants,
    )


def _aot():
    for head_dim, page_size in ((128, 64), (128, 16), (128, 256), (64, 64), (256, 64), (256, 16)):
        yield aot_of(pick(head_dim, 2), head_dim, page_size, ("wgmma", "cp.async"))
    yield aot_of(pick(128, 4), 128, 64, ("cp.async",), "*fp32")


def _takes(case) -> bool:
    return case.head_dim in (64, 128, 256) and case.group <= 16 and case.page_size % 16 == 0


@prefill_attention.kernel(needs="sm80", when=_takes, batch_invariant=True, aot=_aot)
def tiles(q, kv_pages, page_table, kv_lens, cu_q_lens, scale):
    return launch(q, kv_pages, page_table, kv_lens, cu_q_lens, scale, pick(q.shape[2], q.element_size()))
