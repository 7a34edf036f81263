"""Expanded: keys and values of the whole context are made from its latents, then every head attends on its own.

The contexts' latents are gathered into one matrix, sequence by sequence, each from a multiple of ALIGN rows on; one
product per head with w_uk and one with w_uv make [heads, rows, dim] of it (head_linear/tiles), as many heads at a time
as WORKSPACE_BYTES hold. Attention is prefill_attention/tiles' loop, with keys in two parts: a head's own, and the
rotated one that all heads share. How much memory that wants must be known without asking the device: num_context.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nanodeploy.ops.head_linear.tiles import MANY, product
from nanodeploy.ops.mla_prefill.absorbed import expandable, find
from nanodeploy.ops.mla_prefill.reference import mla_prefill
from nanodeploy.ops.mla_prefill.tokens import Gathered, gather, gather_aot
from nanodeploy.ops.registry import Aot
from nanodeploy.ops.running_softmax import LOG2_E

WORKSPACE_BYTES = 2**30  # of keys and values that exist at a time


# One compilation for any lengths and any slice of the batch's rows.
@triton.jit(
    do_not_specialize=["num_tokens", "num_seqs", "num_heads", "first_head"],
    do_not_specialize_on_alignment=["kv_lens", "cu_q_lens"],
)
def _attend(
    q_nope,
    q_rope,
    keys,
    values,
    rotated_keys,
    kv_lens,
    cu_q_lens,
    starts,
    out,
    scale_log2,
    num_tokens,
    num_seqs,
    num_heads,
    first_head,
    stride_q,
    stride_q_head,
    stride_rope,
    stride_rope_head,
    stride_keys,
    stride_values,
    stride_rotated,
    NOPE: tl.constexpr,
    VALUE: tl.constexpr,
    R: tl.constexpr,
    NOPE_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (tile of tokens, head of those from first_head on): from the last tokens to the first, long contexts
    first. keys [heads, N, NOPE], values [heads, N, VALUE] and rotated_keys [N, R] are read in whole tiles."""
    KIND: tl.constexpr = out.dtype.element_ty
    tile_id = tl.num_programs(0) - 1 - tl.program_id(0)
    seq, q_begin, q_end, first_row = find(cu_q_lens, tile_id, 1, num_tokens, num_seqs, ROWS)
    if first_row >= q_end - q_begin:
        return
    rows = first_row + tl.arange(0, ROWS)
    present = rows < q_end - q_begin
    tokens = (q_begin + rows).to(tl.int64)
    head = first_head + tl.program_id(1)
    nope_dims, rope_dims, value_dims = tl.arange(0, NOPE_WIDTH), tl.arange(0, ROPE), tl.arange(0, VALUE_WIDTH)
    where = out + ((tokens * num_heads + head) * VALUE)[:, None] + value_dims[None, :]
    there = present[:, None] & (value_dims < VALUE)[None, :]
    if (seq < 0) | (seq == num_seqs):
        tl.store(where, tl.zeros([ROWS, VALUE_WIDTH], KIND), mask=there)
        return

    kv_len = tl.load(kv_lens + seq)
    queries = tl.load(
        q_nope + (tokens * stride_q + head * stride_q_head)[:, None] + nope_dims[None, :],
        mask=present[:, None] & (nope_dims < NOPE)[None, :],
        other=0.0,
    )
    rotated = tl.load(
        q_rope + (tokens * stride_rope + head * stride_rope_head)[:, None] + rope_dims[None, :],
        mask=present[:, None] & (rope_dims < R)[None, :],
        other=0.0,
    )
    context = kv_len - (q_end - q_begin)
    limits = context + rows  # the last position that each row sees
    end = tl.minimum(context + first_row + ROWS, kv_len)
    full = (context + first_row + 1) // TILE * TILE  # every row sees all that is before
    start_row = tl.load(starts + seq).to(tl.int64)
    tile = tl.arange(0, TILE)
    group_head = tl.program_id(1).to(tl.int64)
    keys += group_head * stride_keys + start_row * NOPE
    values += group_head * stride_values + start_row * VALUE
    rotated_keys += start_row * stride_rotated
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    # What the tile before left to do: its weights, and the shrink of `mixed` that they assume.
    weights = tl.zeros([ROWS, TILE], tl.float32)
    shrink = tl.full([ROWS], 1.0, tl.float32)
    for start in tl.range(0, end + TILE, TILE, num_stages=STAGES):  # the last round: values only
        columns = start + tile
        valid = columns < end
        valid_before = (start > 0) & (columns - TILE < end)
        at = columns[:, None]
        k = tl.load(keys + at * NOPE + nope_dims[None, :], mask=valid[:, None] & (nope_dims < NOPE)[None, :], other=0.0)
        key = tl.load(
            rotated_keys + at * stride_rotated + rope_dims[None, :],
            mask=valid[:, None] & (rope_dims < R)[None, :],
            other=0.0,
        )
        v = tl.load(
            values + (at - TILE) * VALUE + value_dims[None, :],
            mask=valid_before[:, None] & (value_dims < VALUE)[None, :],
            other=0.0,
        )
        scores = tl.dot(queries, k.T, input_precision="ieee")
        scores = tl.dot(rotated, key.T, scores, input_precision="ieee")
        mixed = tl.dot(weights.to(KIND), v, mixed * shrink[:, None], input_precision="ieee")
        if start >= full:
            scores = tl.where(valid[None, :] & (columns[None, :] <= limits[:, None]), scores, float("-inf"))
        risen = tl.maximum(highest, tl.max(scores, 1) * scale_log2)
        shrink = tl.exp2(highest - risen)
        weights = tl.exp2(scores * scale_log2 - risen[:, None])
        total = total * shrink + tl.sum(weights, 1)
        highest = risen
    tl.store(where, (mixed / total[:, None]).to(KIND), mask=there)


@dataclass(frozen=True)
class Config:
    rows: int  # tokens per program
    tile: int  # tokens of context per round
    num_warps: int
    num_stages: int


def pick(value_dim: int) -> Config:
    return Config(128, 64, 8, 3) if value_dim <= 128 else Config(128, 32, 8, 3)


def configs() -> list[Config]:
    """What a sweep tries for DeepSeek-V3's dims; the first is `pick`'s."""
    return [
        pick(128),
        *(Config(*shape) for shape in ((128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3))),
    ]


def heads_at_once(num_rows: int, num_heads: int, token_bytes: int) -> int:
    """How many heads' keys and values, of token_bytes a row, the workspace holds."""
    return max(1, min(num_heads, WORKSPACE_BYTES // (num_rows * token_bytes)))


def expand(gathered: Tensor, weight: Tensor) -> Tensor:
    """[heads, N, dim]: the weights' [heads, dim, rank] products with all gathered latents [N, rank + R]."""
    latents = gathered[:, None, : weight.shape[2]].expand(-1, weight.shape[0], -1)
    made = gathered.new_empty((weight.shape[0], gathered.shape[0], weight.shape[1]))
    product(latents, weight, made.transpose(0, 1), MANY)
    return made


def attend(
    q_nope: Tensor,
    q_rope: Tensor,
    keys: Tensor,
    values: Tensor,
    gathered: Gathered,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    out: Tensor,
    first_head: int,
    scale: float,
    config: Config,
) -> None:
    """Attention of the heads from first_head on, of which keys and values [heads, N, dim] are there, into `out`."""
    num_tokens, num_heads, nope_dim = q_nope.shape
    rope_dim, value_dim, num_seqs = q_rope.shape[2], values.shape[2], kv_lens.shape[0]
    widths = [max(16, triton.next_power_of_2(n)) for n in (nope_dim, value_dim, rope_dim)]
    rotated_keys = gathered.tokens[:, -rope_dim:]
    _attend[(num_tokens // config.rows + num_seqs + 2, keys.shape[0])](
        q_nope,
        q_rope,
        keys,
        values,
        rotated_keys,
        kv_lens,
        cu_q_lens,
        gathered.starts,
        out,
        scale * LOG2_E,
        num_tokens,
        num_seqs,
        num_heads,
        first_head,
        *q_nope.stride()[:2],
        *q_rope.stride()[:2],
        keys.stride(0),
        values.stride(0),
        rotated_keys.stride(0),
        NOPE=nope_dim,
        VALUE=value_dim,
        R=rope_dim,
        NOPE_WIDTH=widths[0],
        VALUE_WIDTH=widths[1],
        ROPE=widths[2],
        ROWS=config.rows,
        TILE=config.tile,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )


def launch(
    q_nope: Tensor,
    q_rope: Tensor,
    pages: Tensor,
    page_table: Tensor,
    kv_lens: Tensor,
    cu_q_lens: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    scale: float,
    num_context: int,
    config: Any,
    attention: Callable[..., None] = attend,
) -> Tensor:
    """`attention` does what `attend` does, with a config of its own."""
    num_tokens, num_heads, nope_dim = q_nope.shape
    rank, value_dim = w_uv.shape[2], w_uv.shape[1]
    assert q_nope.stride(2) == q_rope.stride(2) == pages.stride(2) == page_table.stride(1) == 1
    assert kv_lens.is_contiguous() and cu_q_lens.is_contiguous()
    assert scale > 0  # the running maximum is taken before scaling
    out = q_nope.new_empty((num_tokens, num_heads, value_dim))
    if num_tokens == 0:
        return out
    gathered = gather(pages, page_table, kv_lens, num_context, rank, q_rope.shape[2], q_nope.dtype)
    token_bytes = (nope_dim + value_dim) * q_nope.element_size()
    step = heads_at_once(gathered.tokens.shape[0], num_heads, token_bytes)
    for first in range(0, num_heads, step):
        heads = slice(first, first + step)
        keys, values = expand(gathered.tokens, w_uk[heads]), expand(gathered.tokens, w_uv[heads])
        attention(q_nope, q_rope, keys, values, gathered, kv_lens, cu_q_lens, out, first, scale, config)
    return out


def aot_of(config: Config, nope_dim: int, value_dim: int) -> Aot:
    pointers = dict.fromkeys(("q_nope", "q_rope", "keys", "values", "rotated_keys"), "*bf16")
    indices = dict.fromkeys(("kv_lens", "cu_q_lens", "starts"), "*i32")
    integers = ("num_tokens", "num_seqs", "num_heads", "first_head")
    q_strides = ("stride_q", "stride_q_head", "stride_rope", "stride_rope_head")
    row_strides = (*q_strides, "stride_keys", "stride_values", "stride_rotated")
    signature = {**pointers, **indices, "out": "*bf16", "scale_log2": "fp32"}
    constexprs = {"NOPE": nope_dim, "VALUE": value_dim, "R": 64, "ROPE": 64}
    constexprs |= {"NOPE_WIDTH": triton.next_power_of_2(nope_dim), "VALUE_WIDTH": triton.next_power_of_2(value_dim)}
    return Aot(
        _attend,
        signature | dict.fromkeys((*integers, *row_strides), "i32"),
        constexprs | {"ROWS": config.rows, "TILE": config.tile, "STAGES": config.num_stages},
        config.num_warps,
        divisible=(*pointers, "out", *row_strides),
        wants=("wgmma", "cp.async"),
    )


def _aot():
    for nope_dim, value_dim in ((128, 128), (192, 256)):
        yield aot_of(pick(value_dim), nope_dim, value_dim)
    yield gather_aot(False)
    yield gather_aot(True)


@mla_prefill.kernel(needs="sm80", when=expandable, aot=_aot)
def expanded(q_nope, q_rope, pages, page_table, kv_lens, cu_q_lens, w_uk, w_uv, scale, num_context):
    contexts = pages, page_table, kv_lens, cu_q_lens
    return launch(q_nope, q_rope, *contexts, w_uk, w_uv, scale, num_context, pick(w_uv.shape[1]))
