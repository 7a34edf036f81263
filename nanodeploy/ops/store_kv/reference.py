from torch import Tensor

from nanodeploy.ops.registry import op


@op(out=lambda kv_pages, k, v, slots: None, mutates=("kv_pages",))
def store_kv(kv_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Write each token's keys and values into its cache slot (PagedAttention, arXiv:2309.06180).

    kv_pages [P, 2, page_size, K, E], index 0 of axis 1 keys, 1 values, written in place; k, v [T, K, E], may be
    strided views of a fused qkv; slots [T] int64 = page * page_size + offset, all different, or -1: skip the token.
    """
    page_size = kv_pages.shape[2]
    rows = (slots >= 0).nonzero().squeeze(1)
    page, offset = slots[rows] // page_size, slots[rows] % page_size
    kv_pages[page, 0, offset] = k[rows]
    kv_pages[page, 1, offset] = v[rows]
