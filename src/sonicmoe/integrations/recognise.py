"""Which `Activation` a model's own function is, decided by running it.

A name in a configuration says what somebody meant, not what the module computes. Here the module's function runs in
fp64 on a grid of gate and up values, and an `Activation` is recognised only if values and derivatives agree. Whatever
agrees with none is not recognised: the caller then runs the module's own function.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sonicmoe.activations import GATED, PLAIN, Activation
from sonicmoe.reference.activation import act, act_backward

# Relative and absolute: functions that compute in fp32 pass, and the two closest activations, both GELUs, are a
# thousand times further apart.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-7
# Where functions differ: around zero, in the tails, beyond any limit. Not on a kink: its derivative is a convention.
_POINTS = (1e-3, 0.1, 0.5, 0.9, 1.7, 2.3, 3.1, 4.4, 5.7, 6.6, 7.3, 9.1, 11.0, 15.0, 40.0, 1e3, 1e5)
# alpha of gpt-oss and its kin, and of the approximation of GELU by a sigmoid.
_ALPHAS = (1.0, 1.702)
# What a module keeps its settings in; asked at every call.
_SETTINGS = (int, float, str)
# Where a module keeps what its formula was recognised as, with what that depends on.
_MEMORY = "_sonicmoe_recognised"


def recognise(
    function: Callable[[Tensor], Tensor], gated: bool, interleaved: bool = False, constants: Sequence[float] = ()
) -> Activation | None:
    """The activation that `function` computes, or None.

    Args:
        function: from h (rows, 2*I), or (rows, I) for a plain one, to (rows, I), element by element.
        gated: whether h holds gate and up.
        interleaved: gate and up columns alternate in h, instead of [gate | up].
        constants: the module's limits and alphas, without saying which is which.
    """
    numbers = [float(c) for c in constants]
    positive = [c for c in numbers if c > 0]
    # Tensors made in inference mode could not be differentiated.
    # A function that draws random numbers, such as dropout, must not draw the model's.
    with torch.inference_mode(False), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        h = _grid(gated, positive)
        try:
            theirs = _value_and_slope(function, h, interleaved)
        except RuntimeError:
            # It has tensors of its own, elsewhere or of another dtype: more than a formula.
            return None
        magnitude = 1 + h.abs().view(2, -1) if gated else 1 + h.abs()
        slack = _ABSOLUTE * magnitude.prod(0, keepdim=True)
        for activation in _candidates(gated, positive, numbers):
            a = act(activation, h)
            ours = (a, act_backward(activation, h, torch.ones_like(a)).view(-1, a.shape[1]))
            if all(_agree(*pair, slack) for pair in zip(ours, theirs, strict=True)):
                return activation
    return None


def remembered(owner: Any, ask: Callable[[Any], Activation | None], *state: object) -> str | None:
    """The name of ask(owner), or None; asked again when the state changes.

    Args:
        owner: a module, which keeps the answer; compiled code keeps it itself.
        ask: what the owner's formula is recognised as.
        state: what the formula may change with: numbers and functions, and modules, which stand for all of their parts,
            whether these train, their numbers and their names.
    """
    for module in [s for s in state if isinstance(s, nn.Module)]:
        state += tuple([value for part in module.modules() for value in (part, *_settings(part))])
    if torch.compiler.is_compiling():
        # Whatever is passed is guarded. The keys of a dictionary are constants, which numbers otherwise may not be.
        return _asked_at(id(owner), ask, *dict.fromkeys([id(s) if isinstance(s, nn.Module) else s for s in state]))
    memory = owner.__dict__.get(_MEMORY)
    if memory is None or memory[0] != state:
        memory = owner.__dict__[_MEMORY] = (state, _asked(owner, ask))
    return memory[1]


def _asked(owner: Any, ask: Callable[[Any], Activation | None]) -> str | None:
    found = ask(owner)
    return None if found is None else str(found)


@torch.compiler.assume_constant_result
def _asked_at(address: int, ask: Callable[[Any], Activation | None], *_: object) -> str | None:
    return _asked(_object_at(address), ask)


def _settings(part: nn.Module) -> list[object]:
    """Of GELU `approximate`, of LeakyReLU `negative_slope`, of everything `training`."""
    if torch.compiler.is_compiling():
        return [getattr(part, name) for name in _names_at(id(part)).split()]
    return [value for value in part.__dict__.values() if isinstance(value, _SETTINGS)]


@torch.compiler.assume_constant_result
def _names_at(address: int) -> str:
    """What the compiler is to read of a module; it follows no loop over a module's attributes."""
    return " ".join([name for name, value in vars(_object_at(address)).items() if isinstance(value, _SETTINGS)])


def _object_at(address: int) -> Any:
    """The object whose `id` this is: what the compiler takes for constant may be given numbers, but no modules."""
    return ctypes.cast(address, ctypes.py_object).value


def _candidates(gated: bool, limits: Iterable[float], alphas: Iterable[float]) -> list[Activation]:
    if not gated:
        return [Activation(name) for name in PLAIN]
    found = [Activation(name) for name in GATED if name != "swiglu"]
    for limit in dict.fromkeys((None, *limits)):
        for alpha in dict.fromkeys((*_ALPHAS, *alphas)):
            found += [Activation("swiglu", alpha, limit, offset) for offset in (0.0, 1.0)]
    return found


def _grid(gated: bool, limits: Sequence[float]) -> Tensor:
    """One row: all points, or [gate | up] of all pairs of points."""
    points = sorted({*_POINTS, *(limit * factor for limit in limits for factor in (0.999, 1.001))} - {*limits})
    line = torch.tensor([*(-p for p in reversed(points)), *points], dtype=torch.float64)
    return torch.cartesian_prod(line, line).T.reshape(1, -1) if gated else line.unsqueeze(0)


def _value_and_slope(function: Callable[[Tensor], Tensor], h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Values (1, N), and the derivatives by gate and up (2, N), or (1, N) for a plain function."""
    leaf = h.clone().requires_grad_()
    with torch.enable_grad():
        value = function(leaf.view(2, -1).T.reshape(1, -1) if interleaved else leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope.view(-1, value.shape[-1])


def _agree(ours: Tensor, theirs: Tensor, slack: Tensor) -> bool:
    if theirs.numel() != ours.numel():
        return False
    return bool(((ours - theirs.view_as(ours)).abs() <= _RELATIVE * ours.abs() + slack).all())
