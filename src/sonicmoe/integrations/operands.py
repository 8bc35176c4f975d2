"""What a model hands over, in the dtypes that the layer takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import autocast_dtype


def as_autocast(first: Tensor, *others: Tensor | None) -> list[Any]:
    """x, weights and biases as `moe_experts` has them: in torch.autocast's dtype, unless the first is in fp64."""
    dtype = autocast_dtype(first)
    if dtype is None or not first.is_floating_point() or first.dtype is torch.float64:
        return [first, *others]
    return [t if t is None else t.to(dtype) for t in (first, *others)]


def scores_for(x: Tensor, scores: Tensor) -> Tensor:
    """Scores of any floating dtype in fp32, which they are used in; fp64 ones stay so for an x in fp64."""
    if not scores.is_floating_point():
        raise InvalidArgument("scores.dtype", scores.dtype, "a floating dtype")
    both = scores.dtype is x.dtype is torch.float64
    return scores.to(torch.float64 if both else torch.float32)
