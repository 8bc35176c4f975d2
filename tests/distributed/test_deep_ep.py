"""DeepEP's dispatcher, over a buffer that does by gloo what is documented of DeepEP's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expert_parallel_cases import build, check_against_one_process
from processes import in_processes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from sonicmoe import InvalidArgument, route_token_rounding, route_topk
from sonicmoe.integrations.deep_ep import DeepEP
from sonicmoe.integrations.distributed import ExpertParallel

EXPERTS, PER_TOK = 6, 2


class GlooBuffer:
    """A token goes once to each rank that has one of its experts; there its other experts have id -1."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.sent: list[int] = []

    def _exchange(self, t: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        out = t.new_empty((sum(receives), *t.shape[1:]))
        dist.all_to_all_single(out, t.contiguous(), receives, sends, group=self.group)
        return out

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int | None = None,
        handle: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any, None]:
        assert num_experts is not None
        ranks, per_rank = self.group.size(), num_experts // self.group.size()
        if handle is None:
            assert topk_idx is not None and topk_idx.dtype == torch.int64
            of_rank = [(topk_idx // per_rank == r).any(1).nonzero().flatten() for r in range(ranks)]
            sends = torch.tensor([len(t) for t in of_rank])
            receives = torch.empty_like(sends)
            dist.all_to_all_single(receives, sends, group=self.group)
            handle = (torch.cat(of_rank), sends.tolist(), receives.tolist(), topk_idx)
            self.sent.append(int(sends.sum()))
        tokens, sends, receives, topk_idx = handle
        rows = self._exchange(x[tokens], sends, receives)
        ids = self._exchange(topk_idx[tokens], sends, receives)
        ids = torch.where(ids // per_rank == self.group.rank(), ids % per_rank, -1)
        weights = None if topk_weights is None else self._exchange(topk_weights[tokens], sends, receives)
        return rows, ids, weights, handle, None

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None, None]:
        tokens, sends, receives, topk_idx = handle

        def summed(t: Tensor) -> Tensor:
            back = self._exchange(t, receives, sends)
            return back.new_zeros(len(topk_idx), *t.shape[1:]).index_add_(0, tokens, back)

        return summed(x), None if topk_weights is None else summed(topk_weights), None


class DeepEPInFp64(DeepEP):
    """So that the comparison with one process is exact: the buffer above sends any dtype."""

    dtype = torch.float64


def in_the_place_of_all_to_all(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    buffer = GlooBuffer(mesh.get_group())
    dispatcher = DeepEPInFp64(buffer, EXPERTS, PER_TOK)
    moe = parallelize_module(build(EXPERTS), mesh, ExpertParallel(dispatcher))
    check_against_one_process(moe, rank, world, EXPERTS, ("w1", "w2", "b1", "b2"))
    sent = torch.tensor(buffer.sent)
    dist.all_reduce(sent)
    # A token with both experts on one rank has travelled once.
    tokens = torch.tensor(float(sum((7, 0, 13, 4)[:world])))
    assert tokens < sent < PER_TOK * tokens


@pytest.mark.parametrize("world", [2, 3])
def test_in_the_place_of_all_to_all(world: int) -> None:
    in_processes(world, in_the_place_of_all_to_all)


def differentiated_twice(rank: int, world: int) -> None:
    dispatcher = DeepEPInFp64(GlooBuffer(dist.group.WORLD), EXPERTS, PER_TOK)
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    routing = route_topk(torch.randn(5, EXPERTS, dtype=torch.float64), PER_TOK)
    there = dispatcher.dispatch(x, routing, "torch")
    for of, leaf in ((there.tokens, x), (dispatcher.combine(there.tokens, there.handle), there.tokens)):
        for loss in (of.sum(), of.square().sum()):
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True, retain_graph=True)
            with pytest.raises(RuntimeError, match="DeepEP has no second derivative"):
                (gradient.square().sum() + leaf.square().sum()).backward(retain_graph=True)


def test_differentiating_twice_raises() -> None:
    in_processes(2, differentiated_twice)


def test_refuses_what_deep_ep_cannot_send() -> None:
    buffer: Any = SimpleNamespace(group=SimpleNamespace(size=lambda: 2))
    with pytest.raises(InvalidArgument, match="num_experts: got 5, accepted a multiple of 2 ranks"):
        DeepEP(buffer, 5, PER_TOK)
    x, logits = torch.randn(9, 16), torch.randn(9, EXPERTS)
    dispatcher = DeepEP(buffer, EXPERTS, PER_TOK)
    with pytest.raises(InvalidArgument, match="x.dtype"):
        dispatcher.dispatch(x, route_topk(logits, PER_TOK), "torch")
    for routing in (route_token_rounding(logits, PER_TOK, tile_m=4), route_topk(logits, PER_TOK + 1)):
        with pytest.raises(InvalidArgument, match="2 for every token"):
            dispatcher.dispatch(x.bfloat16(), routing, "torch")
