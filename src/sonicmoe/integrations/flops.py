"""Importing this module has torch.utils.flop_counter.FlopCounterMode count the experts' products.

A product counts 2 R n k, with R the rows that there is room for: after top-K these are the rows; after token rounding,
whose rows only the device knows, a bound. Import it before the mode is made, which copies what there is then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

Shape = tuple[int, ...]


def _by_weight(rows: Shape, weight: Shape) -> int:
    return 2 * rows[0] * weight[1] * weight[2]


def _weight_gradient(first: Shape, second: Shape, _: Shape, row_token: Shape, *__: Any) -> int:
    return 2 * row_token[0] * first[1] * second[1]


# By the ops' arguments, tensors as their shapes.
_FORMULAS: dict[str, Callable[..., int]] = {
    "up_proj": lambda x, w1, b1, cu_rows, row_token, *_: _by_weight(row_token, w1),
    "down_proj": lambda a, w2, *_: _by_weight(a, w2),
    "down_dgrad": lambda do, w2, b2, h, *_: _by_weight(h, w2),
    "down_dgrad_": lambda do, w2, b2, h, *_: _by_weight(h, w2),
    "up_dgrad": lambda dh, w1, *_: _by_weight(dh, w1),
    "down_wgrad": _weight_gradient,
    "down_wgrad_add_": lambda dw2, *given: _weight_gradient(*given),
    "down_wgrad_aggregate_": lambda dw2, adds, *given: _weight_gradient(*given),
    "up_wgrad": _weight_gradient,
    "up_wgrad_add_": lambda dw1, *given: _weight_gradient(*given),
}


for _name, _formula in _FORMULAS.items():
    register_flop_formula(getattr(torch.ops.sonicmoe, _name))(lambda *shapes, _of=_formula, **_: _of(*shapes))
