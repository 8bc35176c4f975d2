"""The tensors of a benchmark: a layer's at unit scale, and its routing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

import sonicmoe
from perf.shapes import Shape
from sonicmoe import Activation, Routing
from sonicmoe.configs.tile import TILE_M

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SEED = 20


@dataclass(frozen=True)
class Form:
    """What of a benchmark's layer is not its shape. skew: deviation of a bias per expert on the logits, 0 for none."""

    activation: str = "swiglu"
    dtype: str = "bf16"
    bias: bool = False
    skew: float = 0.0
    device: str = "cuda"
    backend: str = "cute"
    tile_m: int = TILE_M
    rule: str = "nearest"

    @property
    def kind(self) -> Activation:
        return Activation.parse(self.activation)

    @property
    def gated(self) -> bool:
        return self.kind.gated

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def item(self) -> int:
        return self.torch_dtype.itemsize


class Problem:
    """A layer: x, dO, router, w1, w2 and biases, random at unit scale (weights so that h and y are too).

    The tensors that gradients are taken of are leaves that require them. Every implementation shares them.
    """

    def __init__(self, shape: Shape, form: Form) -> None:
        self.shape, self.form = shape, form
        self._routings: dict[str, Routing] = {}
        tokens, hidden, inter, experts, _ = shape.thiek
        width = 2 * inter if form.gated else inter
        self._generator = torch.Generator(form.device).manual_seed(SEED)
        self.x = self.normal(tokens, hidden).requires_grad_()
        self.do = self.normal(tokens, hidden)
        self.router = self.normal(experts, hidden, scale=hidden**-0.5).requires_grad_()
        self.w1 = self.normal(experts, width, hidden, scale=hidden**-0.5).requires_grad_()
        self.w2 = self.normal(experts, hidden, inter, scale=inter**-0.5).requires_grad_()
        self.b1 = self.normal(experts, width).requires_grad_() if form.bias else None
        self.b2 = self.normal(experts, hidden).requires_grad_() if form.bias else None
        self._skew = self.normal(experts, scale=form.skew) if form.skew else None

    def normal(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.form.torch_dtype
        return torch.randn(size, generator=self._generator, device=self.form.device, dtype=dtype).mul_(scale)

    @property
    def experts_leaves(self) -> list[Tensor]:
        return [t for t in (self.x, self.w1, self.w2, self.b1, self.b2) if t is not None]

    def router_logits(self) -> Tensor:
        """The router's product (T, E), with its gradients: what every layer with a router begins with."""
        logits = F.linear(self.x, self.router)
        return logits if self._skew is None else logits + self._skew

    @cached_property
    def logits(self) -> Tensor:
        """`router_logits` in fp32, without gradients."""
        with torch.no_grad():
            return self.router_logits().float()

    @cached_property
    def _top(self) -> tuple[Tensor, Tensor]:
        values, ids = self.logits.topk(self.shape.K, dim=1)
        return values.softmax(1), ids

    @property
    def ids(self) -> Tensor:
        """(T, K) int64: the experts of each token."""
        return self._top[1]

    @cached_property
    def scores(self) -> Tensor:
        """(T, K) fp32, a leaf."""
        return self._top[0].requires_grad_()

    def routing(self, kind: str) -> Routing:
        """The routing "topk" or "token_rounding" of the logits, detached from them; always the same one."""
        if kind not in self._routings:
            self._routings[kind] = self._routed(kind)
        return self._routings[kind]

    def _routed(self, kind: str) -> Routing:
        if kind == "topk":
            return sonicmoe.route_assigned(self.ids.int(), self.scores.detach(), num_experts=self.shape.E)
        routed = sonicmoe.route_token_rounding(self.logits, self.shape.K, tile_m=self.form.tile_m, rule=self.form.rule)
        return routed._replace(scores=routed.scores.detach())
