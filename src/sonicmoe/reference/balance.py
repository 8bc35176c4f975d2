"""The load balancing loss of logits and their routing, and its gradient."""

from __future__ import annotations

from torch import Tensor

from sonicmoe.reference.scores import softmax, working


def load_balance(logits: Tensor, cu_rows: Tensor, k: int) -> Tensor:
    """E * sum over e of rows_e / (T k) * mean probability of e, a scalar; differentiable in logits."""
    tokens, experts = logits.shape
    mean_probability = softmax(working(logits)).sum(dim=0) / max(tokens, 1)
    share = cu_rows.diff().to(mean_probability.dtype) / max(tokens * k, 1)
    return experts * (share * mean_probability).sum()


def load_balance_backward(dloss: Tensor, logits: Tensor, cu_rows: Tensor, k: int) -> Tensor:
    """Gradients (T, E) of logits, in their dtype, from the loss's."""
    tokens, experts = logits.shape
    p = softmax(working(logits))
    g = cu_rows.diff().to(p.dtype) * (dloss * experts / max(tokens * tokens * k, 1))
    dlogits = p * (g - (p * g).sum(dim=1, keepdim=True))
    return dlogits.masked_fill(logits.isinf(), 0).to(logits.dtype)
