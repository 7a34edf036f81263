from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import KVLayout, num_pages_for


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    fused: bool = True  # k and v are views of one qkv tensor
    num_skipped: int | None = None  # tokens whose slot is -1

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.page_size, self.num_kv_heads, self.head_dim, self.dtype)


POINTS = {
    "qwen3-8b T1": Case(torch.bfloat16, 1, 8, 128, 64, 1024, num_skipped=0),
    "qwen3-8b T256": Case(torch.bfloat16, 256, 8, 128, 64, 1024, num_skipped=0),
    "qwen3-8b T8192": Case(torch.bfloat16, 8192, 8, 128, 64, 1024, num_skipped=0),
}

FAR = Case(torch.bfloat16, 300, 8, 128, 64, 2**14 + 1, num_skipped=0)  # addresses past 2**31 elements


def of(kv_pages: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Case:
    num_tokens, num_kv_heads, head_dim = k.shape
    fused = k.stride(0) != num_kv_heads * head_dim
    return Case(k.dtype, num_tokens, num_kv_heads, head_dim, kv_pages.shape[2], kv_pages.shape[0], fused)


def _case(num_spare_pages: int, share_skipped: float, **fields) -> Case:
    num_pages = num_pages_for(fields["num_tokens"], fields["page_size"]) + num_spare_pages
    return Case(num_pages=num_pages, num_skipped=int(share_skipped * fields["num_tokens"]), **fields)


def strategy(st, *, small: bool):
    return st.builds(
        _case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 7) if small else st.one_of(st.integers(0, 40), st.integers(41, 2000)),
        num_kv_heads=st.sampled_from([1, 2, 3] if small else [1, 2, 3, 8, 16]),
        head_dim=st.sampled_from([16, 20, 64] if small else [64, 80, 128, 256]),
        page_size=st.sampled_from([1, 4, 16] if small else [16, 64, 256]),
        num_spare_pages=st.integers(1, 3),
        fused=st.booleans(),
        share_skipped=st.sampled_from([0.0, 0.3, 1.0]),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator(device).manual_seed(seed)
    kv_pages = torch.full(case.layout.shape(case.num_pages), float("nan"), dtype=case.dtype, device=device)
    heads = torch.randn(case.num_tokens, 4, case.num_kv_heads, case.head_dim, generator=g, device=device)
    heads = heads.to(case.dtype)  # [T, q q k v, K, E]
    k, v = heads[:, 2], heads[:, 3]
    num_slots = case.num_pages * case.page_size
    slots = torch.randperm(num_slots, generator=g, device=device)[: case.num_tokens]
    if case.num_tokens and not (slots == num_slots - 1).any():
        slots[-1] = num_slots - 1  # always reach the far end of the pool
    num_skipped = case.num_skipped
    if num_skipped is None:
        num_skipped = int(torch.randint(case.num_tokens + 1, (), generator=g, device=device))
    skipped = torch.randperm(case.num_tokens, generator=g, device=device)[:num_skipped]
    slots[skipped] = -1
    if not case.fused:
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    return kv_pages, k, v, slots


def owned(case: Case, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Only the addressed slots may change."""
    kv_pages, _, _, slots = args
    mask = torch.zeros(kv_pages.shape, dtype=torch.bool, device=kv_pages.device)
    stored = slots[slots >= 0]
    mask[stored // case.page_size, :, stored % case.page_size] = True
    return {"kv_pages": mask}


def cost(case: Case) -> Cost:
    num_stored = case.num_tokens - (case.num_skipped or 0)
    return Cost(2 * num_stored * case.layout.token_bytes + 8 * case.num_tokens)


def one_by_one(run, case: Case, device: torch.device, seed: int) -> None:
    """Storing the tokens one at a time leaves the same cache as storing them at once."""
    kv_pages, k, v, slots = make(case, device, seed)
    together = kv_pages.clone()
    run(together, k, v, slots)
    for i in range(case.num_tokens):
        run(kv_pages, k[i : i + 1], v[i : i + 1], slots[i : i + 1])
    assert torch.equal(together.nan_to_num(), kv_pages.nan_to_num()), "the cache depends on the batch"


LAWS = [one_by_one]
