"""topk: the k best experts of each token and their scores; topk_backward: the logits' gradients from the scores';
topk_backward_add_: adds them to others."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.topk import MAX_EXPERTS, MAX_GROUPS, MAX_TOP, TopKBackwardSpec, TopKSpec
from sonicmoe.ops._cute import aligned, dtype_name, kernel
from sonicmoe.ops._op import define

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOGITS = ("fp32", "bf16", "fp16")


def topk_has_kernel(logits: Tensor, k: int, num_groups: int, top_groups: int) -> bool:
    """Whether backend "cute" takes these arguments; the reference takes all."""
    few_groups = num_groups <= MAX_GROUPS or top_groups == num_groups
    return logits.dtype in LOGITS_DTYPES and logits.shape[1] <= MAX_EXPERTS and k <= MAX_TOP and few_groups


def _fake(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    tokens = logits.shape[0]
    scores = logits.new_empty(tokens, k, dtype=torch.promote_types(logits.dtype, torch.float32))
    return scores, logits.new_empty(tokens, k, dtype=torch.int32)


def _cute(
    logits: Tensor,
    k: int,
    bias: Tensor | None,
    scoring: str,
    renormalize: bool,
    num_groups: int,
    top_groups: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    scores, ids = _fake(logits, k, bias, scoring, renormalize, num_groups, top_groups, scale, "cute")
    tokens, experts = logits.shape
    groups = (num_groups, top_groups) if top_groups < num_groups else (1, 1)
    form = (dtype_name("logits", logits, LOGITS), scoring, renormalize, scale, bias is not None, *groups)
    if tokens:
        _, function = kernel(logits, TopKSpec, experts, k, *form)
        function(aligned(logits), None if bias is None else aligned(bias.to(torch.float32)), scores, ids)
    return scores, ids


topk = define(
    "topk(Tensor logits, int k, Tensor? bias, str scoring, bool renormalize, int num_groups, int top_groups, "
    "float scale, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.topk,
    cute=_cute,
)


def _backward_fake(
    dscores: Tensor, ids: Tensor, logits: Tensor, scoring: str, renormalize: bool, scale: float, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_launch(dlogits: Tensor, dscores: Tensor, ids: Tensor, logits: Tensor, *form: str | bool | float) -> None:
    tokens, experts = logits.shape
    if tokens:
        dtype = dtype_name("logits", logits, LOGITS)
        _, function = kernel(logits, TopKBackwardSpec, experts, ids.shape[1], dtype, *form)
        function(dscores.contiguous(), ids, aligned(logits), dlogits)


def _backward_cute(
    dscores: Tensor, ids: Tensor, logits: Tensor, scoring: str, renormalize: bool, scale: float
) -> Tensor:
    dlogits = logits.new_empty(*logits.shape)
    _backward_launch(dlogits, dscores, ids, logits, scoring, renormalize, scale, False)
    return dlogits


topk_backward = define(
    "topk_backward(Tensor dscores, Tensor ids, Tensor logits, str scoring, bool renormalize, float scale, "
    "str backend) -> Tensor",
    fake=_backward_fake,
    reference=reference.topk_backward,
    cute=_backward_cute,
)


def _fake_add(
    dlogits: Tensor, dscores: Tensor, ids: Tensor, logits: Tensor, scoring: str, renormalize: bool, scale: float,
    backend: str,
) -> None:  # fmt: skip
    return None


def _cute_add(
    dlogits: Tensor, dscores: Tensor, ids: Tensor, logits: Tensor, scoring: str, renormalize: bool, scale: float
) -> None:
    _backward_launch(dlogits, dscores, ids, logits, scoring, renormalize, scale, True)


topk_backward_add_ = define(
    "topk_backward_add_(Tensor(a!) dlogits, Tensor dscores, Tensor ids, Tensor logits, str scoring, bool renormalize, "
    "float scale, str backend) -> ()",
    fake=_fake_add,
    reference=reference.topk_backward_add_,
    cute=_cute_add,
)
