"""What the ops' CuTe bodies share."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe.errors import InvalidArgument
from sonicmoe.jit import launch

__all__ = ["dtype_name", "launch"]

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_HALVES = ("bf16", "fp16")


def dtype_name(argument: str, t: Tensor, accepted: tuple[str, ...] = _HALVES) -> str:
    """The dtype's name in a spec."""
    name = NAMES.get(t.dtype, "")
    if name not in accepted:
        raise InvalidArgument(f"{argument}.dtype", t.dtype, " or ".join(accepted))
    return name
