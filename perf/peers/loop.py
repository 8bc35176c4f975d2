"""A plain loop over experts in torch: what a model does without any library for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from perf.layers import Layer, of_experts
from perf.peers.base import activate, why_not_activation
from perf.problem import Problem


class Loop:
    name = "loop"
    checked = True

    def why_not(self, problem: Problem) -> str | None:
        return why_not_activation(problem.form.kind)

    def build(self, problem: Problem, router: bool) -> Layer:
        kind, w1, w2, b1, b2 = problem.form.kind, problem.w1, problem.w2, problem.b1, problem.b2

        def experts(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
            o = torch.zeros_like(x)
            # Unbound: an index per expert would make autograd fill a gradient of all experts for each.
            for e, (up, down) in enumerate(zip(w1.unbind(), w2.unbind(), strict=True)):
                token, position = torch.where(ids == e)
                h = F.linear(x[token], up, None if b1 is None else b1[e])
                y = F.linear(activate(kind, h), down, None if b2 is None else b2[e])
                o.index_add_(0, token, (y * scores[token, position, None]).to(o.dtype))
            return o

        return of_experts(problem, router, experts)
