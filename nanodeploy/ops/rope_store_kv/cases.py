from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import E4M3_MAX, KVLayout, num_pages_for, scale_bytes, scale_values
from nanodeploy.ops.rope.reference import turned

NUM_POSITIONS = 8192
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int  # R
    page_size: int
    num_pages: int
    kv_dtype: torch.dtype
    normed: bool = True
    interleaved: bool = False
    fused: bool = True  # q, k and v are views of one qkv tensor
    num_skipped: int | None = None  # tokens whose slot is -1

    @property
    def layout(self) -> KVLayout:
        return KVLayout(self.page_size, self.num_kv_heads, self.head_dim, self.kv_dtype)


def _point(num_tokens: int, kv_dtype: torch.dtype, num_heads: int = 32) -> Case:
    return Case(torch.bfloat16, num_tokens, num_heads, 8, 128, 128, 64, 1024, kv_dtype, num_skipped=0)


POINTS = {
    f"qwen3-8b T{num_tokens} {name}": _point(num_tokens, kv_dtype)
    for num_tokens in (1, 64, 256, 8192)
    for name, kv_dtype in (("bf16", torch.bfloat16), ("fp8", E4M3))
} | {
    "qwen3-0.6b T8192 bf16": _point(8192, torch.bfloat16, 16),
    "qwen3-0.6b T8192 fp8": _point(8192, E4M3, 16),
}

# Addresses past 2**31 elements.
FAR = Case(torch.bfloat16, 300, 32, 8, 128, 128, 64, 2**14 + 1, torch.bfloat16, num_skipped=0)


def of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_pages: Tensor,
    kv_scales: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    cos_sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    interleaved: bool,
) -> Case:
    num_tokens, num_heads, head_dim = q.shape
    return Case(
        q.dtype,
        num_tokens,
        num_heads,
        k.shape[1],
        head_dim,
        cos_sin.shape[1],
        kv_pages.shape[2],
        kv_pages.shape[0],
        kv_pages.dtype,
        q_norm is not None,
        interleaved,
        fused=q.stride(0) != num_heads * head_dim,
    )


def _case(rotary_share: float, num_spare_pages: int, share_skipped: float, quantised: bool, **fields) -> Case:
    num_pages = num_pages_for(fields["num_tokens"], fields["page_size"]) + num_spare_pages
    return Case(
        rotary_dim=max(2, int(rotary_share * fields["head_dim"]) // 2 * 2),
        num_pages=num_pages,
        num_skipped=int(share_skipped * fields["num_tokens"]),
        kv_dtype=E4M3 if quantised else fields["dtype"],
        **fields,
    )


def strategy(st, *, small: bool):
    return st.builds(
        _case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 5) if small else st.one_of(st.integers(0, 40), st.integers(41, 1000)),
        num_heads=st.sampled_from([1, 3, 4] if small else [1, 8, 24, 32, 64]),
        num_kv_heads=st.sampled_from([1, 2, 3] if small else [1, 2, 3, 8]),
        head_dim=st.sampled_from([2, 16, 20, 64] if small else [64, 80, 96, 128, 256]),
        rotary_share=st.sampled_from([1.0, 0.5, 0.4]),
        page_size=st.sampled_from([1, 4, 16] if small else [16, 64, 256]),
        num_spare_pages=st.integers(1, 3),
        share_skipped=st.sampled_from([0.0, 0.3, 1.0]),
        quantised=st.booleans(),
        normed=st.booleans(),
        interleaved=st.booleans(),
        fused=st.booleans(),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Heads of very different sizes, some of zeros, some whose largest value just fits a scale or just does not."""
    g = torch.Generator(device).manual_seed(seed)
    counts = (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    qkv = torch.randn(case.num_tokens, sum(counts), case.head_dim, generator=g, device=device)
    sizes = torch.randint(-6, 7, (case.num_tokens, sum(counts), 1), generator=g, device=device)
    qkv *= torch.exp2(sizes.float())
    qkv[torch.rand(qkv.shape[:2], generator=g, device=device) < 0.05] = 0
    edge = torch.rand(qkv.shape[:2], generator=g, device=device) < 0.2
    qkv[edge, 0] = 1.75 * qkv[edge].abs().amax(-1).log2().ceil().exp2()  # 448 is 1.75 * 2 ** 8
    qkv = qkv.to(case.dtype)
    q, k, v = qkv.split(counts, dim=1)
    if not case.fused:
        q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))

    cache = case.layout.empty(case.num_pages, device)
    pages = torch.full(cache.pages.shape, float("nan"), device=device, dtype=case.dtype).to(case.kv_dtype)
    scales = None if cache.scales is None else cache.scales.fill_(255)
    num_slots = case.num_pages * case.page_size
    slots = torch.randperm(num_slots, generator=g, device=device)[: case.num_tokens]
    if case.num_tokens and not (slots == num_slots - 1).any():
        slots[-1] = num_slots - 1  # always reach the far end of the pool
    num_skipped = case.num_skipped
    if num_skipped is None:
        num_skipped = int(torch.randint(case.num_tokens + 1, (), generator=g, device=device))
    slots[torch.randperm(case.num_tokens, generator=g, device=device)[:num_skipped]] = -1

    positions = torch.randint(NUM_POSITIONS, (case.num_tokens,), generator=g, device=device)
    power = torch.arange(0, case.rotary_dim, 2, device=device, dtype=torch.float64) / case.rotary_dim
    angles = torch.arange(NUM_POSITIONS, device=device, dtype=torch.float64)[:, None] * 1e6**-power
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    norms = [1 + 0.2 * torch.randn(case.head_dim, generator=g, device=device) for _ in range(2)]
    q_norm, k_norm = (w.to(case.dtype) if case.normed else None for w in norms)
    return q, k, v, pages, scales, positions, slots, cos_sin, q_norm, k_norm, 1e-6, case.interleaved


def owned(case: Case, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Only the addressed slots may change."""
    slots = args[6]
    mask = torch.zeros(case.num_pages, case.page_size, dtype=torch.bool, device=slots.device)
    stored = slots[slots >= 0]
    mask[stored // case.page_size, stored % case.page_size] = True
    pages = mask[:, None, :, None, None].expand(case.layout.shape(case.num_pages))
    return {"kv_pages": pages, "kv_scales": mask[:, None, None, :].expand(case.layout.scales_shape(case.num_pages))}


def cost(case: Case) -> Cost:
    num_values = case.num_tokens * (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    q_bytes = case.num_tokens * case.num_heads * case.head_dim * case.dtype.itemsize
    num_stored = case.num_tokens - (case.num_skipped or 0)
    index_bytes = case.num_tokens * (16 + 4 * case.rotary_dim)
    num_bytes = num_values * case.dtype.itemsize + q_bytes + num_stored * case.layout.token_bytes + index_bytes
    return Cost(num_bytes, (10 if case.normed else 6) * num_values)


def _exact(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What should be stored, in fp64: (page [N], offset [N], values [N, 2, K, E])."""
    _, k, v, kv_pages, _, positions, slots, cos_sin, _, k_norm, eps, interleaved = args
    rows = slots >= 0
    angles = cos_sin[positions[rows]].unsqueeze(1).double()
    keys = turned(k[rows].double(), angles, k_norm, eps, interleaved)
    page_size = kv_pages.shape[2]
    return slots[rows] // page_size, slots[rows] % page_size, torch.stack((keys, v[rows].double()), dim=1)


def _stored(kv_pages: Tensor, kv_scales: Tensor, page: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """What the slots hold, in fp64: (values [N, 2, K, E] as they are read back, scales [N, 2, K, 1])."""
    scales = scale_values(kv_scales[page, :, :, offset], torch.float64).unsqueeze(-1)
    return kv_pages.view(torch.uint8)[page, :, offset].view(E4M3).double() * scales, scales


def agrees_written(
    args: tuple[Any, ...], written: dict[str, Tensor], reference: dict[str, Tensor], case: Case
) -> dict[str, str | None]:
    """Judge quantised pages and their scales; pages in q.dtype have the usual error budget.

    The scale is the reference's, or its neighbour where the head's largest value is within rounding of the border
    between the two. A value is the reference's, or its neighbour in e4m3: rotated in another order, a value may fall to
    the other side of a rounding border, which happens to one in thousands.
    """
    if not case.layout.scaled:
        return {}
    page, offset, exact = _exact(args)
    got, got_scale = _stored(written["kv_pages"], written["kv_scales"], page, offset)
    ref, ref_scale = _stored(reference["kv_pages"], reference["kv_scales"], page, offset)
    scale = torch.maximum(got_scale, ref_scale)
    amax = exact.abs().amax(-1, keepdim=True)
    border = E4M3_MAX * torch.minimum(got_scale, ref_scale)
    wrong = (got_scale != ref_scale) & ~((amax / border - 1).abs() < 1e-5) | (scale > 2 * ref_scale)
    complaints: dict[str, str | None] = {"kv_pages": None, "kv_scales": None}
    if wrong.any():
        row, index, head, _ = (int(i) for i in wrong.nonzero()[0])
        complaints["kv_scales"] = (
            f"kv_scales: {int(wrong.sum())} of {wrong.numel()} are wrong, as of stored row {row}, [{index}], head "
            f"{head}: got {got_scale[row, index, head].item()}, reference {ref_scale[row, index, head].item()}"
        )
    spacing = torch.exp2(torch.maximum(got.abs(), ref.abs()).div(scale).clamp(min=2.0**-6).log2().floor() - 3) * scale
    wrong = ~((got - ref).abs() <= spacing)
    if wrong.any():
        at = tuple(int(i) for i in wrong.nonzero()[0])
        complaints["kv_pages"] = (
            f"kv_pages: {int(wrong.sum())} of {wrong.numel()} are more than one e4m3 away from the reference, as at "
            f"{at} (stored row, keys or values, head, dim): got {got[at].item()}, reference {ref[at].item()}"
        )
    elif (other := (got != ref) & (got_scale == ref_scale)).sum() > 4 + 0.001 * other.numel():
        complaints["kv_pages"] = f"kv_pages: {int(other.sum())} of {other.numel()} are rounded otherwise"
    return complaints


def one_by_one(run, case: Case, device: torch.device, seed: int) -> None:
    """Tokens one at a time give the same queries and leave the same cache as all at once."""
    q, k, v, kv_pages, kv_scales, positions, slots, *rest = make(case, device, seed)
    pages_together, scales_together = kv_pages.clone(), None if kv_scales is None else kv_scales.clone()
    rotated = run(q, k, v, pages_together, scales_together, positions, slots, *rest)
    for i in range(case.num_tokens):
        one = slice(i, i + 1)
        alone = run(q[one], k[one], v[one], kv_pages, kv_scales, positions[one], slots[one], *rest)
        assert torch.equal(alone, rotated[one]), f"the query of token {i} depends on the batch"
    assert torch.equal(pages_together.view(torch.uint8), kv_pages.view(torch.uint8)), "the cache depends on the batch"
    if scales_together is not None:
        assert torch.equal(scales_together, kv_scales), "the scales depend on the batch"


def what_is_read_back_is_near(run, case: Case, device: torch.device, seed: int) -> None:
    """A quantised value is off by at most a spacing of e4m3, and no smaller power of two would have fitted."""
    args = make(case, device, seed)
    if not case.layout.scaled:
        return
    run(*args)
    page, offset, exact = _exact(args)
    got, scale = _stored(args[3], args[4], page, offset)
    amax = exact.abs().amax(-1, keepdim=True)
    fits = (amax <= E4M3_MAX * scale * (1 + 1e-5)) & ((amax >= E4M3_MAX / 2 * scale * (1 - 1e-5)) | (amax == 0))
    assert fits.all(), "a scale is not the least that fits"
    # Of a normal e4m3 number the spacing is at most an eighth of it; of the others it is 2 ** -9.
    assert ((got - exact).abs() <= exact.abs() / 8 + 2.0**-9 * scale).all(), "read back, a value is too far off"
    assert torch.equal(scale_bytes(torch.zeros(1)), torch.tensor([127], dtype=torch.uint8))


LAWS = [one_by_one, what_is_read_back_is_near]
