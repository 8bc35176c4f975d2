"""transformers' own experts backends and ours, through the experts module of Qwen3-MoE."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from perf.layers import Layer, of_experts
from perf.problem import Problem

_MODEL = "transformers.models.qwen3_moe"
# batched_mm gathers a weight matrix per routed row.
_BATCHED_LIMIT = 16 << 30


class Transformers:
    """A backend of transformers' own."""

    checked = True

    def __init__(self, backend: str) -> None:
        self._backend = backend
        self.name = f"transformers-{backend}"

    def why_not(self, problem: Problem) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "the package transformers is not installed"
        if not hasattr(importlib.import_module(f"{_MODEL}.modeling_qwen3_moe"), "Qwen3MoeExperts"):
            return "this version of transformers keeps its experts in a list, without backends"
        if self._backend == "grouped_mm" and problem.form.dtype != "bf16":
            return "grouped_mm takes bf16 only"
        if self._backend == "batched_mm" and problem.shape.rows * problem.w1[0].nbytes > _BATCHED_LIMIT:
            return "it would gather a weight matrix for each of too many rows"
        if problem.form.activation != "swiglu" or problem.form.bias:
            return "Qwen3-MoE has swiglu without bias"
        return None

    def build(self, problem: Problem, router: bool) -> Layer:
        shape = problem.shape
        modeling = importlib.import_module(f"{_MODEL}.modeling_qwen3_moe")
        configuration: Any = importlib.import_module(f"{_MODEL}.configuration_qwen3_moe")
        config = configuration.Qwen3MoeConfig(
            hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts=shape.E, num_experts_per_tok=shape.K
        )
        config._experts_implementation = self._backend
        with torch.device("meta"):
            network = modeling.Qwen3MoeExperts(config)
        network.config._experts_implementation = self._backend
        network.gate_up_proj = torch.nn.Parameter(problem.w1.detach())
        network.down_proj = torch.nn.Parameter(problem.w2.detach())
        leaves = [problem.x, network.gate_up_proj, network.down_proj]

        def experts(x: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
            return network(x, ids, scores.to(x.dtype))

        return of_experts(problem, router, experts, leaves)


class ThroughTransformers(Transformers):
    """sonicmoe as a model of transformers calls it: beside "sonicmoe", what the adapter costs."""

    def __init__(self) -> None:
        super().__init__("sonicmoe_experts")
        self.name = "sonicmoe.transformers"

    def build(self, problem: Problem, router: bool) -> Layer:
        importlib.import_module("sonicmoe.integrations.transformers")
        return super().build(problem, router)
