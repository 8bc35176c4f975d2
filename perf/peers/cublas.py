"""The bound: a layer's products as batched ones of equal-sized groups by cuBLAS, inputs gathered beforehand.

Nothing else: no router, no activation, no sum. Two products forward, four backward. Not a layer, so not checked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from perf.layers import Layer
from perf.problem import Problem
from perf.protocol import Case


class Cublas:
    name = "cublas"
    checked = False

    def why_not(self, problem: Problem) -> str | None:
        return None

    def build(self, problem: Problem, router: bool) -> Layer:
        raise TypeError("the bound is no layer: it has only a case")

    @staticmethod
    def rows(problem: Problem, rows: int) -> int:
        """Rows of a group, rounded up so that the bound does at least the same work."""
        return max(1, -(-rows // problem.shape.E))

    def flops(self, problem: Problem, rows: int) -> dict[str, int]:
        hidden, inter = problem.shape.H, problem.shape.I
        width = problem.w1.shape[1]
        both = 2 * problem.shape.E * self.rows(problem, rows) * hidden * (width + inter)
        return {"forward": both, "inference": both, "backward": 2 * both, "both": 3 * both}

    def case(self, problem: Problem, rows: int, what: str) -> Case:
        """what: "forward" (or "inference") or anything else for forward and backward as laps."""
        per_group = self.rows(problem, rows)
        x, a, dh = (
            problem.normal(problem.shape.E, per_group, columns)
            for columns in (problem.shape.H, problem.shape.I, problem.w1.shape[1])
        )
        w1, w2 = problem.w1.detach(), problem.w2.detach()

        def forward() -> tuple[Tensor, ...]:
            return torch.bmm(x, w1.transpose(1, 2)), torch.bmm(a, w2.transpose(1, 2))

        def backward() -> tuple[Tensor, ...]:
            return (
                torch.bmm(x, w2),
                torch.bmm(x.transpose(1, 2), a),
                torch.bmm(dh, w1),
                torch.bmm(dh.transpose(1, 2), x),
            )

        def both(lap: Callable[[], None]) -> tuple[Tensor, ...]:
            forward()
            lap()
            return backward()

        if what in ("forward", "inference"):
            return Case(lambda lap: forward(), laps=() if what == "inference" else ("forward",))
        return Case(both, laps=("forward", "backward"))
