"""Top-K of logits: which experts each token chooses, with what scores, and the scores' gradients."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sonicmoe.reference.scores import softmax, working

# Of DeepSeek-V3: keeps a sum of scores that are all 0 from dividing by it, and is below the rounding of any other.
RENORMALIZE_EPSILON = 1e-20


def topk(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Scores (T, k), differentiable in logits, and expert ids (T, k) int32, best first; see `route_topk`."""
    z = working(logits)
    ids = _choose(z.detach(), k, bias, scoring, num_groups, top_groups)
    chosen = z.gather(1, ids)
    if scoring == "sigmoid":
        scores = chosen.sigmoid()
    elif scoring == "topk_softmax":
        scores = softmax(chosen)
    else:
        scores = softmax(z).gather(1, ids)
    if renormalize and scoring != "topk_softmax":
        scores = scores / (scores.sum(dim=1, keepdim=True) + RENORMALIZE_EPSILON)
    return scores if scale == 1.0 else scores * scale, ids.to(torch.int32)


def topk_backward(
    dscores: Tensor, ids: Tensor, logits: Tensor, scoring: str, renormalize: bool, scale: float
) -> Tensor:
    """Gradients (T, E) of logits, in their dtype, from those of the scores (T, k) of the experts ids."""
    return _gradients(dscores, ids, logits, scoring, renormalize, scale).to(logits.dtype)


def topk_backward_add_(
    dlogits: Tensor, dscores: Tensor, ids: Tensor, logits: Tensor, scoring: str, renormalize: bool, scale: float
) -> None:
    """Add them to dlogits, rounded once."""
    dlogits.copy_(working(dlogits) + _gradients(dscores, ids, logits, scoring, renormalize, scale))


def _gradients(dscores: Tensor, ids: Tensor, logits: Tensor, scoring: str, renormalize: bool, scale: float) -> Tensor:
    z = working(logits)
    ids = ids.long()
    d = dscores.to(z.dtype) * scale
    if scoring == "sigmoid":
        p = z.gather(1, ids).sigmoid()
    elif scoring == "topk_softmax":
        p = softmax(z.gather(1, ids))
    else:
        of_all = softmax(z)
        p = of_all.gather(1, ids)
    common = (d * p).sum(dim=1, keepdim=True)
    if renormalize and scoring != "topk_softmax":
        part = 1 / (p.sum(dim=1, keepdim=True) + RENORMALIZE_EPSILON)
        d = (d - common * part) * part
        common = common * part * (part * RENORMALIZE_EPSILON)
    if scoring == "sigmoid":
        return torch.zeros_like(z).scatter(1, ids, d * p * (1 - p))
    others = -common * of_all if scoring == "softmax_topk" else torch.zeros_like(z)
    # A logit of +inf has no gradient, and leaves no probability to any that is less.
    return others.scatter(1, ids, p * (d - common)).masked_fill(logits.isinf(), 0)


def best(values: Tensor, k: int) -> Tensor:
    """Positions (T, k) of the k greatest values of each row, greatest first, the lower position first among equals.

    A stable sort, because torch.topk leaves the order of equals open.
    """
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _choose(z: Tensor, k: int, bias: Tensor | None, scoring: str, num_groups: int, top_groups: int) -> Tensor:
    """Ids (T, k) of the best experts, best first, for logits without NaN."""
    compared = z if bias is None else _biased(z, bias, scoring)
    if top_groups == num_groups:
        return best(compared, k)
    if scoring == "sigmoid":
        values = _masked(z.sigmoid(), z) if bias is None else compared
        worth = _two_greatest(values.unflatten(1, (num_groups, -1)))
    else:
        worth = compared.unflatten(1, (num_groups, -1)).amax(dim=2)
    # In the order of their ids, so that the lower one of two equal experts stays in front.
    groups = best(worth, top_groups).sort(dim=1).values
    size = z.shape[1] // num_groups
    ids = (groups.unsqueeze(2) * size + torch.arange(size, device=z.device)).flatten(1)
    return ids.gather(1, best(compared.gather(1, ids), k))


def _biased(z: Tensor, bias: Tensor, scoring: str) -> Tensor:
    """What is compared under a bias; what has no number is -inf."""
    scores = z if scoring == "topk_softmax" else z.sigmoid() if scoring == "sigmoid" else softmax(z)
    biased = _masked(scores + bias.detach().to(z.dtype), z)
    return biased.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _masked(values: Tensor, z: Tensor) -> Tensor:
    return values.masked_fill(z == -math.inf, -math.inf)


def _two_greatest(values: Tensor) -> Tensor:
    """Sum of the two greatest of the last dimension: a single finite one counts, a group without one is -inf."""
    greatest = values.topk(min(2, values.shape[-1]), dim=-1).values
    rest = greatest[..., 1:]
    return greatest[..., 0] + rest.masked_fill(rest == -math.inf, 0).sum(dim=-1)
