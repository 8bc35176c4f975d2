"""Whether an implementation's output is right, before its speed is worth reporting. Imports torch alone.

Outputs are compared with fp32 arithmetic on samples: tokens for what has a row per token, whole experts for gradients
of weights. Errors are relative to the truth's norm. Zeros, a flipped sign, NaN and one wrong sample fail.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = 16
EXPERTS = 2


class Pairs(NamedTuple):
    """Routed (token, expert) pairs with their scores, as three vectors of one length; and the slot of each."""

    token: Tensor
    expert: Tensor
    score: Tensor
    slot: Tensor


def pairs_of_ids(ids: Tensor, scores: Tensor) -> Pairs:
    """Of expert ids and scores (T, K); slot t*K + k."""
    tokens = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1])
    slots = torch.arange(ids.numel(), device=ids.device)
    return Pairs(tokens, ids.reshape(-1).long(), scores.detach().reshape(-1).float(), slots)


def pairs_of_plan(cu_rows: Tensor, row_token: Tensor, row_slot: Tensor, scores: Tensor) -> Pairs:
    """Of a routing's plan; its padding left out."""
    count = int(cu_rows[-1])
    rows = torch.arange(count, device=cu_rows.device)
    expert = torch.searchsorted(cu_rows[1:].long(), rows, right=True)
    slot = row_slot[:count].long()
    return Pairs(row_token[:count].long(), expert, scores.detach().float()[slot], slot)


class Truth(NamedTuple):
    """What a layer must give, on samples. tokens: which; experts: which; dscores: at the slots given.

    dx is None where it is not known, slots and experts are empty.
    """

    tokens: Tensor
    o: Tensor
    dx: Tensor | None
    slots: Tensor
    dscores: Tensor
    experts: list[int]
    dw1: Tensor
    dw2: Tensor


class Weights(NamedTuple):
    x: Tensor
    do: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None


class Router(NamedTuple):
    """A layer's router, where the scores are the softmax of a token's chosen logits.

    weight  (E, H)
    logits  (T, E), as the layer rounds them: by these it chooses
    """

    weight: Tensor
    logits: Tensor


def _expert(layer: Weights, act: Callable[[Tensor], Tensor], e: int, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    h = x @ w1.T
    if layer.b1 is not None:
        h = h + layer.b1[e].detach().float()
    y = act(h) @ w2.T
    return y if layer.b2 is None else y + layer.b2[e].detach().float()


def _routed_scores(router: Router, x: Tensor, tokens: Tensor, experts: Tensor) -> Tensor:
    """Of the tokens' pairs, K to each: from the rounded logits, differentiable in x as if they were not rounded."""
    exact = x @ router.weight.detach().float().T
    logits = exact + (router.logits[tokens].float() - exact).detach()
    return logits.gather(1, experts.view(len(tokens), -1)).softmax(1).reshape(-1)


def _tokens_truth(
    layer: Weights, act: Callable[[Tensor], Tensor], pairs: Pairs, tokens: Tensor, router: Router | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, dx of the tokens; slots and dscores of their pairs, none with a router."""
    x = layer.x.detach()[tokens].float().requires_grad_()
    position = torch.full((layer.x.shape[0],), -1, device=x.device, dtype=torch.long)
    position[tokens] = torch.arange(len(tokens), device=x.device)
    mine = (position[pairs.token] >= 0).nonzero().squeeze(1)
    row, expert = position[pairs.token[mine]], pairs.expert[mine]
    given = pairs.score[mine].clone().requires_grad_()
    score = given if router is None else _routed_scores(router, x, tokens, expert)
    o = 0 * x  # of x, also where no pair is sampled
    for e in expert.unique().tolist():
        of_e = (expert == e).nonzero().squeeze(1)
        w1, w2 = layer.w1.detach()[e].float(), layer.w2.detach()[e].float()
        y = _expert(layer, act, e, x[row[of_e]], w1, w2)
        o = o.index_add(0, row[of_e], score[of_e, None] * y)
    if router is not None:
        (dx,) = torch.autograd.grad(o, (x,), layer.do[tokens].float())
        return o.detach(), dx, mine[:0], given.detach()[:0]
    dx, dscore = torch.autograd.grad(o, (x, given), layer.do[tokens].float(), materialize_grads=True)
    return o.detach(), dx, pairs.slot[mine], dscore


def _expert_truth(layer: Weights, act: Callable[[Tensor], Tensor], pairs: Pairs, e: int) -> tuple[Tensor, Tensor]:
    mine = (pairs.expert == e).nonzero().squeeze(1)
    w1, w2 = (w.detach()[e].float().requires_grad_() for w in (layer.w1, layer.w2))
    token = pairs.token[mine]
    y = _expert(layer, act, e, layer.x.detach()[token].float(), w1, w2)
    dw1, dw2 = torch.autograd.grad(y, (w1, w2), pairs.score[mine, None] * layer.do[token].float())
    return dw1, dw2


def truth_of(
    layer: Weights,
    act: Callable[[Tensor], Tensor],
    pairs: Pairs,
    router: Router | None = None,
    seed: int = 0,
    backward: bool = True,
) -> Truth:
    """The truth on TOKENS random tokens, the first and the last among them, and on the fullest and the last expert.

    With a router dx is that of the whole layer, and there are no dscores. Without backward there are no experts.
    """
    count, experts = layer.x.shape[0], layer.w1.shape[0]
    generator = torch.Generator().manual_seed(seed)
    picked = torch.cat([torch.tensor([0, count - 1]), torch.randint(0, count, (TOKENS - 2,), generator=generator)])
    tokens = picked.unique().to(layer.x.device)
    o, dx, slots, dscores = _tokens_truth(layer, act, pairs, tokens, router)
    counts = torch.bincount(pairs.expert, minlength=experts)
    chosen = list(dict.fromkeys([int(counts.argmax()), experts - 1]))[:EXPERTS] if backward else []
    gradients = [_expert_truth(layer, act, pairs, e) for e in chosen]
    empty = o.new_empty(0)
    dw1 = torch.stack([g[0] for g in gradients]) if gradients else empty
    dw2 = torch.stack([g[1] for g in gradients]) if gradients else empty
    return Truth(tokens, o, dx, slots, dscores, chosen, dw1, dw2)


def error(actual: Tensor, truth: Tensor) -> float:
    """The relative error of the whole, or a quarter of the worst sample's if that is more; inf for NaN.

    A sample is an index of the first dimension. A quarter: a single row of few elements may be off by more.
    """
    if actual.shape != truth.shape:
        return float("inf")
    actual, truth = actual.detach().float(), truth.float()
    if truth.numel() == 0:
        return 0.0
    difference = actual - truth
    whole = float(difference.norm() / truth.norm().clamp_min(1e-30))
    worst = 0.0
    if truth.dim() > 1:
        scale = truth.flatten(1).norm(dim=1)
        # An expert without rows, or a token without experts, must be zero: compare it with the typical sample.
        scale = torch.where(scale > 0, scale, scale.square().mean().sqrt().clamp_min(1e-30))
        worst = float((difference.flatten(1).norm(dim=1) / scale).max()) / 4
    found = max(whole, worst)
    return found if found == found and whole == whole else float("inf")


def tolerance(dtype: torch.dtype, rounded_steps: int = 1) -> float:
    """Relative error that is accepted after so many roundings to dtype, and at least that of fp32 sums."""
    return max(1.28 * rounded_steps * torch.finfo(dtype).eps, 2e-4)
