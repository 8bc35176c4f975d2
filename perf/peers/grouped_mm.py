"""torch's grouped product: gather, two grouped products, weighted index_add. Eager, or compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.layers import Layer, of_experts
from perf.peers.base import activate, why_not_activation
from perf.problem import Problem


def _grouped_product() -> Callable[..., Tensor] | None:
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class GroupedMM:
    checked = True

    def __init__(self, compiled: bool = False) -> None:
        self._compiled = compiled
        self.name = "grouped_mm-compiled" if compiled else "grouped_mm"

    def why_not(self, problem: Problem) -> str | None:
        if _grouped_product() is None:
            return f"torch {torch.__version__} has no grouped_mm"
        if problem.form.dtype != "bf16":
            return "grouped_mm takes bf16 only"
        return why_not_activation(problem.form.kind)

    def build(self, problem: Problem, router: bool) -> Layer:
        product = _grouped_product()
        assert product is not None
        kind, w1, w2, b1, b2 = problem.form.kind, problem.w1, problem.w2, problem.b1, problem.b2

        def experts(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
            flat = ids.reshape(-1)
            order = flat.argsort()
            ends = torch.histc(flat.float(), bins=w1.shape[0], min=0, max=w1.shape[0] - 1).cumsum(0).int()
            token = order // ids.shape[1]
            h = product(x.index_select(0, token), w1.transpose(1, 2), offs=ends)
            if b1 is not None:
                h = h + b1[flat[order]]
            y = product(activate(kind, h), w2.transpose(1, 2), offs=ends)
            if b2 is not None:
                y = y + b2[flat[order]]
            weighted = y * scores.to(x.dtype).reshape(-1)[order, None]
            return torch.zeros_like(x).index_add_(0, token, weighted)

        if not self._compiled:
            return of_experts(problem, router, experts)
        # Else the ninth shape of a run would run eagerly: Dynamo counts the recompilations of a code object.
        torch.compiler.reset()
        return of_experts(problem, router, torch.compile(experts, dynamic=False))
