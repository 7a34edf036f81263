"""How kernels read latent pages, and how the contexts of a step are written out one after another."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanodeploy.ops.layouts import E4M3
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import places

ALIGN = 128  # rows; those past a sequence's end are zero, so that a tile over them needs no masks
GATHERED = 32  # rows per program


@triton.jit
def load_tokens(
    latents, scales, keys, at, valid,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, R: tl.constexpr, ROPE: tl.constexpr,
    UNIT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """What the cache holds of tokens: WIDTH values of the latents [N, WIDTH] from FIRST on, and the keys [N, ROPE], of
    dtype KIND; zeros where not valid [N], and past RANK and R, which need not be powers of two.

    at [N]: where the tokens lie, in UNITs of bytes. The pages as three tensors: latents, the scales of fp8 latents
    (else None), and rotated keys.
    """
    FP8: tl.constexpr = scales is not None
    dims = FIRST + tl.arange(0, WIDTH)
    there = valid[:, None]
    if FIRST + WIDTH > RANK:
        there = there & (dims < RANK)[None, :]
    size: tl.constexpr = 1 if FP8 else 2
    latent = tl.load(latents + (at * (UNIT // size))[:, None] + dims[None, :], mask=there, other=0.0)
    if FP8:
        blocks: tl.constexpr = WIDTH // 128
        block = FIRST // 128 + tl.arange(0, blocks)
        there = valid[:, None] & (block < RANK // 128)[None, :]
        scale = tl.load(scales + (at * (UNIT // 4))[:, None] + (RANK // 4 + block)[None, :], mask=there, other=0.0)
        # By way of fp32: straight from e4m3 to bf16, Triton takes an instruction of a sixteenth of the others' rate.
        latent = latent.to(tl.float16).to(tl.float32).to(KIND)
        # Powers of two: the products are exact in bf16.
        split = tl.reshape(latent, [at.shape[0], blocks, 128]) * scale.to(KIND)[:, :, None]
        latent = tl.reshape(split, [at.shape[0], WIDTH])
    key_start: tl.constexpr = (RANK + RANK // 32) // 2 if FP8 else RANK
    rope_dims = tl.arange(0, ROPE)
    there = valid[:, None]
    if R != ROPE:
        there = there & (rope_dims < R)[None, :]
    key_at = (at * (UNIT // 2))[:, None] + (key_start + rope_dims)[None, :]
    return latent, tl.load(keys + key_at, mask=there, other=0.0).to(KIND)


# One compilation for any lengths and any slice of the batch's rows.
@triton.jit(do_not_specialize=["num_seqs", "stride_table"], do_not_specialize_on_alignment=["page_table", "kv_lens"])
def _gather(
    latents, scales, keys, page_table, kv_lens, out, starts, num_seqs, stride_page, stride_table,
    RANK: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, ROPE: tl.constexpr, UNIT: tl.constexpr,
    SLOT: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Program p: rows p * ROWS on of out [N, RANK + R]. Writes into starts [S] where each sequence begins."""
    first_row = tl.program_id(0) * ROWS
    tile = first_row // ALIGN
    seq, begin, before = 0, 0, 0
    for block in range(0, num_seqs, 128):
        seqs = block + tl.arange(0, 128)
        lens = tl.load(kv_lens + seqs, mask=seqs < num_seqs, other=0)
        ends = before + tl.cumsum((lens + ALIGN - 1) // ALIGN, 0)
        mine = (seqs < num_seqs) & (ends <= tile)
        seq += tl.sum(mine.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(mine, ends, 0), 0))
        before = tl.max(ends, 0)
    if seq == num_seqs:
        return
    start = first_row - begin * ALIGN
    if start == 0:
        tl.store(starts + seq, first_row)
    kv_len = tl.load(kv_lens + seq)
    columns = start + tl.arange(0, ROWS)
    table = page_table + tl.cast(seq, tl.int64) * stride_table
    page, offset = places(table, start, kv_len, PAGE, ROWS)
    kind: tl.constexpr = out.dtype.element_ty
    at = page * stride_page + offset * SLOT
    latent, key = load_tokens(latents, scales, keys, at, columns < kv_len, 0, WIDTH, RANK, R, ROPE, UNIT, kind)
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * (RANK + R)
    columns = tl.arange(0, WIDTH)[None, :]
    tl.store(out + rows + columns, latent, mask=columns < RANK)
    columns = tl.arange(0, ROPE)[None, :]
    tl.store(out + rows + RANK + columns, key, mask=columns < R)


def views(pages: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Pages as `load_tokens` wants them: latents, scales, keys."""
    if pages.dtype != torch.uint8:
        return pages, None, pages
    return pages.view(E4M3), pages.view(torch.float32), pages.view(torch.bfloat16)


def strides(pages: Tensor) -> tuple[int, int, int]:
    """(unit, stride of a page, of a slot): the largest unit in bytes, to 16, in which the strides are whole numbers."""
    size = pages.element_size()
    page, slot = pages.stride(0) * size, pages.stride(1) * size
    unit = math.gcd(16, page, slot)
    return unit, page // unit, slot // unit


def dims(rank: int, rope_dim: int, pages: Tensor) -> dict[str, int]:
    """The constexprs that say how a token looks."""
    padded = max(16, triton.next_power_of_2(rank)), max(16, triton.next_power_of_2(rope_dim))
    widths = {"RANK": rank, "R": rope_dim, "WIDTH": padded[0], "ROPE": padded[1]}
    unit, _, slot = strides(pages)
    return {**widths, "UNIT": unit, "SLOT": slot, "PAGE": pages.shape[1]}


class Gathered(NamedTuple):
    """The contexts' latents and rotated keys, sequence after sequence."""

    tokens: Tensor  # [N, rank + R]
    starts: Tensor  # [S] int32: the first row of each sequence that has any

    def as_pages(self) -> tuple[Tensor, Tensor]:
        """(pages [N / ALIGN, ALIGN, rank + R], page table [S, N / ALIGN] int32)."""
        pages = self.tokens.unflatten(0, (-1, ALIGN))
        order = torch.arange(pages.shape[0], dtype=torch.int32, device=pages.device)
        return pages, (self.starts // ALIGN)[:, None] + order


def gather(
    pages: Tensor, page_table: Tensor, kv_lens: Tensor, num_context: int, rank: int, rope_dim: int, kind: torch.dtype
) -> Gathered:
    """num_context: what the sum of kv_lens is at most; 0 asks the device."""
    num_seqs = page_table.shape[0]
    num_rows = ((num_context or int(kv_lens.sum())) // ALIGN + num_seqs) * ALIGN
    tokens = torch.empty((num_rows, rank + rope_dim), dtype=kind, device=pages.device)
    starts = torch.empty(num_seqs, dtype=torch.int32, device=pages.device)
    _gather[(num_rows // GATHERED,)](
        *views(pages),
        page_table,
        kv_lens,
        tokens,
        starts,
        num_seqs,
        strides(pages)[1],
        page_table.stride(0),
        ROWS=GATHERED,
        ALIGN=ALIGN,
        num_warps=8,
        **dims(rank, rope_dim, pages),
    )
    return Gathered(tokens, starts)


def gather_aot(fp8: bool) -> Aot:
    pointers = {"latents": "*fp8e4nv" if fp8 else "*bf16", "keys": "*bf16", "out": "*bf16"}
    pointers |= {"scales": "*fp32"} if fp8 else {}
    indices = dict.fromkeys(("page_table", "kv_lens", "starts"), "*i32")
    constexprs = {"RANK": 512, "R": 64, "WIDTH": 512, "ROPE": 64, "UNIT": 16, "SLOT": 41 if fp8 else 72, "PAGE": 64}
    constexprs |= {"ROWS": GATHERED, "ALIGN": ALIGN}
    return Aot(
        _gather,
        {**pointers, **indices, **dict.fromkeys(("num_seqs", "stride_page", "stride_table"), "i32")},
        constexprs | ({} if fp8 else {"scales": None}),
        8,
        divisible=(*pointers, "stride_page"),
    )
