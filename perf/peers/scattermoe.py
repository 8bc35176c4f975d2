"""ScatterMoE (github.com/shawntan/scattermoe), its gated MLP. Its w1 rows are [up | gate]."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from perf.layers import Layer, of_experts
from perf.peers.base import gate_function, why_not_activation
from perf.problem import Problem

ADDRESSED = 1 << 31


class ScatterMoE:
    name = "scattermoe"
    checked = True

    def why_not(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("scattermoe") is None:
            return "the package scattermoe is not installed"
        if not problem.form.device.startswith("cuda"):
            return "it needs a GPU"
        if max(problem.w1.numel(), problem.w2.numel()) > ADDRESSED:
            return f"it addresses weights of up to {ADDRESSED} elements, by 32-bit products of expert and stride"
        return why_not_activation(problem.form.kind)

    def build(self, problem: Problem, router: bool) -> Layer:
        shape, kind = problem.shape, problem.form.kind
        mlp = importlib.import_module("scattermoe.mlp")
        kernel: Any = mlp.GLUMLP if kind.gated else mlp.MLP
        with torch.device("meta"):
            network = kernel(shape.H, shape.I, shape.E, shape.K, bias=problem.form.bias, activation=gate_function(kind))
        swap = _swapped if kind.gated else (lambda w: w)
        network.experts.weight = torch.nn.Parameter(swap(problem.w1.detach()))
        network.output_experts.weight = torch.nn.Parameter(problem.w2.detach())
        leaves = [problem.x, network.experts.weight, network.output_experts.weight]
        if problem.b1 is not None and problem.b2 is not None:
            network.experts.bias = torch.nn.Parameter(swap(problem.b1.detach()))
            network.output_experts.bias = torch.nn.Parameter(problem.b2.detach())
            leaves += [network.experts.bias, network.output_experts.bias]

        def experts(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
            return network(x, scores.to(x.dtype), ids)

        def weights(gradients: list[Tensor], e: int) -> tuple[Tensor, Tensor]:
            return swap(gradients[1][e][None])[0], gradients[2][e]

        return of_experts(problem, router, experts, leaves, weights)


def _swapped(w: Tensor) -> Tensor:
    """(E, 2*I, ...) with its halves exchanged."""
    first, second = w.chunk(2, dim=1)
    return torch.cat((second, first), dim=1)
