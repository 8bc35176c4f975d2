"""token_rounding: top-K whose experts fill whole tiles; token_rounding_backward: the logits' gradients;
token_rounding_backward_add_: adds them to others."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.rounding import (
    MAX_EXPERTS,
    MAX_PAIRS,
    MAX_SLOTS,
    MAX_TILE_M,
    RoundingBackwardSpec,
    RoundingSpec,
    masks,
)
from sonicmoe.ops._cute import dtype_name, kernel
from sonicmoe.ops._op import define
from sonicmoe.reference.token_rounding import Rounded

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NAMES = ("fp32", "bf16", "fp16")


def token_rounding_has_kernel(logits: Tensor, tile_m: int, num_slots: int) -> bool:
    """Whether backend "cute" takes these arguments; the reference takes all."""
    tokens, experts = logits.shape
    few = experts <= MAX_EXPERTS and tile_m <= MAX_TILE_M and num_slots <= MAX_SLOTS
    return logits.dtype in _DTYPES and few and max(tokens * experts, num_slots + 8 * tokens) <= MAX_PAIRS


def _fake(
    logits: Tensor, draws: Tensor | None, k: int, tile_m: int, rule: str, num_slots: int, backend: str
) -> Rounded:
    tokens, experts = logits.shape

    def index(*shape: int) -> Tensor:
        return logits.new_empty(*shape, dtype=torch.int32)

    words = masks(experts)
    return Rounded(
        scores=logits.new_empty(num_slots, dtype=torch.promote_types(logits.dtype, torch.float32)),
        cu_rows=index(experts + 1),
        row_token=index(num_slots),
        row_slot=index(num_slots),
        slot_row=index(num_slots),
        cu_slots=index(tokens + 1),
        chosen=index(tokens, words),
        kept=index(tokens, words),
    )


def _cute(logits: Tensor, draws: Tensor | None, k: int, tile_m: int, rule: str, num_slots: int) -> Rounded:
    rounded = _fake(logits, draws, k, tile_m, rule, num_slots, "cute")
    tokens, experts = logits.shape
    if tokens == 0:
        rounded.cu_rows.zero_()
        rounded.cu_slots.zero_()
        return rounded
    dtype = dtype_name("logits", logits, _NAMES)
    spec, function = kernel(logits, RoundingSpec, experts, k, dtype, rule, tile_m)
    words = masks(tokens)
    empty = rounded.cu_rows.new_empty
    softmax = rounded.scores.new_empty((tokens, 4))
    state = (rounded.cu_rows.new_zeros if spec.counted else empty)((2 * experts + words,))
    tiles, marks = empty((experts, words, 4)), empty((words, experts, 2))
    function(logits.contiguous(), draws if spec.draws else None, softmax, tiles, state, marks, *rounded)
    return rounded


token_rounding = define(
    "token_rounding(Tensor logits, Tensor? draws, int k, int tile_m, str rule, SymInt num_slots, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.token_rounding,
    cute=_cute,
)


def _backward_fake(
    dscores: Tensor, logits: Tensor, cu_slots: Tensor, chosen: Tensor, kept: Tensor, backend: str
) -> Tensor:
    return logits.new_empty(logits.shape)


def _backward_launch(dlogits: Tensor, adds: bool, dscores: Tensor, logits: Tensor, *kept: Tensor) -> None:
    tokens, experts = logits.shape
    if tokens:
        _, function = kernel(logits, RoundingBackwardSpec, experts, dtype_name("logits", logits, _NAMES), adds)
        function(dscores.contiguous(), logits.contiguous(), *kept, dlogits)


def _backward_cute(dscores: Tensor, logits: Tensor, cu_slots: Tensor, chosen: Tensor, kept: Tensor) -> Tensor:
    dlogits = logits.new_empty(*logits.shape)
    _backward_launch(dlogits, False, dscores, logits, cu_slots, chosen, kept)
    return dlogits


token_rounding_backward = define(
    "token_rounding_backward(Tensor dscores, Tensor logits, Tensor cu_slots, Tensor chosen, Tensor kept, "
    "str backend) -> Tensor",
    fake=_backward_fake,
    reference=reference.token_rounding_backward,
    cute=_backward_cute,
)


def _fake_add(
    dlogits: Tensor, dscores: Tensor, logits: Tensor, cu_slots: Tensor, chosen: Tensor, kept: Tensor, backend: str
) -> None:
    return None


def _cute_add(dlogits: Tensor, dscores: Tensor, logits: Tensor, cu_slots: Tensor, chosen: Tensor, kept: Tensor) -> None:
    _backward_launch(dlogits, True, dscores, logits, cu_slots, chosen, kept)


token_rounding_backward_add_ = define(
    "token_rounding_backward_add_(Tensor(a!) dlogits, Tensor dscores, Tensor logits, Tensor cu_slots, Tensor chosen, "
    "Tensor kept, str backend) -> ()",
    fake=_fake_add,
    reference=reference.token_rounding_backward_add_,
    cute=_cute_add,
)
