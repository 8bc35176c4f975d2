"""Token rounding of logits: which pairs each expert keeps, their scores, the plan, and the scores' gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sonicmoe.reference.plan import plan
from sonicmoe.reference.scores import exponentials, or_one, working
from sonicmoe.reference.topk import best

_WORD = 32  # bits


class Rounded(NamedTuple):
    """What token rounding makes of logits (T, E): a `Routing` with cu_slots, and which pairs are which.

    chosen, kept: (T, ceil(E / 32)) int32, a bit for each pair: whether top-K chose it, and whether its expert keeps it.
    """

    scores: Tensor
    cu_rows: Tensor
    row_token: Tensor
    row_slot: Tensor
    slot_row: Tensor
    cu_slots: Tensor
    chosen: Tensor
    kept: Tensor


def token_rounding(logits: Tensor, draws: Tensor | None, k: int, tile_m: int, rule: str, num_slots: int) -> Rounded:
    """See `route_token_rounding`; draws (E,), uniform in [0, 1), for the stochastic rules."""
    scores, chosen = pair_scores(working(logits), k)
    return rounded(scores, chosen, draws, tile_m, rule, num_slots)


def rounded(scores: Tensor, chosen: Tensor, draws: Tensor | None, tile_m: int, rule: str, num_slots: int) -> Rounded:
    """What becomes of pairs (T, E) with these scores, of which top-K chose some."""
    kept = _kept(scores.detach(), chosen, tile_m, rule, draws)
    pairs, cu_slots = _slots(scores, kept, num_slots)
    index = plan(pairs.expert, pairs.token, scores.shape[1])
    return Rounded(pairs.scores, *index, cu_slots, packed(chosen), packed(kept))


def token_rounding_backward(dscores: Tensor, logits: Tensor, cu_slots: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    """Gradients (T, E) of logits, in their dtype, from those of the scores (S,) of the slots."""
    return _gradients(dscores, logits, cu_slots, chosen, kept).to(logits.dtype)


def token_rounding_backward_add_(
    dlogits: Tensor, dscores: Tensor, logits: Tensor, cu_slots: Tensor, chosen: Tensor, kept: Tensor
) -> None:
    """Add them to dlogits, rounded once."""
    dlogits.copy_(working(dlogits) + _gradients(dscores, logits, cu_slots, chosen, kept))


def _gradients(dscores: Tensor, logits: Tensor, cu_slots: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    z = working(logits)
    is_chosen, is_kept = (unpacked(words, logits.shape[1]) for words in (chosen, kept))
    _, weights = exponentials(z)
    of_all = weights / or_one(weights.sum(dim=1, keepdim=True))
    of_chosen = weights * is_chosen
    of_chosen = of_chosen / or_one(of_chosen.sum(dim=1, keepdim=True))
    if dscores.numel() == 0:
        return torch.zeros_like(z)
    slot = cu_slots[:-1].unsqueeze(1) + is_kept.cumsum(dim=1) - 1
    # A pair that is not kept reads the slot before it, whose gradient may be anything.
    d = dscores[slot.clamp(min=0)].to(z.dtype).masked_fill(~is_kept, 0)
    products = d * torch.where(is_chosen, of_chosen, of_all)
    common = (products * is_chosen).sum(dim=1, keepdim=True)
    common_all = (products * ~is_chosen).sum(dim=1, keepdim=True)
    gradient = products - of_chosen * common - of_all * common_all
    return gradient.masked_fill(~torch.isfinite(logits), 0)


def packed(bits: Tensor) -> Tensor:
    """(T, ceil(E / 32)) int32 of (T, E) bool: expert e is bit e % 32 of word e // 32."""
    words = torch.nn.functional.pad(bits, (0, -bits.shape[1] % _WORD)).unflatten(1, (-1, _WORD))
    weights = torch.ones(_WORD, dtype=torch.int64, device=bits.device) << torch.arange(_WORD, device=bits.device)
    total = (words * weights).sum(dim=2)
    return (total - ((total >> (_WORD - 1)) << _WORD)).to(torch.int32)


def unpacked(words: Tensor, num_experts: int) -> Tensor:
    """(T, E) bool of what `packed` makes."""
    bits = words.unsqueeze(2) >> torch.arange(_WORD, dtype=torch.int32, device=words.device)
    return (bits & 1).flatten(1)[:, :num_experts].bool()


class _Pairs(NamedTuple):
    """Slots in the order of their tokens, (S,): the unused ones are last, with expert E, token T and score 0."""

    scores: Tensor
    expert: Tensor
    token: Tensor


def pair_scores(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores (T, E) of all pairs, as they will be used, and which of them top-K chose."""
    ids = best(z.detach(), k)
    chosen = torch.zeros_like(z, dtype=torch.bool).scatter_(1, ids, True)
    _, weights = exponentials(z)
    of_all = or_one(weights.sum(dim=1, keepdim=True))
    of_chosen = or_one(weights.gather(1, ids).sum(dim=1, keepdim=True))
    return weights / torch.where(chosen, of_chosen, of_all), chosen


def _kept(scores: Tensor, chosen: Tensor, tile_m: int, rule: str, draws: Tensor | None) -> Tensor:
    """Which pairs (T, E) are kept: of each expert the first f'_e in order of preference."""
    order = _preference(scores, chosen)
    rank = torch.arange(scores.shape[0], device=scores.device)
    sorted_scores = scores.T.gather(1, order) if rule == "stochastic_mass" else None
    rounded = round_counts(chosen.sum(dim=0), tile_m, rule, scores.shape[0], draws, sorted_scores)
    first = rank < rounded.unsqueeze(1)
    return torch.zeros_like(first).scatter_(1, order, first).T


def _preference(scores: Tensor, chosen: Tensor) -> Tensor:
    """Tokens (E, T) of each expert, best first: those that chose it before all others, each by descending score.

    Scores are in [0, 1], so that their bits, read as an integer, are ordered as they are and leave its second highest
    bit free. That makes the order exact, which a sum of score and bonus would not be.
    """
    bits = torch.int32 if scores.dtype == torch.float32 else torch.int64
    highest = 1 << (30 if bits == torch.int32 else 62)
    key = scores.T.contiguous().view(bits) + highest * chosen.T.to(bits)
    return best(key, scores.shape[0])


def round_counts(
    counts: Tensor,
    tile_m: int,
    rule: str,
    num_tokens: int,
    draws: Tensor | None = None,
    sorted_scores: Tensor | None = None,
) -> Tensor:
    """Counts f' (E,) of the experts after rounding f to multiples of tile_m, none above num_tokens.

    Args:
        counts: (E,) int64, f: tokens that chose each expert.
        tile_m, rule: see `route_token_rounding`.
        num_tokens: T.
        draws: (E,) uniform in [0, 1), for the stochastic rules.
        sorted_scores: (E, T) in order of preference, for "stochastic_mass".
    """
    floor = counts // tile_m * tile_m
    over = counts - floor
    can_rise = (over > 0) & (floor + tile_m <= num_tokens)
    if rule == "nearest":
        up = 2 * over > tile_m
    elif rule == "balanced":
        up = _rises_balanced(counts, tile_m, can_rise)
    elif rule == "stochastic" and draws is not None:
        up = draws * tile_m < over
    elif rule == "stochastic_mass" and draws is not None and sorted_scores is not None:
        rank = torch.arange(num_tokens, device=counts.device) - floor.unsqueeze(1)
        chosen = sorted_scores * ((rank >= 0) & (rank < over.unsqueeze(1)))
        tile = sorted_scores * ((rank >= 0) & (rank < tile_m))
        up = draws * tile.sum(dim=1) < chosen.sum(dim=1)
    elif rule in ("up", "down"):
        up = torch.full_like(can_rise, rule == "up")
    else:
        raise ValueError(f"rule {rule!r} is another, or needs draws and sorted_scores")
    return floor + tile_m * (up & can_rise)


def _rises_balanced(counts: Tensor, tile_m: int, can_rise: Tensor) -> Tensor:
    """Expert by expert: up if down would take the running sum of f' - f below -tile_m / 2, and up is possible.

    In closed form. `wanted[e]` is how many of the experts up to e would have to rise for their rows to be the
    multiple of tile_m nearest to their count, ties down. The number that did is min(wanted[e], that of e - 1, plus one
    if e can rise): all that could, less the greatest excess over what was wanted so far.
    """
    wanted = (2 * counts.cumsum(0) + tile_m - 1) // (2 * tile_m) - (counts // tile_m).cumsum(0)
    could = can_rise.cumsum(0)
    did = could + (wanted - could).cummin(0).values.clamp(max=0)
    return did.diff(prepend=did.new_zeros(1)) > 0


def _slots(scores: Tensor, kept: Tensor, num_slots: int) -> tuple[_Pairs, Tensor]:
    """The kept pairs (T, E) as a list, whatever their number: slot s is where their running count reaches s + 1."""
    tokens, experts = kept.shape
    running = kept.flatten().cumsum(0)
    slot = torch.arange(num_slots, device=kept.device)
    pair = torch.searchsorted(running, slot + 1)
    unused = pair == tokens * experts
    # num_slots <= T*E: an unused slot reads the pair of its own number, so that no two of them meet in the backward.
    values = scores.flatten().gather(0, torch.where(unused, slot, pair))
    pairs = _Pairs(
        scores=values.masked_fill(unused, 0),
        expert=torch.where(unused, experts, pair % experts),
        token=pair // experts,
    )
    cu_slots = torch.nn.functional.pad(kept.sum(dim=1).cumsum(0), (1, 0))
    return pairs, cu_slots.to(torch.int32)
