"""The layer as one autograd Function, router included: for eager calls by the kernels that nobody looks into.

The launches are those of `MoE.forward` step by step, and so is every bit of the results, but for gradients that are
sums: here the second part is added before it is rounded, to x's (of experts and router) and to the logits' (of scores
and loss), on which those of router and x depend. What is saved is mostly the host's time: one node of autograd's graph
instead of five, and no argument is checked again while it stays the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from sonicmoe import ops
from sonicmoe.activations import Activation
from sonicmoe.autograd import Form, Kept, backward_steps, forward_steps, is_last, saves_privately
from sonicmoe.functional import check_alignment, check_layout, check_tensors, needs_gradient, resolve_backend
from sonicmoe.ops._once import once
from sonicmoe.routing.token_rounding import TokenRounding
from sonicmoe.routing.topk import Scoring, TopK

# Below every kernel's limit. With more, a launch takes so long that the host's time is hidden anyway.
MOST_TOKENS = 1 << 18


class Weights(NamedTuple):
    """The parameters of a layer."""

    router: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None


class Settings(NamedTuple):
    """Attributes of a `MoE`, as they are at a call."""

    router: ops.Router
    activation: str
    w1_layout: str
    backend: str


class Kind(NamedTuple):
    """What of a layer is not a tensor."""

    router: TopK | TokenRounding
    form: Form
    training: bool  # whether a gradient is required


_kinds: dict[Any, Kind | None] = {}
_OF_EXPERTS, _X, _CU_ROWS = len(Kept._fields), Kept._fields.index("x"), Kept._fields.index("cu_rows")


def is_seen(router: nn.Linear, x: Tensor, weights: Weights) -> bool:
    """Whether somebody looks at what happens between x and o, or changes it: a hook of the router, a mode, a trace."""
    return (
        bool(router._forward_hooks or router._forward_pre_hooks or router._backward_hooks)
        or bool(router._backward_pre_hooks or nn.modules.module._has_any_global_hook())
        or "forward" in router.__dict__
        or torch._C._len_torch_function_stack() > 0
        or torch._C._is_any_autocast_enabled()
        or ops.has_tangents((x, *weights))
        or ops.is_traced((x, *weights))
    )


def kind_of(settings: Settings, x: Tensor, weights: Weights) -> Kind | None:
    """The kind of a layer that the kernels can do all of, else None. Raises InvalidArgument as `moe_experts` does.

    Found by all that it depends on: attributes and weights may be other ones at each call.
    """
    training = needs_gradient(x, *weights)
    of_weights = [None if t is None else _form_of(t) for t in weights]
    key = (settings, training, x.shape[-1], x.dtype, x.device, *of_weights)
    try:
        return _kinds[key]
    except KeyError:
        kind = _kinds[key] = _checked(settings, x, weights, training)
        return kind


def _form_of(weight: Tensor) -> tuple[Any, ...]:
    return weight.shape, weight.dtype, weight.device, weight.is_contiguous(), weight.data_ptr() % ops.ALIGNMENT


def _checked(settings: Settings, x: Tensor, weights: Weights, training: bool) -> Kind | None:
    router, w1, w2, b1, b2 = weights
    (k, scoring, renormalize, rounding), activation, w1_layout, backend = settings
    gated = Activation.parse(activation).gated
    check_layout(w1_layout, gated)
    check_tensors(x, w1, w2, b1, b2, gated)
    experts, hidden, inter = w2.shape
    like_x = router.dtype == x.dtype and router.device == x.device and router.is_contiguous()
    if resolve_backend(backend, x, w2) != "cute" or router.shape != (experts, hidden) or not like_x:
        return None
    check_alignment(w1=w1, w2=w2, b1=b1, b2=b2)
    route: TopK | TokenRounding = TopK(k, Scoring(scoring, renormalize))
    if rounding is not None:
        route = TokenRounding(k, *rounding)
    logits = torch.empty((MOST_TOKENS, experts), dtype=x.dtype, device="meta")
    if not route.has_kernels(logits) or not ops.load_balance_has_kernel(logits):
        return None
    biases, per_token = (b1 is not None, b2 is not None), k if rounding is None else None
    form = ops.Experts((experts, hidden, inter), x.dtype, activation, w1_layout, biases, per_token, training)
    ops.compile_layer(x.device.index, form, settings.router)
    return Kind(route, Form(activation, w1_layout, "cute"), training)


def run(x: Tensor, weights: Weights, kind: Kind) -> tuple[Tensor, Tensor]:
    """o, of x's shape, and the load balancing loss. x contiguous, with 1 to MOST_TOKENS tokens."""
    if kind.training:
        o, loss = MoELayer.apply(x, *weights, kind)
        return o, loss
    o, loss, *_ = _forward(x, weights, kind, keep_h=False)
    return o, loss


def _forward(
    x: Tensor, weights: Weights, kind: Kind, keep_h: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """o, the loss, x as (T, H), what the experts' backward needs from h on, and the router's from the logits on."""
    router, *of_experts = weights
    steps = ops.steps()
    tokens = ops.as_read(x if x.dim() == 2 else x.view(-1, x.shape[-1]))
    logits = linear(tokens, router)
    (scores, *plan, _), own = kind.router.forward(steps, logits)
    o, h = forward_steps(steps, tokens, of_experts, scores, plan, kind.form, keep_h)
    loss = steps.load_balance(logits, plan[0], kind.router.k, "cute")
    if x.dim() != 2:
        # Not `view`: a view among the results of a Function could not be changed in place.
        o = torch.ops.aten._unsafe_view.default(o, x.shape)
    return o, loss, tokens, (h, scores, *plan), (logits, *own)


class MoELayer(torch.autograd.Function):
    """Router, routing, experts and loss. Keeps what `MoEExperts` keeps, the logits, and what their backward needs."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        router: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        kind: Kind,
    ) -> tuple[Tensor, Tensor]:
        o, loss, tokens, of_experts, of_router = _forward(x, Weights(router, w1, w2, b1, b2), kind, keep_h=True)
        needs_x, needs_router, needs_w1, *_ = ctx.needs_input_grad
        if needs_x or needs_router:
            of_router = (router if needs_x else None, *of_router)
        else:
            of_router = ()
            ctx.mark_non_differentiable(loss)
        kept = (tokens if needs_w1 or needs_router else None, w1 if needs_x else None, w2, b2, *of_experts)
        ctx.save_for_backward(*kept, *of_router)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.shape, ctx.private = kind, x.shape, saves_privately()
        return o, loss

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dloss: Tensor | None) -> tuple[Tensor | None, ...]:
        return once("MoE", _backward, ctx, do, dloss)


def _backward(
    ctx: Any, saved: list[Tensor | None], do: Tensor | None, dloss: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Gradients of x, router, w1, w2, b1 and b2, and none of what is no tensor."""
    steps = ops.steps(do, dloss, *saved)
    router, logits, *own = saved[_OF_EXPERTS:] or (None, None)
    del saved[_OF_EXPERTS:]
    x, cu_rows = saved[_X], saved[_CU_ROWS]
    needs_x, needs_router, *needs_weights = ctx.needs_input_grad[:6]
    (route, form, _), flat = ctx.kind, len(ctx.shape) == 2
    dx = drouter = dlogits = None
    of_weights: list[Tensor | None] = [None] * 4
    if dloss is not None:
        dlogits = steps.load_balance_backward(dloss, logits, cu_rows, route.k, "cute")
    if do is not None:
        of_tokens = do if flat else do.reshape(-1, do.shape[-1])
        needs = (needs_x, *needs_weights, needs_x or needs_router)
        own_h = ctx.private and is_last(steps)
        dx, *of_weights, dscores = backward_steps(steps, ops.as_read(of_tokens), saved, needs, form, own_h=own_h)
        if dscores is not None:
            dlogits = route.backward(steps, dlogits, dscores, logits, *own)
    if dlogits is not None and needs_router:
        drouter = dlogits.t().mm(x)
    if dlogits is not None and needs_x:
        assert router is not None
        dx = dlogits.mm(router) if dx is None else dx.addmm_(dlogits, router)
    return dx if flat or dx is None else dx.view(ctx.shape), drouter, *of_weights, None
