"""Logits to scores, as the reference computes them."""

from sonicmoe.reference.scores import exponentials, or_one, softmax, working

__all__ = ["exponentials", "or_one", "softmax", "working"]
