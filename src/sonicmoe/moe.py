"""The layer as a module: router, routing, experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sonicmoe import layer, ops
from sonicmoe.activations import Activation
from sonicmoe.configs.tile import TILE_M
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import BACKENDS, autocast_dtype, check_layout, moe_experts, needs_gradient
from sonicmoe.jit.target import is_hopper
from sonicmoe.layer import Kind, Settings, Weights
from sonicmoe.routing import RULES, SCORINGS, Routing, load_balancing_loss, route_token_rounding, route_topk
from sonicmoe.routing.checks import check, check_integer, check_size

ROUTINGS = ("topk", "token_rounding")


class MoE(nn.Module):
    """A mixture-of-experts feed-forward: o, aux_loss = MoE(...)(x).

    Args:
        num_experts, num_experts_per_tok: E and K, 1 <= K <= E.
        hidden_size, intermediate_size: H and I; multiples of 8 for the kernels.
        activation_function: a name or an `Activation`.
        add_bias: experts get b1 and b2, zero at first.
        std: standard deviation of the normal initialisation of router, w1 and w2.
        routing: "topk"; or "token_rounding", which rounds each expert's rows to multiples of tile_m while training (the
            paper's section 5) and is plain top-K in eval mode. With fewer tokens than tile_m it routes none.
        scoring, renormalize: of `route_topk`, for routing "topk". Token rounding fixes them: softmax over all experts,
            the top K renormalised, which in eval mode is scoring "topk_softmax".
        rule, tile_m: of `route_token_rounding`.
        w1_layout, backend: of `moe_experts`.
        device, dtype: of the parameters.

    NaN logits count as -inf, as `route_topk` and the loss have it: a router that has become NaN gives zeros.

    Parameters: router.weight (E, H), w1 (E, 2*I or I, H), w2 (E, H, I), with add_bias b1 (E, 2*I or I) and b2 (E, H).
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: str | Activation = "swiglu",
        add_bias: bool = False,
        std: float = 0.02,
        routing: str = "topk",
        *,
        scoring: str = "topk_softmax",
        renormalize: bool = False,
        rule: str = "nearest",
        tile_m: int = TILE_M,
        w1_layout: str = "concat",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = Activation.parse(activation_function)
        check_size("num_experts", num_experts, 1)
        check_size("hidden_size", hidden_size, 1)
        check_size("intermediate_size", intermediate_size, 1)
        check_integer("num_experts_per_tok", num_experts_per_tok)
        fits = 1 <= num_experts_per_tok <= num_experts
        check("num_experts_per_tok", num_experts_per_tok, fits, f"1 to num_experts = {num_experts}")
        named = {"routing": (routing, ROUTINGS), "scoring": (scoring, SCORINGS), "rule": (rule, RULES)}
        for name, (value, values) in {**named, "backend": (backend, BACKENDS)}.items():
            check(name, repr(value), value in values, f"one of {', '.join(values)}")
        check_size("tile_m", tile_m, 1)
        check_layout(w1_layout, self.activation.gated)
        if routing == "token_rounding":
            check("scoring", repr(scoring), scoring == "topk_softmax", "'topk_softmax' with token rounding")
            check("renormalize", renormalize, not renormalize, "False with token rounding, which does so by itself")
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.std, self.routing, self.scoring, self.renormalize = std, routing, scoring, renormalize
        self.rule, self.tile_m, self.w1_layout, self.backend = rule, tile_m, w1_layout, backend

        width = 2 * intermediate_size if self.activation.gated else intermediate_size
        self.router = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w1 = parameter(num_experts, width, hidden_size)
        self.w2 = parameter(num_experts, hidden_size, intermediate_size)
        self.b1 = parameter(num_experts, width) if add_bias else None
        self.b2 = parameter(num_experts, hidden_size) if add_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw router, w1 and w2 from normal(0, std); set the biases to zero."""
        for weight in (self.router.weight, self.w1, self.w2):
            nn.init.normal_(weight, std=self.std)
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def route(self, logits: Tensor) -> Routing:
        """The routing of logits (T, E): token rounding while training, if asked for, else top-K."""
        k, scoring, renormalize, rounding = self._routed
        if rounding is not None:
            return route_token_rounding(logits, k, tile_m=self.tile_m, rule=self.rule)
        return route_topk(logits, k, scoring=scoring, renormalize=renormalize)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., H) -> o, of x's shape and dtype, and the load balancing loss, a scalar in fp32 (unscaled)."""
        if x.shape[-1:] != (self.hidden_size,):
            raise InvalidArgument("x.shape", tuple(x.shape), f"(..., {self.hidden_size})")
        if is_hopper(x.device) and self.backend != "torch" and not torch.compiler.is_compiling():
            if (as_one := self._as_one(x)) is not None:
                return layer.run(x, *as_one)
            self._compile_ahead(x)
        logits = self.router(x.reshape(-1, self.hidden_size))
        routing = self.route(logits)
        o = moe_experts(
            x,
            self.w1,
            self.w2,
            routing,
            self.b1,
            self.b2,
            activation=self.activation,
            w1_layout=self.w1_layout,
            backend=self.backend,
        )
        return o, load_balancing_loss(logits, routing, self.num_experts_per_tok)

    @property
    def _routed(self) -> ops.Router:
        """How `route` does it now: tokens are rounded in training."""
        if self.routing not in ROUTINGS:
            raise InvalidArgument("routing", repr(self.routing), f"one of {', '.join(ROUTINGS)}")
        rounding = (self.tile_m, self.rule) if self.routing == "token_rounding" and self.training else None
        return ops.Router(self.num_experts_per_tok, self.scoring, self.renormalize, rounding)

    def _as_one(self, x: Tensor) -> tuple[Weights, Kind] | None:
        """What `layer.run` needs, if this layer can be run as one, and None if it must be step by step."""
        by_itself = type(self).route is MoE.route and "route" not in self.__dict__
        few = 0 < x.numel() <= layer.MOST_TOKENS * self.hidden_size
        router, own = self._modules.get("router"), self._parameters
        if not by_itself or not few or not x.is_contiguous() or type(router) is not nn.Linear:
            return None
        # Not self.w1, which nn.Module finds last. A parametrized one, which is computed at each call, is not there.
        weight, w1, w2 = router._parameters.get("weight"), own.get("w1"), own.get("w2")
        if weight is None or w1 is None or w2 is None or router._parameters.get("bias") is not None:
            return None
        weights = Weights(weight, w1, w2, self.b1, self.b2)
        if layer.is_seen(router, x, weights):
            return None
        settings = Settings(self._routed, str(self.activation), self.w1_layout, self.backend)
        kind = layer.kind_of(settings, x, weights)
        return None if kind is None else (weights, kind)

    def _compile_ahead(self, x: Tensor) -> None:
        """Have every kernel of the layer compiled side by side."""
        dtype = autocast_dtype(x) or x.dtype
        sizes, biases = (self.num_experts, self.hidden_size, self.intermediate_size), (self.b1 is not None,) * 2
        training = needs_gradient(x, getattr(self.router, "weight", None), self.w1, self.w2, self.b1, self.b2)
        act, router = str(self.activation), self._routed
        per_token = router.k if router.rounding is None else None
        experts = ops.Experts(sizes, dtype, act, self.w1_layout, biases, per_token, training)
        ops.compile_layer(x.device.index, experts, router)

    def _routing_repr(self) -> str:
        if self.routing == "token_rounding":
            return f"routing={self.routing}, rule={self.rule}, tile_m={self.tile_m}"
        return f"routing={self.routing}, scoring={self.scoring}, renormalize={self.renormalize}"

    def extra_repr(self) -> str:
        return (
            f"experts={self.num_experts}, per_tok={self.num_experts_per_tok}, hidden={self.hidden_size}, "
            f"intermediate={self.intermediate_size}, activation={self.activation}, bias={self.b1 is not None}, "
            f"{self._routing_repr()}, w1_layout={self.w1_layout}, backend={self.backend}"
        )
