"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Once(torch.autograd.Function):
    """Passes gradients on, and raises where they are differentiated.

    torch's once_differentiable would lose the second derivative without a word where the incoming gradient itself
    needs none: give `apply` something that requires a gradient first, then the function's name.
    """

    @staticmethod
    def forward(ctx: Any, _: Tensor, name: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return gradients

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"sonicmoe.{ctx.name} has no second derivative: its backward cannot be differentiated")


def once(name: str, backward: Callable[..., tuple[Tensor | None, ...]], *arguments: Any) -> tuple[Tensor | None, ...]:
    """The gradients that a Function's backward computes; they raise if they are differentiated, under create_graph."""
    if not torch.is_grad_enabled():
        return backward(*arguments)
    with torch.no_grad():
        gradients = backward(*arguments)
    first = next((g for g in gradients if g is not None), None)
    if first is None:  # all went to buffers
        return gradients
    return Once.apply(first.new_empty(0, requires_grad=True), name, *gradients)
