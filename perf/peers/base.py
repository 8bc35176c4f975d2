"""What a peer is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from perf.layers import Layer
from perf.problem import Problem
from sonicmoe import Activation


class Peer(Protocol):
    name: str
    checked: bool  # whether its output is a layer's, and can be compared

    def why_not(self, problem: Problem) -> str | None:
        """Why it cannot run this problem here, None if it can."""
        ...

    def build(self, problem: Problem, router: bool) -> Layer:
        """The layer, on the problem's tensors."""
        ...


_OF_GATE: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "reglu": F.relu,
}
_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
    "gelu": F.gelu,
    "gelu_tanh": _OF_GATE["geglu_tanh"],
    "silu": F.silu,
}


def why_not_activation(kind: Activation) -> str | None:
    """Peers run the plain forms only."""
    return None if kind == Activation(kind.name) else f"{kind} has constants"


def gate_function(kind: Activation) -> Callable[[Tensor], Tensor]:
    """The function of the gate, or of the whole where there is none, in torch."""
    return _OF_GATE[kind.name] if kind.gated else _PLAIN[kind.name]


def activate(kind: Activation, h: Tensor) -> Tensor:
    """act(h), h in [gate | up]."""
    function = gate_function(kind)
    if not kind.gated:
        return function(h)
    gate, up = h.chunk(2, dim=-1)
    return function(gate) * up
