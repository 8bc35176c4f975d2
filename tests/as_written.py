"""Functions of the kernels as they are written, for running them on the host.

The DSL replaces a function's code by what it makes of it when it first compiles it: so this is to be called while tests
are collected, before any of them compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of what `cute.jit` decorates, or of a plain function."""
    plain = getattr(function, "__wrapped__", function)
    copy = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    copy.__kwdefaults__ = plain.__kwdefaults__
    return copy


def compiled_methods(owner: type) -> dict[str, Callable[..., Any]]:
    """Copies of all methods of a class that `cute.jit` decorates."""
    wrapped = {name: m for name, m in vars(owner).items() if hasattr(m, "__wrapped__") and name != "__repr__"}
    return {name: as_written(method) for name, method in wrapped.items()}
