"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Once(torch.autograd.Function):
    """Passes gradients on, and raises where they are differentiated.

    torch's once_differentiable would lose the second derivative without a word where the incoming gradient itself
    needs none. `sources`, the first tensors, are what the gradients depend on: torch.autograd.grad visits only what
    leads to the tensors that it is asked for. To an argument that a Function does not keep, and that is no leaf (x
    where no weight needs it), it finds no way here: if another one leads to it, grad takes that one alone.
    """

    @staticmethod
    def forward(ctx: Any, name: str, sources: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tensors[sources:]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"sonicmoe.{ctx.name} has no second derivative: its backward cannot be differentiated")


def once(
    name: str, gradients: Callable[..., tuple[Tensor | None, ...]], ctx: Any, *incoming: Tensor | None
) -> tuple[Tensor | None, ...]:
    """A Function's gradients, gradients(ctx, saved, *incoming); they raise if they are differentiated, under
    create_graph. saved: its tensors, a list that may be emptied."""
    saved = list(ctx.saved_tensors)  # read once: under checkpointing they are computed anew each time
    if not torch.is_grad_enabled():
        return gradients(ctx, saved, *incoming)
    leaves = [node.variable for node, _ in ctx.next_functions if hasattr(node, "variable")]
    sources = [t for t in (*incoming, *saved, *leaves) if t is not None and t.requires_grad]
    with torch.no_grad():
        found = gradients(ctx, saved, *incoming)
    first = next((g for g in found if g is not None), None)
    if first is None:  # all went to buffers
        return found
    sources.append(first.new_empty(0, requires_grad=True))  # where none is kept
    return Once.apply(name, len(sources), *sources, *found)
