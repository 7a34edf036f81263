"""A token's keys and values are one contiguous row each in the cache: copy whole rows, several tokens per program."""

import triton
import triton.language as tl

from nanodeploy.ops.registry import Aot
from nanodeploy.ops.store_kv.reference import store_kv

VALUES_PER_PROGRAM = 1024  # of k, and as many of v


@triton.jit
def _scatter(
    kv_pages, k, v, slots, num_tokens,
    stride_page, stride_kv, stride_offset, stride_k, stride_k_head, stride_v, stride_v_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    cols = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots + tokens, mask=tokens < num_tokens, other=-1)
    stored = (slot >= 0)[:, None] & (cols < NUM_HEADS * HEAD_DIM)
    slot = tl.maximum(slot, 0)[:, None]
    tokens = tokens[:, None]
    head, dim = cols // HEAD_DIM, cols % HEAD_DIM
    keys = tl.load(k + tokens * stride_k + head * stride_k_head + dim, mask=stored)
    values = tl.load(v + tokens * stride_v + head * stride_v_head + dim, mask=stored)
    to = kv_pages + slot // PAGE_SIZE * stride_page + slot % PAGE_SIZE * stride_offset + cols
    tl.store(to, keys, mask=stored)
    tl.store(to + stride_kv, values, mask=stored)


def _tile(num_values: int) -> dict[str, int]:
    block = triton.next_power_of_2(num_values)
    return {"TOKENS": max(1, VALUES_PER_PROGRAM // block), "BLOCK": block}


def _aot():
    sizes = ("num_tokens", "stride_page", "stride_kv", "stride_offset")
    strides = ("stride_k", "stride_k_head", "stride_v", "stride_v_head")
    for num_heads, head_dim, page_size in ((8, 128, 64), (8, 128, 16), (2, 256, 64), (1, 64, 256)):
        yield Aot(
            _scatter,
            dict.fromkeys(("kv_pages", "k", "v"), "*bf16")
            | {"slots": "*i64"}
            | dict.fromkeys((*sizes, *strides), "i32"),
            {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "PAGE_SIZE": page_size} | _tile(num_heads * head_dim),
            divisible=("kv_pages", "k", "v", "slots", *sizes[1:], *strides),
            wants=("ld.v4",),
        )


@store_kv.kernel(needs="sm80", batch_invariant=True, aot=_aot)
def scatter(kv_pages, k, v, slots):
    num_tokens, num_heads, head_dim = k.shape
    page_size = kv_pages.shape[2]
    assert kv_pages.stride()[3:] == (head_dim, 1) and k.stride(2) == v.stride(2) == 1, "rows must be contiguous"
    if num_tokens:
        tile = _tile(num_heads * head_dim)
        _scatter[(triton.cdiv(num_tokens, tile["TOKENS"]),)](
            kv_pages, k, v, slots, num_tokens,
            *kv_pages.stride()[:3], *k.stride()[:2], *v.stride()[:2],
            NUM_HEADS=num_heads, HEAD_DIM=head_dim, PAGE_SIZE=page_size, **tile,
        )  # fmt: skip
