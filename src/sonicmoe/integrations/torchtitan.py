"""torchtitan: `GroupedExperts` with its three grouped products by sonicmoe.

    config.traverse(torchtitan GroupedExperts.Config) -> replace each by `convert(config)`

Weights, names, sharding and forward stay torchtitan's own; only its seam `_grouped_mm` is ours. w1 and w3 stay separate
parameters: gate and up are two products, without a stacked copy, and the activation between them is torchtitan's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torchtitan.models.common.moe import GroupedExperts as TorchtitanGroupedExperts

from sonicmoe.functional import resolve_backend
from sonicmoe.integrations.between import GroupedLinear, check_weight


class GroupedExperts(TorchtitanGroupedExperts):
    """torchtitan's class on sonicmoe's kernels. Rows beyond the counts give 0, and get no gradient."""

    @dataclass(kw_only=True, slots=True)
    class Config(TorchtitanGroupedExperts.Config):
        """That of torchtitan's class."""

    def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
        """A (R, K) by B_t (E, K, N), a transposed view of a contiguous weight; offs (E,) int32, ends of the groups."""
        weight = B_t.transpose(-2, -1)
        backend = resolve_backend("auto", A, weight)
        check_weight("B_t", weight, A, backend)
        return GroupedLinear.apply(A, weight, None, torch.nn.functional.pad(offs, (1, 0)), backend)


def convert(config: TorchtitanGroupedExperts.Config) -> GroupedExperts.Config:
    """The configuration of the same experts on sonicmoe's kernels."""
    return GroupedExperts.Config(**{f.name: getattr(config, f.name) for f in fields(config) if f.init})
