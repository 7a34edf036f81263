"""Split-KV decoding: each program reads one stretch of one sequence's cache for one kv head; a second kernel combines.

The query heads of a kv head are packed into the rows of one matrix product (Flash-Decoding; arXiv:2205.14135 for the
running softmax), so every key and value is read once. The grid depends on shapes alone and each program finds its
stretch from kv_lens on the device: a CUDA graph captured with some lengths is right for any others.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanodeploy.ops import machine
from nanodeploy.ops.decode_attention.reference import decode_attention
from nanodeploy.ops.registry import Aot

MAX_SPLITS = 128
LOG2_E = 1.4426950408889634


# One compilation for any batch and any slice of its rows.
@triton.jit(
    do_not_specialize=["group", "num_splits", "stride_table"], do_not_specialize_on_alignment=["page_table", "kv_lens"]
)
def _attend(
    q,
    kv_pages,
    page_table,
    kv_lens,
    out,
    partial,
    lse,
    scale_log2,
    group,
    num_splits,
    stride_q_seq,
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
    MIN_TILES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (kv head, split, sequence). Writes `out` itself where the sequence has one split only."""
    if PDL:
        gdc_launch_dependents()
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    kv_len = tl.load(kv_lens + seq)
    tiles = tl.cdiv(kv_len, BLOCK_N)
    per_split = tl.maximum(tl.cdiv(tiles, num_splits), MIN_TILES)
    if split > 0 and split * per_split >= tiles:
        return
    begin = split * per_split * BLOCK_N
    end = tl.minimum(begin + per_split * BLOCK_N, kv_len)

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    tile = tl.arange(0, BLOCK_N)
    heads = kv_head * group + rows
    present = rows < group
    queries = tl.load(
        q + seq * stride_q_seq + heads[:, None] * stride_q_head + dims[None, :], mask=present[:, None], other=0.0
    )
    table = page_table + seq * stride_table
    keys = kv_pages + kv_head * stride_head + dims[None, :]
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    for start in range(begin, end, BLOCK_N):
        tokens = start + tile
        valid = tokens < end
        # Page ids and rows past the end are never loaded: the table holds garbage there, the pages other owners' data.
        if PAGE % BLOCK_N == 0:
            page = tl.load(table + start // PAGE).to(tl.int64)
            slots = (page * stride_page + (start % PAGE) * stride_slot) + (tile * stride_slot)[:, None]
        else:
            page = tl.load(table + tokens // PAGE, mask=valid, other=0).to(tl.int64)
            slots = (page * stride_page + (tokens % PAGE) * stride_slot)[:, None]
        k = tl.load(keys + slots, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
        v = tl.load(keys + slots + stride_kv, mask=valid[:, None], other=0.0, eviction_policy="evict_first")
        scores = tl.dot(queries, k.T, input_precision="ieee") * scale_log2
        scores = tl.where(valid[None, :], scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - risen[:, None])
        shrink = tl.exp2(highest - risen)
        total = total * shrink + tl.sum(weights, 1)
        mixed = tl.dot(weights.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        highest = risen

    total = tl.where(total == 0, 1.0, total)  # an empty sequence: zeros
    result = mixed / total[:, None]
    row = seq * (tl.num_programs(0) * group) + heads
    if tiles > per_split:
        row = row * num_splits + split
        tl.store(partial + row[:, None] * HEAD_DIM + dims[None, :], result, mask=present[:, None])
        tl.store(lse + row, highest + tl.log2(total), mask=present)
    else:
        where = out + row[:, None] * HEAD_DIM + dims[None, :]
        tl.store(where, result.to(out.dtype.element_ty), mask=present[:, None])


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=["kv_lens"])
def _combine(
    partial,
    lse,
    kv_lens,
    out,
    num_splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (dims, head, sequence): the softmax-weighted mean of the splits' results, always in the splits' order."""
    seq = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(tl.load(kv_lens + seq), BLOCK_N)
    per_split = tl.maximum(tl.cdiv(tiles, num_splits), MIN_TILES)
    if tiles <= per_split:
        return
    if PDL:
        gdc_wait()
    row = seq * tl.num_programs(1) + tl.program_id(1)
    dims = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    splits = tl.arange(0, BLOCK_SPLITS)
    used = splits < tl.cdiv(tiles, per_split)
    at = row * num_splits + splits
    logs = tl.load(lse + at, mask=used, other=float("-inf"))
    results = tl.load(partial + at[:, None] * HEAD_DIM + dims[None, :], mask=used[:, None], other=0.0)
    weights = tl.exp2(logs - tl.max(logs, 0))
    mean = tl.sum(results * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + row * HEAD_DIM + dims, mean.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Config:
    """How the work is cut. `programs_per_sm` sets the number of splits, `min_tokens` the shortest split."""

    block_n: int  # tokens per tile
    num_warps: int
    num_stages: int  # Triton halves it, as the page id's load comes before the page's: 5 gives 2 tiles in flight
    programs_per_sm: int = 8
    min_tokens: int = 128
    pdl: bool = False  # let the combining kernel start while the last splits run

    @property
    def constexprs(self) -> dict[str, Any]:
        """What both kernels are told of it."""
        return {"BLOCK_N": self.block_n, "MIN_TILES": max(1, self.min_tokens // self.block_n), "PDL": self.pdl}


def pick(head_dim: int, itemsize: int) -> Config:
    """The configuration for a head of `head_dim` values of `itemsize` bytes."""
    if itemsize == 4:
        return Config({64: 32, 128: 16, 256: 16}[head_dim], 4, 5)
    # bench/sweeps/decode_attention.py on an H200: four programs per SM with three tiles in flight each beat eight with
    # two at every shape but B256 ctx1024, where they are equal; wide heads have room for two.
    return {64: Config(128, 4, 5, 4), 128: Config(64, 4, 7, 4), 256: Config(32, 4, 5, 2)}[head_dim]


def configs(head_dim: int) -> list[Config]:
    """What a sweep tries for 16-bit dtypes; the first is `pick`'s."""
    shipped = pick(head_dim, 2)
    half, num_tokens = shipped.block_n // 2, shipped.block_n
    tiles = [(num_tokens, 4, 5), (num_tokens, 4, 7), (half, 4, 7), (half, 4, 9), (half, 2, 7), (num_tokens, 8, 7)]
    shapes = [Config(*tile) for tile in tiles]
    splits = [Config(*tile, programs_per_sm=n) for tile in tiles[:3] for n in (2, 4, 16)]
    others = [Config(*tile, programs_per_sm=n, pdl=True) for tile in tiles[:2] for n in (4, 8)]
    return [shipped, *(c for c in [*shapes, *splits, *others] if c != shipped)]


def num_splits(num_seqs: int, num_kv_heads: int, max_tokens: int, config: Config) -> int:
    """From shapes only. `max_tokens`: what the page table has room for."""
    wanted = config.programs_per_sm * machine.num_sms() // (num_seqs * num_kv_heads)
    return max(1, min(wanted, MAX_SPLITS, max_tokens // max(config.min_tokens, config.block_n)))


def launch(q, kv_pages, page_table, kv_lens, scale, config: Config):
    num_seqs, num_heads, head_dim = q.shape
    _, _, page_size, num_kv_heads, _ = kv_pages.shape
    assert q.stride(2) == 1 and kv_pages.stride(4) == 1 and page_table.stride(1) == 1 and kv_lens.is_contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_seqs == 0:
        return out
    splits = num_splits(num_seqs, num_kv_heads, page_table.shape[1] * page_size, config)
    parts = (num_seqs, num_heads, splits) if splits > 1 else (1, 1, 1)
    partial = torch.empty((*parts, head_dim), dtype=torch.float32, device=q.device)
    lse = torch.empty(parts, dtype=torch.float32, device=q.device)
    _attend[(num_kv_heads, splits, num_seqs)](
        q,
        kv_pages,
        page_table,
        kv_lens,
        out,
        partial,
        lse,
        scale * LOG2_E,
        num_heads // num_kv_heads,
        splits,
        *q.stride()[:2],
        *kv_pages.stride()[:4],
        page_table.stride(0),
        HEAD_DIM=head_dim,
        PAGE=page_size,
        BLOCK_M=16,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **config.constexprs,
    )
    if splits > 1:
        block_splits = 16 if splits <= 16 else MAX_SPLITS
        block_dim = min(head_dim, 4096 // block_splits)
        _combine[(head_dim // block_dim, num_heads, num_seqs)](
            partial,
            lse,
            kv_lens,
            out,
            splits,
            HEAD_DIM=head_dim,
            BLOCK_SPLITS=block_splits,
            BLOCK_DIM=block_dim,
            num_warps=4,
            launch_pdl=config.pdl,
            **config.constexprs,
        )
    return out


def aot_of(config: Config, head_dim: int, page_size: int, wants: tuple[str, ...], dtype: str = "*bf16") -> Aot:
    pointers = {"q": dtype, "kv_pages": dtype, "page_table": "*i32", "kv_lens": "*i32", "out": dtype}
    strides = ("stride_q_seq", "stride_q_head", "stride_page", "stride_kv", "stride_slot", "stride_head")
    signature = {**pointers, "partial": "*fp32", "lse": "*fp32", "scale_log2": "fp32"}
    signature |= dict.fromkeys(("group", "num_splits", *strides, "stride_table"), "i32")
    constexprs = {"HEAD_DIM": head_dim, "PAGE": page_size, "BLOCK_M": 16}
    divisible = ("q", "kv_pages", "out", "partial", "lse", *strides)
    return Aot(
        _attend, signature, constexprs | config.constexprs, config.num_warps, config.num_stages, divisible, wants
    )


def _aot():
    for head_dim, page_size in ((128, 64), (128, 16), (128, 256), (64, 64), (256, 64), (256, 16)):
        yield aot_of(pick(head_dim, 2), head_dim, page_size, ("mma", "cp.async"))
    yield aot_of(pick(128, 4), 128, 64, ("cp.async",), "*fp32")
    types = {"partial": "*fp32", "lse": "*fp32", "kv_lens": "*i32", "out": "*bf16", "num_splits": "i32"}
    for block in ({"BLOCK_SPLITS": 16, "BLOCK_DIM": 128}, {"BLOCK_SPLITS": MAX_SPLITS, "BLOCK_DIM": 32}):
        constexprs = {"HEAD_DIM": 128, **block, **pick(128, 2).constexprs}
        yield Aot(_combine, types, constexprs, 4, 3, ("partial", "lse", "out"))


def _takes(case) -> bool:
    return case.plain and case.head_dim in (64, 128, 256) and case.group <= 16 and case.page_size % 16 == 0


@decode_attention.kernel(needs="sm80", when=_takes, aot=_aot)
def split_kv(q, kv_pages, kv_scales, page_table, kv_lens, prefixes, plan, sinks, scale, window):
    return launch(q, kv_pages, page_table, kv_lens, scale, pick(q.shape[2], q.element_size()))
