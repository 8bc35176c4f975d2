"""Routings to test with: logits and expert ids whose use of the experts is even, skewed, or as bad as it gets."""

from __future__ import annotations

import torch
from torch import Tensor


def skewed_logits(num_tokens: int, num_experts: int, skew: float = 2.0, seed: int = 0) -> Tensor:
    """Unit-scale logits (T, E), fp32, plus a constant per expert of deviation skew."""
    generator = torch.Generator().manual_seed(seed)
    constant = skew * torch.randn(num_experts, generator=generator)
    return torch.randn(num_tokens, num_experts, generator=generator) + constant


def tied_logits(num_tokens: int, num_experts: int, levels: int = 3, seed: int = 0) -> Tensor:
    """Logits that take only a few values, so that most comparisons are exact ties."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (num_tokens, num_experts), generator=generator).float()


def logits_of_counts(counts: list[int], num_tokens: int, seed: int = 0) -> Tensor:
    """Logits (T, E) whose top-1 gives expert e exactly counts[e] tokens; their sum is T."""
    generator = torch.Generator().manual_seed(seed)
    expert = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)])
    assert len(expert) == num_tokens
    expert = expert[torch.randperm(num_tokens, generator=generator)]
    logits = torch.rand(num_tokens, len(counts), generator=generator)
    return logits.scatter_add(1, expert.unsqueeze(1), 1 + torch.rand(num_tokens, 1, generator=generator))


def assigned_ids(kind: str, num_tokens: int, num_experts: int, k: int, seed: int = 0) -> Tensor:
    """Expert ids (T, k) int32: "uniform", "skewed", "empty" (the odd experts are), "one" (all to the last expert),
    "sentinels" (negative and too large ones among them), "nothing" (sentinels only)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, k)
    if kind == "one":
        ids = torch.full(shape, num_experts - 1)
    elif kind == "nothing":
        ids = torch.full(shape, num_experts)
    elif kind == "sentinels":
        ids = torch.randint(-2, num_experts + 3, shape, generator=generator)
    elif kind == "empty":
        ids = torch.randint(0, (num_experts + 1) // 2, shape, generator=generator) * 2
    elif kind == "skewed":
        ids = (num_experts * torch.rand(shape, generator=generator) ** 3).long()
    else:
        ids = torch.randint(0, num_experts, shape, generator=generator)
    return ids.int()


ASSIGNED = ("uniform", "skewed", "empty", "one", "sentinels", "nothing")
