"""Logits to scores, as the reference computes them."""

from sonicmoe.reference.scores import exponentials, softmax, working

__all__ = ["exponentials", "softmax", "working"]
