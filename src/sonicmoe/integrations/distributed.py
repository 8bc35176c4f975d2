"""Expert parallelism for `sonicmoe.MoE` on torch.distributed as it is; FSDP2 needs nothing of this file.

    mesh = init_device_mesh("cuda", (dp, ep), mesh_dim_names=("dp", "ep"))
    parallelize_module(model, mesh["ep"], {"layers.*.moe": ExpertParallel()})
    shard_moe(moe, mesh["dp"], world)     # FSDP2 on top, see its docstring

Every rank routes its own tokens over all experts. A dispatcher takes them, with their scores, to the ranks of their
experts and brings the weighted results back: `AllToAll` here, DeepEP in `sonicmoe.integrations.deep_ep`. Results are
weighted where their experts are, so none is kept for the scores' gradients: only what arrived and h are.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import as_autocast, moe_experts, resolve_backend
from sonicmoe.integrations.between import gather_rows, sum_rows
from sonicmoe.moe import MoE
from sonicmoe.routing import Routing, load_balancing_loss, route_assigned


class Received(NamedTuple):
    """What arrived for this rank's experts: T' tokens, each for at most K' of them."""

    tokens: Tensor  # (T', H)
    expert_ids: Tensor  # (T', K') int, counted from this rank's first expert; a negative one is an expert elsewhere
    scores: Tensor  # (T', K')
    handle: Any  # what the dispatcher needs to bring results back


class Dispatcher(Protocol):
    """How tokens travel: the seam for transports. Both ways must be differentiable, on empty ranks too."""

    def dispatch(self, x: Tensor, routing: Routing, backend: str) -> Received:
        """Bring tokens of x (T, H), and their scores, to the ranks of their experts."""
        ...

    def combine(self, results: Tensor, handle: Any) -> Tensor:
        """Bring results (T', H), weighted sums over this rank's experts, back: (T, H), their sums over the ranks."""
        ...


class AllToAll:
    """One row for each token and expert, by all_to_all_single with uneven splits.

    Reads the split sizes on the host: one synchronisation per layer. The sender sums its tokens' rows.

    Rank i of the group has the experts from i * ceil(E / ranks) on, as `Shard(0)` does: the last ranks may have fewer,
    or none.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group, self.num_experts = group, num_experts
        self.per_rank = -(-num_experts // group.size())

    def dispatch(self, x: Tensor, routing: Routing, backend: str) -> Received:
        ranks = self.group.size()
        sends = x.new_zeros(ranks * self.per_rank, dtype=torch.int32)
        sends[: self.num_experts] = routing.cu_rows.diff()
        receives = torch.empty_like(sends)
        dist.all_to_all_single(receives, sends, group=self.group)
        by_rank = torch.stack((sends, receives)).view(2, ranks, self.per_rank)
        send_sizes, receive_sizes = by_rank.sum(2).tolist()
        num_rows = sum(send_sizes)
        rows = gather_rows(x, routing, num_rows, backend)
        scores = routing.scores.index_select(0, routing.row_slot[:num_rows])
        received = _Exchange.apply(rows, send_sizes, receive_sizes, self.group)
        received_scores = _Exchange.apply(scores, send_sizes, receive_sizes, self.group)
        expert = torch.arange(self.per_rank, device=x.device).repeat(ranks)
        expert = expert.repeat_interleave(receives, output_size=sum(receive_sizes))
        handle = (send_sizes, receive_sizes, routing, backend)
        return Received(received, expert.unsqueeze(1), received_scores.unsqueeze(1), handle)

    def combine(self, results: Tensor, handle: tuple[list[int], list[int], Routing, str]) -> Tensor:
        send_sizes, receive_sizes, routing, backend = handle
        return sum_rows(_Exchange.apply(results, receive_sizes, send_sizes, self.group), routing, backend)


class _Exchange(torch.autograd.Function):
    """all_to_all_single along dim 0; the gradient goes the other way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send_sizes: list[int], receive_sizes: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.send_sizes, ctx.receive_sizes, ctx.group = send_sizes, receive_sizes, group
        out = rows.new_empty((sum(receive_sizes), *rows.shape[1:]))
        dist.all_to_all_single(out, rows.contiguous(), receive_sizes, send_sizes, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchange.apply(drows, ctx.receive_sizes, ctx.send_sizes, ctx.group), None, None, None


class ExpertParallelMoE(MoE):
    """A `MoE` whose experts are sharded over a group of ranks; made by `ExpertParallel`."""

    dispatcher: Dispatcher

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., H) of this rank -> o, of its shape and dtype, and this rank's load balancing loss."""
        if x.shape[-1:] != (self.hidden_size,):
            raise InvalidArgument("x.shape", tuple(x.shape), f"(..., {self.hidden_size})")
        tokens = x.reshape(-1, self.hidden_size)
        logits = self.router(tokens)
        routing = self.route(logits)
        o = self._experts(tokens, routing).view(x.shape)
        return o, load_balancing_loss(logits, routing, self.num_experts_per_tok)

    def _experts(self, x: Tensor, routing: Routing) -> Tensor:
        w1, w2, b1, b2 = [_local(p) for p in (self.w1, self.w2, self.b1, self.b2)]
        # Before the rows travel, so that they travel in its dtype.
        (x,) = as_autocast(x)
        backend = resolve_backend(self.backend, x, w2)
        received = self.dispatcher.dispatch(x, routing, backend)
        o = received.tokens
        if w2.shape[0] > 0:
            local = route_assigned(received.expert_ids, received.scores, num_experts=w2.shape[0])
            o = moe_experts(
                o, w1, w2, local, b1, b2, activation=self.activation, w1_layout=self.w1_layout, backend=backend
            )
        else:
            # So that the empty shards and scores get gradients too: this rank must join the others' collectives. The
            # products make them contiguous: torch 2.11 gathers one that is not, and waits for ranks that do not.
            o = o + sum((t * 0).sum() for t in (w1, w2, b1, b2, received.scores) if t is not None)
        return self.dispatcher.combine(o, received.handle)


def _local(parameter: Any) -> Any:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class ExpertParallel(ParallelStyle):
    """Shards the experts of a `MoE`, its w1, w2, b1 and b2, on dim 0 over a mesh; for `parallelize_module`.

    The ranks of the mesh hold different tokens. Experts become those of the mesh's first rank. Router and everything
    outside stay whole and as they are on each rank: start them equal, and reduce their gradients over all ranks, as
    FSDP2 or DDP do. An expert's gradient is the sum over the mesh's tokens already.

    Args:
        dispatcher: how tokens travel; `AllToAll` over the mesh's group if None.
    """

    def __init__(self, dispatcher: Dispatcher | None = None) -> None:
        super().__init__()
        self.dispatcher = dispatcher

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if type(module) is not MoE:
            raise InvalidArgument("module", type(module).__name__, "a sonicmoe.MoE, before fully_shard")
        if device_mesh.ndim != 1:
            raise InvalidArgument("device_mesh.ndim", device_mesh.ndim, "1: take one dimension, as mesh['ep']")
        for name in ("w1", "w2", "b1", "b2"):
            parameter = getattr(module, name)
            if parameter is not None:
                sharded = distribute_tensor(parameter.detach(), device_mesh, [Shard(0)])
                setattr(module, name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        # Another class rather than another method on the instance: hooks, FSDP2 and compilers see an ordinary module.
        module.__class__ = ExpertParallelMoE
        group = device_mesh.get_group()
        module.dispatcher = self.dispatcher or AllToAll(group, module.num_experts)  # type: ignore[assignment]
        return module


def shard_moe(moe: MoE, data_mesh: DeviceMesh, world_mesh: DeviceMesh, **fsdp: Any) -> FSDPModule:
    """FSDP2 on top of expert parallelism: experts over the data mesh, the router over all ranks.

    The gradients of both are means over all ranks' tokens, as if `fully_shard` had sharded the whole module over all
    ranks.

    Args:
        moe: after `ExpertParallel`.
        data_mesh: the dimension across which experts are replicated, as mesh["dp"], of the mesh that `ExpertParallel`
            got its dimension from.
        world_mesh: one dimension of all ranks.
        fsdp: further arguments of `fully_shard`.
    """
    if not isinstance(moe, ExpertParallelMoE):
        raise InvalidArgument("moe", type(moe).__name__, "a MoE after ExpertParallel; otherwise call fully_shard on it")
    fully_shard(moe.router, mesh=world_mesh, **fsdp)
    sharded = fully_shard(moe, mesh=data_mesh, **fsdp)
    sharded.set_gradient_divide_factor(float(world_mesh.size()))
    if data_mesh.device_type != "cuda":
        # Only NCCL scales while it reduces.
        sharded.set_force_sum_reduction_for_comms(True)
    return sharded
