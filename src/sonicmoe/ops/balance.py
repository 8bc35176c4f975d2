"""load_balance: the load balancing loss of logits and their routing; load_balance_backward: the logits' gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.balance import BalanceBackwardSpec, BalanceSpec
from sonicmoe.cute_kernels.topk import MAX_EXPERTS
from sonicmoe.ops._cute import aligned, dtype_name, kernel
from sonicmoe.ops._op import define
from sonicmoe.ops.topk import LOGITS, LOGITS_DTYPES


def load_balance_has_kernel(logits: Tensor) -> bool:
    """Whether backend "cute" takes these logits; the reference takes all."""
    return logits.dtype in LOGITS_DTYPES and logits.shape[1] <= MAX_EXPERTS


def _fake(logits: Tensor, cu_rows: Tensor, k: int, backend: str) -> Tensor:
    return logits.new_empty((), dtype=torch.promote_types(logits.dtype, torch.float32))


def _cute(logits: Tensor, cu_rows: Tensor, k: int) -> Tensor:
    loss = _fake(logits, cu_rows, k, "cute")
    tokens, experts = logits.shape
    if tokens == 0:
        return loss.zero_()
    spec, function = kernel(logits, BalanceSpec, experts, k, dtype_name("logits", logits, LOGITS))
    function(aligned(logits), cu_rows, loss.new_empty(spec.num_parts(tokens)), loss.view(1))
    return loss


load_balance = define(
    "load_balance(Tensor logits, Tensor cu_rows, int k, str backend) -> Tensor",
    fake=_fake,
    reference=reference.load_balance,
    cute=_cute,
)


def _backward_fake(dloss: Tensor, logits: Tensor, cu_rows: Tensor, k: int, backend: str) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_cute(dloss: Tensor, logits: Tensor, cu_rows: Tensor, k: int) -> Tensor:
    tokens, experts = logits.shape
    dlogits = logits.new_empty(tokens, experts)
    dtype = dtype_name("logits", logits, LOGITS)
    if tokens:
        # The gradient is the first argument, whose device is the current one.
        _, function = kernel(dloss, BalanceBackwardSpec, experts, k, dtype)
        function(dloss.reshape(1), aligned(logits), cu_rows, dlogits)
    return dlogits


load_balance_backward = define(
    "load_balance_backward(Tensor dloss, Tensor logits, Tensor cu_rows, int k, str backend) -> Tensor",
    fake=_backward_fake,
    reference=reference.load_balance_backward,
    cute=_backward_cute,
)
