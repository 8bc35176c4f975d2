"""Logits to scores: fp32 (fp64 stays fp64), with a defined result for -inf, +inf and NaN."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def working(logits: Tensor) -> Tensor:
    """Logits in fp32 or fp64. NaN becomes -inf, +inf the largest finite number; neither has a gradient."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(dtype).nan_to_num(nan=-math.inf, posinf=torch.finfo(dtype).max, neginf=-math.inf)


def exponentials(z: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each token, (T, 1), without gradient, and exp(z - it), whose sum is 0 or at least 1.

    The sum is 0 where all logits are -inf: divide by `or_one(sum)` and the softmax of such a token is 0, not NaN.
    """
    top = z.detach().amax(dim=1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    return top, (z - top).exp()


def or_one(total: Tensor) -> Tensor:
    """1 where a sum of exponentials is 0. Not `clamp(min=1)`: torch 2.14 lets no gradient through for a sum of 1."""
    return torch.where(total > 0, total, 1)


def softmax(z: Tensor) -> Tensor:
    """Over the experts; 0 for a token whose logits are all -inf."""
    _, weights = exponentials(z)
    return weights / or_one(weights.sum(dim=1, keepdim=True))
