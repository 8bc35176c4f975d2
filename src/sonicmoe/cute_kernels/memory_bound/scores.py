"""From the chosen logits of a token to their scores, and back: the Jacobian, by lanes of a warp.

A lane holds the slots lane, lane + 32, ... of its token; -inf, whose score is 0, where there is none.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32

from ..ptx import reciprocal
from .logits import LARGEST, choose, exp, finite, key_of, number_of, sigmoid, warp_greatest, warp_sum

# As in the reference: keeps a sum of scores that are all 0 from dividing by it.
RENORMALIZE_EPSILON = 1e-20


class Terms(NamedTuple):
    values: list  # probabilities, whatever the kind
    part: Float32 | None  # the reciprocal of what renormalisation divides by
    top: Float32 | None  # the greatest of the logits that a softmax is over


@dataclass(frozen=True)
class Scores:
    kind: str
    renormalize: bool
    scale: float

    @property
    def over_all(self) -> bool:
        """Whether the softmax is over all experts"""
        return self.kind == "softmax_topk"

    def terms(self, logits: list, top: Float32, rest: Float32) -> Terms:
        """top, rest: the greatest logit, and the reciprocal of the sum, of a softmax over all experts."""
        if self.kind == "sigmoid":
            values, top = [sigmoid(z) for z in logits], None
        elif self.over_all:
            values = [exp(z - top) * rest for z in logits]
        else:
            greatest = logits[0]
            for z in logits[1:]:
                greatest = cute.arch.fmax(greatest, z)
            top = finite(number_of(warp_greatest(key_of(greatest))))
            weights = [exp(z - top) for z in logits]
            part = reciprocal(cute.arch.fmax(total(weights), Float32(1.0)))
            return Terms([w * part for w in weights], None, top)
        part = reciprocal(total(values) + Float32(RENORMALIZE_EPSILON)) if self.renormalize else None
        return Terms(values, part, top)

    def scores(self, terms: Terms) -> list:
        values = terms.values if terms.part is None else [v * terms.part for v in terms.values]
        return values if self.scale == 1.0 else [v * self.scale for v in values]

    def gradients(self, terms: Terms, dscores: list) -> tuple:
        """(gradients of the chosen logits, g such that every other one's is -g times its probability)

        With p the terms and D = sum of dscore * p: dp = dscore, renormalised (dscore - D part) part; a softmax makes
        p (dp - sum of dp p) of it, and that sum is D, renormalised D part (epsilon part).
        """
        values, part, top = terms
        common = total([d * v for d, v in zip(dscores, values, strict=True)])
        if part is not None:
            dscores = [(d - common * part) * part for d in dscores]
            common = common * part * (part * Float32(RENORMALIZE_EPSILON))
        if self.scale != 1.0:
            dscores, common = [d * self.scale for d in dscores], common * self.scale
        if top is None:
            return [d * v * (Float32(1.0) - v) for d, v in zip(dscores, values, strict=True)], common
        # A logit of +inf has no gradient, and leaves no probability to any that is less.
        alive = top < Float32(LARGEST)
        common = choose(alive, common, Float32(0.0))
        return [choose(alive, v * (d - common), Float32(0.0)) for d, v in zip(dscores, values, strict=True)], common


def total(values: list) -> Float32:
    """Of all slots of the token."""
    mine = values[0]
    for value in values[1:]:
        mine = mine + value
    return warp_sum(mine)
