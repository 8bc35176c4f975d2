"""Names and argument order of the first implementation of SonicMoE, on this one.

For programs that move over; docs/migration.md has what to change afterwards. Weights are passed as its callers do: w1
(2*I, H, E) and w2 (H, I, E), permuted views of contiguous (E, 2*I, H) and (E, H, I), gate and up rows interleaved
unless `concat_layout`. `stream_id` is accepted and ignored: everything runs on torch's current stream.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor

import sonicmoe.moe
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import moe_experts
from sonicmoe.routing import Routing, route_pairs, route_topk


class KernelBackendMoE(Enum):
    """Who computes a `MoE`."""

    scattermoe = "scattermoe"
    torch = "torch"
    sonicmoe = "sonicmoe"


class ActivationType(str, Enum):
    """Activations by the first implementation's names; GELU is the exact one, by erf."""

    SWIGLU = "swiglu"
    GEGLU = "geglu"
    REGLU = "reglu"
    RELU_SQ = "relu_sq"
    RELU = "relu"
    GELU = "gelu"
    SILU = "silu"

    @property
    def activation(self) -> str:
        """The name in `sonicmoe.activations`."""
        return "relu2" if self is ActivationType.RELU_SQ else self.value


def _activation(name: str, given: ActivationType | str) -> ActivationType:
    try:
        return ActivationType(given)
    except ValueError:
        accepted = f"one of {', '.join(a.value for a in ActivationType)}"
        raise InvalidArgument(name, repr(given), accepted) from None


_BACKENDS = {KernelBackendMoE.sonicmoe: "auto", KernelBackendMoE.torch: "torch"}


def _backend(kernel_backend_moe: KernelBackendMoE) -> str:
    if kernel_backend_moe not in _BACKENDS:
        accepted = "KernelBackendMoE.sonicmoe or KernelBackendMoE.torch"
        raise InvalidArgument("kernel_backend_moe", kernel_backend_moe, accepted)
    return _BACKENDS[kernel_backend_moe]


class MoE(sonicmoe.moe.MoE):
    """`sonicmoe.MoE` with the first implementation's constructor, call and interleaved w1; softmax over the top K."""

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: ActivationType,
        add_bias: bool,
        std: float,
    ) -> None:
        activation = _activation("activation_function", activation_function)
        gated = activation in (ActivationType.SWIGLU, ActivationType.GEGLU, ActivationType.REGLU)
        super().__init__(
            num_experts,
            num_experts_per_tok,
            hidden_size,
            intermediate_size,
            activation.activation,
            add_bias,
            std,
            w1_layout="interleaved" if gated else "concat",
        )

    def forward(
        self,
        x: Tensor,
        kernel_backend_moe: KernelBackendMoE = KernelBackendMoE.sonicmoe,
        is_inference_mode: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """x (..., H) -> o, of x's shape and dtype, and the load balancing loss, a scalar in fp32."""
        self.backend = _backend(kernel_backend_moe)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference_mode):
            return super().forward(x)


def moe_TC_softmax_topk_layer(
    x: Tensor,
    router_w: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    K: int,
    stream_id: int | None = None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Router, top-K, softmax over the K, experts.

    Args:
        x: (T, H).
        router_w: (E, H).
        w1, b1, w2, b2: (2*I, H, E), (E, 2*I) or None, (H, I, E), (E, H) or None.
        K: experts per token.
        stream_id: ignored.
        activation_type: of the first implementation's.
        is_inference_mode_enabled: keep nothing for a backward.
        concat_layout: w1 has all gate rows before the up rows, instead of alternating ones.

    Returns:
        o (T, H), router logits (T, E), and rows per expert (E,) int32.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference_mode_enabled):
        logits = torch.nn.functional.linear(x, router_w)
        routing = route_topk(logits, K)
        o = _experts(x, w1, b1, w2, b2, routing, activation_type, concat_layout)
    return o, logits, routing.cu_rows.diff()


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int | None = None,
    activation_type: ActivationType | str = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """Experts for any (token, expert) pairs.

    Args:
        x: (T, H).
        router_scores, token_indices, expert_indices: (P,); token indices in any order. Differentiable in the scores.
        E: experts. A pair whose expert is not below E gets no row.
        others: of `moe_TC_softmax_topk_layer`.

    Returns:
        o (T, H), and rows per expert (E,) int32.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference_mode_enabled):
        routing = route_pairs(token_indices, expert_indices, router_scores, num_tokens=x.shape[0], num_experts=E)
        o = _experts(x, w1, b1, w2, b2, routing, activation_type, concat_layout)
    return o, routing.cu_rows.diff()


def _experts(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    routing: Routing,
    activation_type: ActivationType | str,
    concat_layout: bool,
) -> Tensor:
    activation = _activation("activation_type", activation_type)
    gated = activation.activation in ("swiglu", "geglu", "reglu")
    return moe_experts(
        x,
        w1.permute(2, 0, 1),
        w2.permute(2, 0, 1),
        routing,
        b1,
        b2,
        activation=activation.activation,
        w1_layout="interleaved" if gated and not concat_layout else "concat",
    )
