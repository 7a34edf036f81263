from dataclasses import dataclass

import torch
from torch import Tensor

from nanodeploy.ops.case import Cost
from nanodeploy.ops.moe_route.reference import TINY, group_scores, masked, scores


@dataclass(frozen=True)
class Case:
    dtype: torch.dtype
    num_tokens: int
    num_experts: int
    top_k: int
    scoring: str = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0
    has_bias: bool = False
    has_slots: bool = True
    num_padding: int | None = None  # rows whose slot is -1


QWEN3_30B = {"num_experts": 128, "top_k": 8}
DEEPSEEK_V3 = {
    "num_experts": 256, "top_k": 8, "scoring": "sigmoid", "num_groups": 8, "top_groups": 4, "scale": 2.5,
    "has_bias": True,
}  # fmt: skip
KIMI_K2 = {"num_experts": 384, "top_k": 8, "scoring": "sigmoid", "scale": 2.827, "has_bias": True}

POINTS = {
    f"{name} T{num_tokens}": Case(torch.float32, num_tokens, **model, num_padding=0)
    for name, model in (("qwen3-30b", QWEN3_30B), ("deepseek-v3", DEEPSEEK_V3), ("kimi-k2", KIMI_K2))
    for num_tokens in (1, 64, 256, 8192)
}

ROWS = ("logits", "slots")  # arguments split by row when a row is run alone


def of(
    logits: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    scoring: str,
    top_k: int,
    num_groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
) -> Case:
    num_tokens, num_experts = logits.shape
    has = (bias is not None, slots is not None)
    return Case(logits.dtype, num_tokens, num_experts, top_k, scoring, num_groups, top_groups, renormalise, scale, *has)


def _case(groups: tuple[int, int, int], scale: float, num_experts: int, top_k: int, **fields) -> Case:
    num_groups, top_groups, size = groups
    if num_groups == 1:
        size = num_experts
    return Case(
        num_experts=num_groups * size, top_k=min(top_k, top_groups * size), num_groups=num_groups,
        top_groups=top_groups, scale=scale, **fields,
    )  # fmt: skip


def strategy(st, *, small: bool):
    return st.builds(
        _case,
        # (groups, groups kept, experts in each)
        groups=st.sampled_from([(1, 1, 0), (1, 1, 0), (2, 1, 4), (4, 2, 3), (8, 4, 2), (3, 2, 5), (8, 4, 32)]),
        dtype=st.just(torch.float32),
        num_tokens=st.integers(0, 5) if small else st.one_of(st.integers(0, 40), st.integers(41, 3000)),
        num_experts=st.sampled_from([1, 4, 8, 60, 128, 384, 512]),
        top_k=st.sampled_from([1, 2, 3, 6, 8, 16]),
        scoring=st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"]),
        renormalise=st.booleans(),
        scale=st.sampled_from([1.0, 2.5]),
        has_bias=st.booleans(),
        has_slots=st.booleans(),
    )


def make(case: Case, device: torch.device, seed: int) -> tuple:
    g = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(case.num_tokens, case.num_experts, generator=g, device=device) * 2
    bias = torch.randn(case.num_experts, generator=g, device=device) / 10 if case.has_bias else None
    if case.num_padding is None and seed % 2:  # so that scores are equal
        logits = (logits * 2).round() / 2
        bias = None if bias is None else (bias * 10).round() / 10
    if case.num_padding is None and seed % 4 == 3 and case.num_tokens:
        logits[seed % case.num_tokens, seed % case.num_experts] = torch.nan
    slots = None
    if case.has_slots:
        slots = torch.randperm(4 * case.num_tokens + 1, generator=g, device=device)[: case.num_tokens]
        num_padding = case.num_padding
        if num_padding is None:
            num_padding = int(torch.randint(case.num_tokens + 1, (), generator=g, device=device))
        slots[torch.randperm(case.num_tokens, generator=g, device=device)[:num_padding]] = -1
    groups = (case.num_groups, case.top_groups)
    return logits, bias, slots, case.scoring, case.top_k, *groups, case.renormalise, case.scale


def agrees(args: tuple, out: tuple[Tensor, Tensor], reference_out: tuple[Tensor, Tensor], case: Case) -> str | None:
    """Ids as in fp64, but where scores that differ only by fp32's rounding stand; weights as in fp64 for these ids."""
    logits, bias, slots, scoring, top_k, num_groups, top_groups, renormalise, scale = args
    ids, weights = out
    for name, got, ref in zip(("ids", "weights"), out, reference_out):
        if got.shape != ref.shape or got.dtype != ref.dtype:
            return f"{name} are {got.dtype} {tuple(got.shape)}; the reference gives {ref.dtype} {tuple(ref.shape)}"
    score, choice = scores(logits.double(), None if bias is None else bias.double(), scoring)
    broken = choice.isnan().any(dim=-1)
    settled = broken.clone() if slots is None else broken | (slots < 0)  # nothing is chosen in these rows
    for name, got, ref in zip(("ids", "weights"), out, reference_out):
        same = (got == ref) | ((got != got) & (ref != ref))
        if (wrong := settled & ~same.all(dim=-1)).any():
            return f"{name} of padding or NaN, as in row {int(wrong.int().argmax())}: {got[wrong][0].tolist()}"
    rows = (~settled).nonzero().squeeze(1)
    score, choice, ids, weights = score[rows], choice[rows], ids[rows].long(), weights[rows].double()
    narrow = scores(logits[rows], bias, scoring)[1]
    if not len(rows):
        return None
    if ((ids < 0) | (ids >= case.num_experts)).any() or (ids.sort(dim=-1).values.diff(dim=-1) == 0).any():
        return "ids out of range, or the same twice"
    eps = 16 * torch.finfo(torch.float32).eps * (score.amax(dim=-1) + choice.abs().amax(dim=-1))[:, None]
    clear = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    if num_groups > 1:
        clear &= _apart(group_scores(choice, num_groups), group_scores(narrow, num_groups), top_groups, 2 * eps)
        choice = masked(choice, num_groups, top_groups)
        narrow = masked(narrow, num_groups, top_groups)
    clear &= _apart(choice, narrow, top_k, eps)
    falling, order = choice.sort(dim=-1, descending=True, stable=True)
    if (wrong := clear & (ids != order[:, :top_k]).any(dim=-1)).any():
        row = int(wrong.int().argmax())
        return f"ids of row {int(rows[row])}: {ids[row].tolist()}; in fp64 {order[row, :top_k].tolist()}"
    if num_groups == 1 and (wrong := (choice.gather(1, ids) - falling[:, :top_k]).abs() > eps).any():
        return f"ids of row {int(rows[wrong.any(dim=-1).int().argmax()])} are not the best ones"
    wanted = score.gather(1, ids)
    if renormalise:
        wanted = wanted / (wanted.sum(dim=-1, keepdim=True) + TINY)
    wanted = wanted * scale
    wrong = ~((weights - wanted).abs() <= 64 * torch.finfo(torch.float32).eps * wanted + 1e-30)
    if wrong.any():
        row = int(wrong.any(dim=-1).int().argmax())
        return f"weights of row {int(rows[row])}: {weights[row].tolist()}; in fp64 {wanted[row].tolist()}"
    return None


def _apart(values: Tensor, narrow: Tensor, count: int, eps: Tensor) -> Tensor:
    """Rows whose `count` largest, and the one after, are well apart, each from the next, or equal; `narrow` is the same
    in fp32, where what is equal must be so too: two ways to one sum may round differently."""
    gaps, narrow_gaps = (
        v.sort(dim=-1, descending=True).values[:, : count + 1].diff(dim=-1).abs() for v in (values, narrow)
    )
    return (((gaps == 0) & (narrow_gaps == 0)) | (gaps > eps) | gaps.isnan()).all(dim=-1)


def cost(case: Case) -> Cost:
    num_tokens = case.num_tokens
    num_bytes = 4 * num_tokens * (case.num_experts + 2 * case.top_k) + 8 * num_tokens * case.has_slots
    return Cost(num_bytes + 4 * case.num_experts * case.has_bias)
