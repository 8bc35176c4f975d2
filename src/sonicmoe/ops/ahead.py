"""Which kernels a layer will need, said before it runs, so that they are compiled side by side."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

from sonicmoe.activations import Activation
from sonicmoe.cute_kernels.aggregate import AggregateSpec
from sonicmoe.cute_kernels.balance import BalanceBackwardSpec, BalanceSpec
from sonicmoe.cute_kernels.bias_dot import BiasDotSpec
from sonicmoe.cute_kernels.bias_grad import BiasGradSpec
from sonicmoe.cute_kernels.plan import PlanSpec
from sonicmoe.cute_kernels.rounding import RoundingBackwardSpec, RoundingSpec
from sonicmoe.cute_kernels.topk import TopKBackwardSpec, TopKSpec
from sonicmoe.cute_kernels.variants import GemmSpec
from sonicmoe.jit.ahead import compile_ahead
from sonicmoe.jit.spec import Spec
from sonicmoe.ops._cute import NAMES
from sonicmoe.ops._gemm import spec_of


class Router(NamedTuple):
    """How a layer routes: as `route_topk` without bias, groups or scale, or by token rounding."""

    k: int
    scoring: str
    renormalize: bool
    rounding: tuple[int, str] | None  # tile_m and rule


class Experts(NamedTuple):
    """What the kernels of `moe_experts` depend on."""

    sizes: tuple[int, int, int]  # E, H, I
    dtype: torch.dtype
    activation: str
    w1_layout: str
    biases: tuple[bool, bool]  # whether there are b1 and b2
    per_token: int | None  # slots of each token, None for a variable number
    training: bool


@cache
def compile_layer(device: int | None, experts: Experts, router: Router | None = None) -> None:
    """Have a layer's kernels compiled, once in a process; returns at once.

    router: also its kernels, and those of the load balancing loss. Raises InvalidArgument if no kernel fits.
    """
    name = NAMES.get(experts.dtype, "")
    if name in ("bf16", "fp16"):
        routing = router_specs(experts.sizes[0], name, router, experts.training) if router else []
        # Those that take long at first; so does token rounding, where it comes first.
        compile_ahead([*routing[:1], *expert_specs(device, experts), *routing[1:]])


def expert_specs(device: int | None, form: Experts) -> list[Spec]:
    """Of `moe_experts`, those that take longest to compile first."""
    (experts, hidden, inter), dtype, act = form.sizes, NAMES[form.dtype], Activation.parse(form.activation)
    _, _, _, w1_layout, biases, per_token, training = form
    halves, interleaved = 2 if act.gated else 1, w1_layout == "interleaved"
    split = 2 if interleaved else 1
    width = halves * inter // split

    def gemm(variant: str, n: int, k: int, *form: Any) -> GemmSpec:
        return spec_of(device, variant, experts, n, k, dtype, *form)

    up = gemm("up_proj", inter, hidden, str(act), interleaved, halves, biases[0], training)
    down = gemm("down_proj", hidden, inter, None, False, 1, biases[1])
    aggregate = AggregateSpec(hidden, dtype, per_token, weighted=True)
    if not training:
        return [up, down, aggregate]
    dgrad = gemm("down_dgrad", inter, hidden, str(act), False, halves, biases[1])
    parts = dgrad.part_columns
    return [
        dgrad,
        up,
        gemm("up_wgrad", width, hidden, None, interleaved, split),
        gemm("down_wgrad", inter, hidden),
        gemm("up_dgrad", hidden, width, None, interleaved, split),
        down,
        aggregate,
        AggregateSpec(hidden, dtype, per_token, weighted=False, parts=parts, beside=True),
        *([BiasDotSpec(hidden, dtype, experts, parts)] if biases[1] else []),
        *([BiasGradSpec(hidden, dtype, True, True)] if biases[1] else []),
        *([BiasGradSpec(halves * inter, dtype, False, False)] if biases[0] else []),
        AggregateSpec(hidden, dtype, per_token, weighted=False, parts=parts),  # where w2 is frozen
    ]


def router_specs(experts: int, dtype: str, router: Router, training: bool) -> list[Spec]:
    """Of the routing and of `load_balancing_loss`, to whose gradients those of the scores may be added."""
    k, scoring, renormalize, rounding = router
    forward: list[Spec]
    backward: list[Spec]
    if rounding is None:
        form = (scoring, renormalize, 1.0)
        forward = [TopKSpec(experts, k, dtype, *form, False, 1, 1), PlanSpec(experts, k, "i32")]
        backward = [TopKBackwardSpec(experts, k, dtype, *form, adds) for adds in (True, False)]
    else:
        tile_m, rule = rounding
        forward = [RoundingSpec(experts, k, dtype, rule, tile_m)]
        backward = [RoundingBackwardSpec(experts, dtype, adds) for adds in (True, False)]
    forward.append(BalanceSpec(experts, k, dtype))
    backward.append(BalanceBackwardSpec(experts, k, dtype))
    return forward + backward if training else forward
