"""The activations' values and derivatives, in the dtype that they are given (fp32 or fp64)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sonicmoe.activations import Activation

_OF_GATE = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
_TANH_SCALE = math.sqrt(2.0 / math.pi)
_TANH_CUBIC = 0.044715


def _value(name: str, alpha: float, z: Tensor) -> Tensor:
    if name == "silu":
        return z * torch.sigmoid(alpha * z)
    if name == "gelu":
        return F.gelu(z)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    if name == "relu":
        return F.relu(z)
    return F.relu(z).square()


def _slope(name: str, alpha: float, z: Tensor) -> Tensor:
    """The derivative of `_value`; that of relu at 0 is 0."""
    if name == "silu":
        s = torch.sigmoid(alpha * z)
        return s * (1 + alpha * z * (1 - s))
    if name == "gelu":
        return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    if name == "gelu_tanh":
        t = torch.tanh(_TANH_SCALE * (z + _TANH_CUBIC * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _TANH_SCALE * (1 + 3 * _TANH_CUBIC * z * z)
    if name == "relu":
        return (z > 0).to(z.dtype)
    return 2 * F.relu(z)


def _gate_and_up(activation: Activation, h: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves of [gate | up], clamped and offset as the activation says."""
    gate, up = h.chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate, up + activation.up_offset


def act(activation: Activation, h: Tensor) -> Tensor:
    """a = act(h). h: (rows, G*I), for a gated activation [gate | up]; a: (rows, I)."""
    if not activation.gated:
        return _value(activation.name, activation.alpha, h)
    gate, up = _gate_and_up(activation, h)
    return _value(_OF_GATE[activation.name], activation.alpha, gate) * up


def act_backward(activation: Activation, h: Tensor, da: Tensor) -> Tensor:
    """dh = act'(h) * da. h, dh: (rows, G*I); da: (rows, I).

    Elements that swiglu's limit clamps have a zero derivative; those exactly at the limit keep theirs, as by
    torch.clamp up to 2.13.
    """
    if not activation.gated:
        return da * _slope(activation.name, activation.alpha, h)
    gate, up = _gate_and_up(activation, h)
    name = _OF_GATE[activation.name]
    dgate = da * up * _slope(name, activation.alpha, gate)
    dup = da * _value(name, activation.alpha, gate)
    if activation.limit is not None:
        raw_gate, raw_up = h.chunk(2, dim=-1)
        dgate = dgate * (raw_gate <= activation.limit)
        dup = dup * (raw_up.abs() <= activation.limit)
    return torch.cat((dgate, dup), dim=-1)
