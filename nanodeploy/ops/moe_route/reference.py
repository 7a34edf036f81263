import torch
from torch import Tensor

from nanodeploy.ops.registry import op

SCORINGS = ("softmax", "sigmoid", "sqrt_softplus")
TINY = 1e-20  # keeps the sum of the chosen scores from being 0


@op(
    out=lambda logits, bias, slots, scoring, top_k, *_: (
        logits.new_empty((logits.shape[0], top_k), dtype=torch.int32),
        logits.new_empty((logits.shape[0], top_k)),
    )
)
def moe_route(
    logits: Tensor,
    bias: Tensor | None,
    slots: Tensor | None,
    scoring: str,
    top_k: int,
    num_groups: int,
    top_groups: int,
    renormalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Which experts a token goes to, and with what weights. With groups: DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).

    logits [T, E] fp32, rows may be strided; bias [E] fp32, finite, added to the scores for the choice only; slots [T]
    int64: a row whose slot is negative is padding and gets ids -1 and weights 0. scoring "softmax" (over all E),
    "sigmoid" or "sqrt_softplus". num_groups > 1: of so many groups of neighbouring experts those top_groups are kept
    whose two best choice scores sum highest. Returns ids [T, top_k] int32 in falling order of the choice score, and
    weights [T, top_k] fp32: the scores without bias of the chosen, divided by (their sum + 1e-20) if renormalise,
    times scale. Of equal scores, and of equal groups, the lower id wins. A row in which any choice score is NaN gets
    ids 0 to top_k - 1 and weights NaN: an error that shows and reads no memory it should not. In fp32.
    """
    assert scoring in SCORINGS, f"scoring {scoring!r}; there are {', '.join(SCORINGS)}"
    num_experts = logits.shape[1]
    assert num_experts % num_groups == 0 and top_groups * (num_experts // num_groups) >= top_k, "too few experts"
    score, choice = scores(logits, bias, scoring)
    ids = best(masked(choice, num_groups, top_groups) if num_groups > 1 else choice, top_k)
    broken = choice.isnan().any(dim=-1, keepdim=True)
    ids = torch.where(broken, torch.arange(top_k, device=ids.device), ids)
    weights = score.gather(1, ids)
    if renormalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    weights = torch.where(broken, torch.nan, weights * scale)
    ids = ids.to(torch.int32)
    if slots is not None:
        padding = slots[:, None] < 0
        ids, weights = torch.where(padding, -1, ids), torch.where(padding, 0, weights)
    return ids, weights


def scores(logits: Tensor, bias: Tensor | None, scoring: str) -> tuple[Tensor, Tensor]:
    """(the score of every expert, the score by which it is chosen)."""
    if scoring == "softmax":
        score = torch.softmax(logits, dim=-1)
    else:
        score = torch.sigmoid(logits) if scoring == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
    return score, score if bias is None else score + bias


def group_scores(choice: Tensor, num_groups: int) -> Tensor:
    """[T, num_groups]: the sum of each group's two best."""
    grouped = choice.unflatten(1, (num_groups, -1))
    return grouped.topk(min(2, grouped.shape[2]), dim=-1).values.sum(dim=-1)


def masked(choice: Tensor, num_groups: int, top_groups: int) -> Tensor:
    """The choice scores, -inf outside the best groups."""
    kept = torch.zeros((choice.shape[0], num_groups), dtype=torch.bool, device=choice.device)
    kept.scatter_(1, best(group_scores(choice, num_groups), top_groups), True)
    return choice.masked_fill(~kept.repeat_interleave(choice.shape[1] // num_groups, dim=1), -torch.inf)


def best(values: Tensor, count: int) -> Tensor:
    """Columns of each row's `count` largest, falling; of equals the lower column comes first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
