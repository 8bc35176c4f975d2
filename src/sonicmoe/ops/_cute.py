"""What the ops' CuTe bodies share.

They allocate by `new_empty` with the sizes as arguments of their own, which torch reads in two thirds of the time that
it takes for a tuple of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sonicmoe import jit
from sonicmoe.errors import InvalidArgument

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_HALVES = ("bf16", "fp16")
ALIGNMENT = 16  # bytes that the kernels read and write at once


@cache
def _kernel(device: int, kind: Callable[..., Any], *fields: Any) -> tuple[Any, Callable[..., None]]:
    spec = kind(*fields)
    return spec, jit.kernel(spec)


def kernel(first: Tensor, kind: Callable[..., Any], *fields: Any) -> tuple[Any, Callable[..., None]]:
    """A spec of these fields, and its kernel on the first argument's device, the current one: each made once."""
    return _kernel(first.get_device(), kind, *fields)


def aligned(t: Tensor) -> Tensor:
    """A contiguous tensor whose data starts where the kernels' chunks do: t itself but for odd views."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % ALIGNMENT else t


def dtype_name(argument: str, t: Tensor, accepted: tuple[str, ...] = _HALVES) -> str:
    """The dtype's name in a spec."""
    name = NAMES.get(t.dtype, "")
    if name not in accepted:
        raise InvalidArgument(f"{argument}.dtype", t.dtype, " or ".join(accepted))
    return name
