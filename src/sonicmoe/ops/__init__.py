"""The steps as custom ops, `torch.ops.sonicmoe.*`: one file per op with its schema, its fake and its two bodies."""

import sys
from typing import Any

from torch import Tensor

from sonicmoe.configs.tile import MAX_GROUPS
from sonicmoe.cute_kernels.aggregate import MAX_WIDTH
from sonicmoe.ops._cute import ALIGNMENT, aligned
from sonicmoe.ops._gemm import MAX_GATHERED
from sonicmoe.ops._op import bodies, has_tangents, is_traced, is_watched
from sonicmoe.ops.aggregate import aggregate
from sonicmoe.ops.ahead import Experts, Router, compile_layer
from sonicmoe.ops.balance import load_balance, load_balance_backward, load_balance_has_kernel
from sonicmoe.ops.bias_grad import bias_grad
from sonicmoe.ops.down_dgrad import down_dgrad, down_dgrad_
from sonicmoe.ops.down_proj import down_proj
from sonicmoe.ops.down_wgrad import down_wgrad, down_wgrad_add_
from sonicmoe.ops.down_wgrad_aggregate import down_wgrad_aggregate_
from sonicmoe.ops.plan import plan, plan_has_kernel
from sonicmoe.ops.token_rounding import (
    token_rounding,
    token_rounding_backward,
    token_rounding_backward_add_,
    token_rounding_has_kernel,
)
from sonicmoe.ops.topk import topk, topk_backward, topk_backward_add_, topk_has_kernel
from sonicmoe.ops.up_dgrad import up_dgrad
from sonicmoe.ops.up_proj import up_proj
from sonicmoe.ops.up_wgrad import up_wgrad, up_wgrad_add_

__all__ = [
    "ALIGNMENT",
    "MAX_GATHERED",
    "MAX_GROUPS",
    "MAX_WIDTH",
    "Experts",
    "Router",
    "aggregate",
    "as_read",
    "bias_grad",
    "bodies",
    "compile_layer",
    "down_dgrad",
    "down_dgrad_",
    "down_proj",
    "down_wgrad",
    "down_wgrad_add_",
    "down_wgrad_aggregate_",
    "has_tangents",
    "is_traced",
    "load_balance",
    "load_balance_backward",
    "load_balance_has_kernel",
    "plan",
    "plan_has_kernel",
    "steps",
    "token_rounding",
    "token_rounding_backward",
    "token_rounding_backward_add_",
    "token_rounding_has_kernel",
    "topk",
    "topk_backward",
    "topk_backward_add_",
    "topk_has_kernel",
    "up_dgrad",
    "up_proj",
    "up_wgrad",
    "up_wgrad_add_",
]


def as_read(t: Tensor) -> Tensor:
    """Rows from outside as the ops read them: contiguous, and from a multiple of 16 bytes on unless they are traced and
    have no address. A copy of odd views alone."""
    return t.contiguous() if is_traced((t,)) else aligned(t)


def steps(*tensors: Tensor | None) -> Any:
    """The ops as a layer calls them on tensors that come from outside of it, where no gradient is recorded.

    Through torch's dispatcher if that has anything to do there, else the bodies themselves, in four fifths of the time.
    """
    return sys.modules[__name__] if is_watched(tensors) else bodies
