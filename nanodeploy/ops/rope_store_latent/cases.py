from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.layouts import E4M3, E4M3_MAX, FP8_BLOCK, LatentLayout, num_pages_for, unpack_latents
from nanodeploy.ops.rope_store_latent.reference import stored

NUM_POSITIONS = 8192


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    num_heads: int
    nope_dim: int
    rank: int
    rope_dim: int  # R
    page_size: int
    num_pages: int
    fp8: bool
    interleaved: bool = True
    num_skipped: int | None = None  # tokens whose slot is -1

    @property
    def layout(self) -> LatentLayout:
        return LatentLayout(self.page_size, self.rank, self.rope_dim, E4M3 if self.fp8 else self.dtype)


POINTS = {
    f"h{num_heads} T{num_tokens} {'fp8' if fp8 else 'bf16'}": Case(
        torch.bfloat16, num_tokens, num_heads, 128, 512, 64, 64, 1024, fp8, num_skipped=0
    )
    for num_heads, num_tokens in ((128, 1), (128, 64), (128, 8192), (16, 64), (16, 256), (16, 8192))
    for fp8 in (False, True)
}

FAR = Case(torch.bfloat16, 300, 16, 128, 512, 64, 64, 2**16, False, num_skipped=0)  # past 2**31 elements


def of(q, latent, pages, positions, slots, cos_sin, norm_weight, eps, interleaved) -> Case:
    num_tokens, num_heads, dim = q.shape
    rank, rope_dim = norm_weight.shape[0], cos_sin.shape[1]
    shape = (num_tokens, num_heads, dim - rope_dim, rank, rope_dim, pages.shape[1], pages.shape[0])
    return Case(q.dtype, *shape, pages.dtype == torch.uint8, interleaved)


def _case(num_spare_pages: int, share_skipped: float, fp8: bool, **fields: Any) -> Case:
    num_pages = num_pages_for(fields["num_tokens"], fields["page_size"]) + num_spare_pages
    num_skipped = int(share_skipped * fields["num_tokens"])
    fp8 = fp8 and fields["rank"] % FP8_BLOCK == 0
    return Case(num_pages=num_pages, num_skipped=num_skipped, fp8=fp8, **fields)


def strategy(st, *, small: bool):
    return st.builds(
        _case,
        dtype=st.sampled_from([torch.float16, torch.float32] if small else [torch.bfloat16, torch.float16]),
        num_tokens=st.integers(0, 5) if small else st.one_of(st.integers(0, 40), st.integers(41, 1000)),
        num_heads=st.sampled_from([1, 3, 4] if small else [1, 3, 16, 64, 128]),
        nope_dim=st.sampled_from([0, 8, 24] if small else [0, 16, 128, 192]),
        rank=st.sampled_from([16, 24, 128, 256] if small else [16, 40, 128, 512, 512]),
        rope_dim=st.sampled_from([2, 6, 16, 64]),
        page_size=st.sampled_from([1, 4, 16] if small else [16, 64, 256]),
        num_spare_pages=st.integers(1, 3),
        share_skipped=st.sampled_from([0.0, 0.3, 1.0]),
        fp8=st.booleans(),
        interleaved=st.booleans(),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Latents whose blocks differ in size by far, some of zeros."""
    g = torch.Generator(device).manual_seed(seed)
    heads = torch.randn(case.num_tokens, case.num_heads, case.nope_dim + case.rope_dim, generator=g, device=device)
    q = heads.to(case.dtype)
    # As kv_a's output lies beside q_a's in one product.
    latent = torch.randn(case.num_tokens, 8 + case.rank + case.rope_dim, generator=g, device=device)
    sizes = torch.exp2(
        torch.randint(-6, 7, (case.num_tokens, 1 + case.rank // 128), generator=g, device=device).float()
    )
    latent[:, 8 : 8 + case.rank] *= sizes.repeat_interleave(128, dim=1)[:, : case.rank]
    latent[torch.rand(case.num_tokens, generator=g, device=device) < 0.1] = 0
    latent = latent.to(case.dtype)[:, 8:]

    pages = case.layout.empty(case.num_pages, device).pages
    pages.fill_(0xFF if case.fp8 else float("nan"))
    num_slots = case.num_pages * case.page_size
    slots = torch.randperm(num_slots, generator=g, device=device)[: case.num_tokens]
    if case.num_tokens and not (slots == num_slots - 1).any():
        slots[-1] = num_slots - 1  # always reach the far end of the pool
    num_skipped = case.num_skipped
    if num_skipped is None:
        num_skipped = int(torch.randint(case.num_tokens + 1, (), generator=g, device=device))
    slots[torch.randperm(case.num_tokens, generator=g, device=device)[:num_skipped]] = -1

    positions = torch.randint(NUM_POSITIONS, (case.num_tokens,), generator=g, device=device)
    power = torch.arange(0, case.rope_dim, 2, device=device, dtype=torch.float64) / case.rope_dim
    angles = torch.arange(NUM_POSITIONS, device=device, dtype=torch.float64)[:, None] * 1e4**-power
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
    norm_weight = (1 + 0.2 * torch.randn(case.rank, generator=g, device=device)).to(case.dtype)
    return q, latent, pages, positions, slots, cos_sin, norm_weight, 1e-6, case.interleaved


def owned(case: Case, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """Only the addressed slots may change."""
    slots = args[4]
    mask = torch.zeros(case.num_pages, case.page_size, dtype=torch.bool, device=slots.device)
    kept = slots[slots >= 0]
    mask[kept // case.page_size, kept % case.page_size] = True
    return {"pages": mask[..., None].expand(case.layout.shape(case.num_pages))}


def cost(case: Case) -> Cost:
    num_rotated, num_normed = case.num_tokens * case.num_heads * case.rope_dim, case.num_tokens * case.rank
    num_values = 2 * num_rotated + num_normed + case.num_tokens * case.rope_dim
    num_stored = case.num_tokens - (case.num_skipped or 0)
    index_bytes = case.num_tokens * (16 + 4 * case.rope_dim)
    num_bytes = num_values * case.dtype.itemsize + num_stored * case.layout.token_bytes + index_bytes
    return Cost(num_bytes, 6 * num_rotated + 10 * num_normed)


def _exact(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What should be stored, in fp64: (page [N], offset [N], values [N, rank + R])."""
    _, latent, pages, positions, slots, cos_sin, norm_weight, eps, interleaved = args
    rows = slots >= 0
    angles = cos_sin[positions[rows]].double()
    values = torch.cat(stored(latent[rows].double(), angles, norm_weight.double(), eps, interleaved), dim=-1)
    return slots[rows] // pages.shape[1], slots[rows] % pages.shape[1], values


def _read(pages: Tensor, page: Tensor, offset: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """What the slots of fp8 pages hold, in fp64: (values [N, rank + R], scales [N, blocks])."""
    tokens = pages[page, offset]
    scales = tokens[:, rank : rank + rank // FP8_BLOCK * 4].contiguous().view(torch.float32)
    return unpack_latents(tokens, rank, torch.float64), scales.double()


def _power_below(values: Tensor) -> Tensor:
    """The largest power of two that is not above each of `values` (positive). A GPU's log2 of one need not be whole."""
    return values / (2 * torch.frexp(values).mantissa)


def agrees_written(
    args: tuple[Any, ...], written: dict[str, Tensor], reference: dict[str, Tensor], case: Case
) -> dict[str, str | None]:
    """Judge fp8 pages; pages in q.dtype have the usual error budget.

    A scale is the reference's, or its neighbour where the block's largest value is within rounding of the border
    between the two. A value is the reference's, or its neighbour in e4m3 or bf16: normed or rotated in another order, a
    value may fall to the other side of a rounding border, which happens to one in thousands.
    """
    if not case.fp8:
        return {}
    page, offset, exact = _exact(args)
    got, got_scales = _read(written["pages"], page, offset, case.rank)
    ref, ref_scales = _read(reference["pages"], page, offset, case.rank)
    amax = exact[:, : case.rank].unflatten(-1, (-1, FP8_BLOCK)).abs().amax(-1)
    border = E4M3_MAX * torch.minimum(got_scales, ref_scales)
    same = got_scales == ref_scales
    wrong = ~same & ~((amax / border - 1).abs() < 1e-5) | (got_scales.frexp().mantissa != 0.5)
    if wrong.any():
        row, block = (int(i) for i in wrong.nonzero()[0])
        got_scale, ref_scale = got_scales[row, block].item(), ref_scales[row, block].item()
        return {
            "pages": f"pages: {int(wrong.sum())} of {wrong.numel()} scales are wrong, as of stored row {row}, block "
            f"{block}: got {got_scale}, reference {ref_scale}"
        }
    scale = torch.maximum(got_scales, ref_scales).repeat_interleave(FP8_BLOCK, dim=-1)
    size = torch.maximum(got.abs(), ref.abs())
    e4m3 = _power_below((size[:, : case.rank] / scale).clamp(min=2.0**-6)) / 8 * scale
    bf16 = _power_below(size[:, case.rank :].clamp(min=2.0**-126)) / 128
    wrong = ~((got - ref).abs() <= torch.cat((e4m3, bf16), dim=-1))
    if wrong.any():
        row, dim = (int(i) for i in wrong.nonzero()[0])
        return {
            "pages": f"pages: {int(wrong.sum())} of {wrong.numel()} values are more than one step from the reference, "
            f"as of stored row {row}, dim {dim}: got {got[row, dim].item()}, reference {ref[row, dim].item()}"
        }
    other = (got != ref)[:, : case.rank] & same.repeat_interleave(FP8_BLOCK, dim=-1)
    if other.sum() > 4 + 0.001 * other.numel():
        return {"pages": f"pages: {int(other.sum())} of {other.numel()} latents are rounded otherwise"}
    return {"pages": None}


def one_by_one(run, case: Case, device: torch.device, seed: int) -> None:
    """Tokens one at a time give the same queries and leave the same cache as all at once."""
    q, latent, pages, positions, slots, *rest = make(case, device, seed)
    together = pages.clone()
    rotated = run(q, latent, together, positions, slots, *rest)
    for i in range(case.num_tokens):
        one = slice(i, i + 1)
        alone = run(q[one], latent[one], pages, positions[one], slots[one], *rest)
        assert torch.equal(alone, rotated[one]), f"the query of token {i} depends on the batch"
    assert torch.equal(together.view(torch.uint8), pages.view(torch.uint8)), "the cache depends on the batch"


def what_is_read_back_is_near(run, case: Case, device: torch.device, seed: int) -> None:
    """A value is off by at most a spacing of e4m3 or bf16, and no smaller power of two would have fitted."""
    args = make(case, device, seed)
    if not case.fp8:
        return
    run(*args)
    page, offset, exact = _exact(args)
    got, scales = _read(args[2], page, offset, case.rank)
    amax = exact[:, : case.rank].unflatten(-1, (-1, FP8_BLOCK)).abs().amax(-1)
    fits = (amax <= E4M3_MAX * scales * (1 + 1e-5)) & ((amax >= E4M3_MAX / 2 * scales * (1 - 1e-5)) | (amax == 0))
    assert fits.all(), "a scale is not the least that fits"
    spacing = torch.full_like(exact, 2.0**-7)
    spacing[:, : case.rank] = 1 / 8  # of normal numbers; of the others it is 2 ** -9
    floor = torch.zeros_like(exact)
    floor[:, : case.rank] = 2.0**-9 * scales.repeat_interleave(FP8_BLOCK, dim=-1)
    off = (got - exact).abs() > exact.abs() * spacing + floor + 1e-30
    assert not off.any(), "read back, a value is too far off"


LAWS = [one_by_one, what_is_read_back_is_near]
