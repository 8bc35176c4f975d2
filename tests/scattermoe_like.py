"""Layers with ScatterMoE's constructors, parameters and formula, by a loop: the package cannot be had from an index."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    def __init__(self, num_experts: int, input_size: int, output_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None

    def of(self, e: int, rows: Tensor) -> Tensor:
        return nn.functional.linear(rows, self.weight[e], None if self.bias is None else self.bias[e])


class MLP(nn.Module):
    halves = 1

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.num_experts, self.top_k, self.activation = num_experts, top_k, activation
        self.experts = Experts(num_experts, input_size, self.halves * hidden_size, bias)
        self.output_experts = Experts(num_experts, hidden_size, input_size, bias)

    def between(self, h: Tensor) -> Tensor:
        return self.activation(h)

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        rows = []
        for t, (ids, weights) in enumerate(zip(expert_idxs.tolist(), expert_p, strict=True)):
            each = [
                p * self.output_experts.of(e, self.between(self.experts.of(e, x[t])))
                for e, p in zip(ids, weights, strict=True)
            ]
            rows.append(torch.stack(each).sum(0))
        return torch.stack(rows)


class GLUMLP(MLP):
    halves = 2

    def between(self, h: Tensor) -> Tensor:
        up, gate = h.chunk(2, dim=-1)
        return self.activation(gate) * up
