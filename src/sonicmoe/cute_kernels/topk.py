"""What the top-K kernels are compiled for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .variants import ARCH

MAX_EXPERTS = 4096
MAX_TOP = 128
MAX_GROUPS = 32
KINDS = ("topk_softmax", "softmax_topk", "sigmoid")
DTYPES = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class TopKSpec:
    """The `top` best of `experts` logits and their scores; tokens are counted at the launch.

    kind, renormalize, scale: of the scores. biased: whether a bias is added for the choice. num_groups, top_groups:
    equal if all groups take part.

    The launch takes logits (T, experts), bias (experts,) fp32 or None, scores (T, top) fp32, ids (T, top) int32.
    """

    experts: int
    top: int
    dtype: str  # "bf16" | "fp16" | "fp32", of the logits
    kind: str = "topk_softmax"
    renormalize: bool = False
    scale: float = 1.0
    biased: bool = False
    num_groups: int = 1
    top_groups: int = 1

    @property
    def name(self) -> str:
        return f"topk_{ARCH}"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        if self.num_groups > MAX_GROUPS and self.top_groups < self.num_groups:
            return f"num_groups = {self.num_groups} must be at most {MAX_GROUPS}"
        return _why_invalid(self.experts, self.top, self.dtype, self.kind)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"topk: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import fake
        from .memory_bound.access import DTYPES
        from .memory_bound.logits import Row
        from .memory_bound.scores import Scores
        from .memory_bound.topk import TopK

        kernel = TopK(
            Row(self.experts, self.dtype),
            self.top,
            Scores(self.kind, self.renormalize, self.scale),
            self.biased,
            self.num_groups,
            self.top_groups,
        )
        tokens = cute.sym_int()
        return kernel, (
            fake(DTYPES[self.dtype], tokens, self.experts),
            fake(cutlass.Float32, self.experts) if self.biased else None,
            fake(cutlass.Float32, tokens, self.top, alignment=4),
            fake(cutlass.Int32, tokens, self.top, alignment=4),
        )


@dataclass(frozen=True)
class TopKBackwardSpec:
    """Gradients of all logits from those of the scores.

    adds: to what dlogits holds.

    The launch takes dscores (T, top) fp32, ids (T, top) int32, logits (T, experts), dlogits likewise.
    """

    experts: int
    top: int
    dtype: str  # of the logits and of their gradients
    kind: str = "topk_softmax"
    renormalize: bool = False
    scale: float = 1.0
    adds: bool = False

    @property
    def name(self) -> str:
        return f"topk_backward_{ARCH}"

    def why_invalid(self) -> str | None:
        """None, or what is wrong."""
        return _why_invalid(self.experts, self.top, self.dtype, self.kind)

    def build(self) -> tuple[Any, tuple[Any, ...]]:
        """(kernel, fake arguments)"""
        reason = self.why_invalid()
        if reason:
            raise ValueError(f"topk_backward: {reason}")
        import cutlass
        import cutlass.cute as cute

        from .assembly import fake
        from .memory_bound.access import DTYPES
        from .memory_bound.logits import Row
        from .memory_bound.scores import Scores
        from .memory_bound.topk_backward import TopKBackward

        scores = Scores(self.kind, self.renormalize, self.scale)
        tokens = cute.sym_int()
        return TopKBackward(Row(self.experts, self.dtype), self.top, scores, self.adds), (
            fake(cutlass.Float32, tokens, self.top, alignment=4),
            fake(cutlass.Int32, tokens, self.top, alignment=4),
            fake(DTYPES[self.dtype], tokens, self.experts),
            fake(DTYPES[self.dtype], tokens, self.experts),
        )


def _why_invalid(experts: int, top: int, dtype: str, kind: str) -> str | None:
    if not 1 <= experts <= MAX_EXPERTS:
        return f"experts = {experts} must be 1 to {MAX_EXPERTS}"
    if not 1 <= top <= min(experts, MAX_TOP):
        return f"top = {top} must be 1 to {min(experts, MAX_TOP)}"
    if dtype not in DTYPES:
        return f"dtype = {dtype!r} must be one of {', '.join(DTYPES)}"
    return None if kind in KINDS else f"kind = {kind!r} must be one of {', '.join(KINDS)}"


def aot_specs() -> list[TopKSpec | TopKBackwardSpec]:
    """Every kind, with and without bias and groups, rows in chunks and one by one, few and many experts."""
    forward = [
        TopKSpec(128, 8, "fp32"),
        TopKSpec(128, 8, "bf16", "softmax_topk", renormalize=True),
        TopKSpec(256, 16, "fp32"),
        TopKSpec(64, 4, "fp32"),
        TopKSpec(512, 10, "fp32", "softmax_topk", renormalize=True),
        TopKSpec(256, 8, "fp32", "sigmoid", True, 2.5, biased=True, num_groups=8, top_groups=4),
        TopKSpec(160, 6, "bf16", "softmax_topk", scale=16.0, num_groups=8, top_groups=3),
        TopKSpec(33, 5, "fp16", "softmax_topk", biased=True),
        TopKSpec(1000, 64, "fp32", "sigmoid", num_groups=4, top_groups=2),
        TopKSpec(4096, 128, "fp32", "softmax_topk", biased=True),
        TopKSpec(1, 1, "bf16"),
    ]
    backward = [
        TopKBackwardSpec(128, 8, "fp32"),
        TopKBackwardSpec(128, 8, "bf16", adds=True),
        TopKBackwardSpec(100, 8, "fp16", "softmax_topk", adds=True),
        TopKBackwardSpec(256, 16, "bf16", "softmax_topk", renormalize=True),
        TopKBackwardSpec(256, 8, "fp32", "sigmoid", True, 2.5),
        TopKBackwardSpec(33, 33, "fp16", "softmax_topk"),
        TopKBackwardSpec(4096, 128, "fp32", "softmax_topk"),
    ]
    return [*forward, *backward]
