"""What tests of expert parallelism share: a layer, uneven batches of the ranks, and the comparison with one process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sonicmoe import MoE

HIDDEN, INTER, PER_TOK = 16, 8, 2


def build(num_experts: int, per_tok: int = PER_TOK, **options: Any) -> MoE:
    torch.manual_seed(0)
    options = {"std": 0.25, "dtype": torch.float64, **options}
    return MoE(num_experts, per_tok, HIDDEN, INTER, "swiglu", add_bias=True, **options)


def tokens_of(rank: int) -> int:
    """Uneven, and none on rank 1."""
    return (7, 0, 13, 4)[rank]


def inputs(world: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    every = [torch.randn(tokens_of(r), HIDDEN, generator=generator, dtype=torch.float64) for r in range(world)]
    return [x.requires_grad_() for x in every]


def loss_of(o: Tensor, aux: Tensor) -> Tensor:
    return (o * torch.linspace(-1, 1, HIDDEN, dtype=o.dtype)).sum() + 0.1 * aux


def one_process(num_experts: int, world: int, **options: Any) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
    """Outputs and input gradients of each rank's tokens; the parameters' gradients, mean over ranks."""
    moe, every = build(num_experts, **options), inputs(world)
    outputs = []
    for x in every:
        o, aux = moe(x)
        outputs.append(o.detach())
        loss_of(o, aux).backward()
    gradients = {n: p.grad / world for n, p in moe.named_parameters() if p.grad is not None}
    return outputs, [x.grad for x in every if x.grad is not None], gradients


def full(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def close(got: Tensor, want: Tensor, what: str) -> None:
    assert got.shape == want.shape and want.isfinite().all(), what
    scale = want.norm() if want.numel() else torch.ones(())
    assert (got - want).norm() <= 1e-10 * scale, what
    if want.numel():
        assert scale > 1e-3 and (-want - want).norm() > 1e-10 * scale, f"{what}: the tolerance would pass anything"


def check_against_one_process(
    moe: nn.Module, rank: int, world: int, num_experts: int, summed: tuple[str, ...], **options: Any
) -> None:
    """summed: parameters whose gradients this way of sharding sums over ranks, or leaves to the caller to reduce."""
    outputs, dx, gradients = one_process(num_experts, world, **options)
    x = inputs(world)[rank]
    o, aux = moe(x)
    close(o.detach(), outputs[rank], "o")
    loss_of(o, aux).backward()
    assert x.grad is not None
    close(x.grad, dx[rank], "dx")
    for name, parameter in moe.named_parameters():
        assert parameter.grad is not None, name
        gradient = full(parameter.grad)
        if not isinstance(parameter, DTensor):
            dist.all_reduce(gradient)
            gradient = gradient / world
        elif name in summed:
            gradient = gradient / world
        close(gradient, gradients[name], name)
