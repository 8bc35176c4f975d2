"""The plan kernels on the GPU: equal to torch's on the CPU, for every way in which they cut the work."""

from __future__ import annotations

import pytest
import torch
from routing_cases import ASSIGNED, assigned_ids
from torch import Tensor

from sonicmoe import Routing, ops, route_assigned, route_pairs, route_rows
from sonicmoe.cute_kernels.plan import MAX_EXPERTS
from sonicmoe.routing import check_invariants

DEVICE = "cuda"
NAMES = ("cu_rows", "row_token", "row_slot", "slot_row")


def check(ids: Tensor, num_experts: int, slot_token: Tensor | None = None) -> None:
    """ids and slot_token on the CPU."""
    expected = ops.plan(ids, slot_token, num_experts, "torch")
    arguments = (ids.to(DEVICE), None if slot_token is None else slot_token.to(DEVICE), num_experts, "cute")
    first, second = ops.plan(*arguments), ops.plan(*arguments)
    for name, a, b, e in zip(NAMES, first, second, expected, strict=True):
        assert a.dtype == torch.int32 and torch.equal(a.cpu(), e), name
        assert torch.equal(a, b), f"{name} of a second run"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("experts", [1, 2, 8, 100, 128, 256, 1000, 4096])
@pytest.mark.parametrize("kind", ASSIGNED)
def test_experts(kind: str, experts: int, dtype: torch.dtype) -> None:
    check(assigned_ids(kind, 1000, experts, min(experts, 8)).to(dtype), experts)


@pytest.mark.parametrize("tokens", [0, 1, 37, 128, 1000, 24576])
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("kind", ["skewed", "sentinels"])
def test_tokens(kind: str, tokens: int, k: int) -> None:
    check(assigned_ids(kind, tokens, 128, k), 128)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(32768, 256, 16), (4096, 4096, 64), (3000, MAX_EXPERTS, 3)])
def test_large(tokens: int, experts: int, k: int) -> None:
    check(assigned_ids("skewed", tokens, experts, k), experts)


def test_tokens_that_are_given() -> None:
    token = torch.randint(0, 300, (2000,), generator=torch.Generator().manual_seed(0)).sort().values
    for dtype in (torch.int32, torch.int64):
        check(assigned_ids("sentinels", 2000, 40, 1).flatten().to(dtype), 40, token.to(dtype))


def test_ids_that_wrap_are_no_experts() -> None:
    check(torch.tensor([[1, 2**32 + 1, -(2**32) + 1], [2**31, 0, -1]]), 2)


def test_ids_in_another_layout() -> None:
    ids = assigned_ids("uniform", 500, 30, 6)
    strided = ids.to(DEVICE).t().contiguous().t()
    for a, e in zip(ops.plan(strided, None, 30, "cute"), ops.plan(ids, None, 30, "torch"), strict=True):
        assert torch.equal(a.cpu(), e)


def test_more_experts_than_the_kernel_counts() -> None:
    experts = MAX_EXPERTS + 1
    ids = assigned_ids("uniform", 100, experts, 2)
    routing = route_assigned(ids.to(DEVICE), torch.ones(100, 2, device=DEVICE), num_experts=experts)
    check_invariants(routing)


def test_the_test_sees_a_wrong_plan() -> None:
    """Zeros, or two rows of an expert in the other order, are not equal."""
    ids = assigned_ids("uniform", 100, 4, 2)
    expected = ops.plan(ids, None, 4, "torch")
    for name, e in zip(NAMES, expected, strict=True):
        assert e.any() and not torch.equal(torch.zeros_like(e), e), name
    assert not torch.equal(expected[2][[1, 0]], expected[2][:2])


def test_writes_nothing_else() -> None:
    from sonicmoe import jit
    from sonicmoe.cute_kernels.plan import PlanSpec

    experts, guard = 50, 16
    ids = assigned_ids("sentinels", 400, experts, 3).flatten().to(DEVICE)
    spec = PlanSpec(experts, 3, "i32")
    counts = torch.empty(spec.chunks(1200), spec.columns, dtype=torch.int32, device=DEVICE)
    buffers = [torch.full((n + 2 * guard,), -7, dtype=torch.int32, device=DEVICE) for n in (experts + 1, *[1200] * 3)]
    jit.launch(spec, ids, None, counts, *(b[guard:-guard] for b in buffers))
    expected = ops.plan(ids.cpu().view(400, 3), None, experts, "torch")
    for name, b, e in zip(NAMES, buffers, expected, strict=True):
        assert torch.equal(b[guard:-guard].cpu(), e), name
        assert (b[:guard] == -7).all() and (b[-guard:] == -7).all(), name


def same(actual: Routing, expected: Routing) -> None:
    check_invariants(actual)
    for name, a, e in zip(actual._fields[1:], actual[1:], expected[1:], strict=True):
        assert torch.equal(a.cpu(), e) if isinstance(a, Tensor) else a == e, name
    assert torch.equal(actual.scores.cpu(), expected.scores)


@pytest.mark.parametrize("kind", ASSIGNED)
def test_route_assigned(kind: str) -> None:
    ids, scores = assigned_ids(kind, 777, 60, 4), torch.rand(777, 4)
    same(
        route_assigned(ids.to(DEVICE), scores.to(DEVICE), num_experts=60),
        route_assigned(ids, scores, num_experts=60),
    )


def test_route_pairs() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens, experts = (torch.randint(-1, n + 1, (3000,), generator=generator) for n in (200, 30))
    scores = torch.rand(3000, generator=generator)
    on_gpu = [t.to(DEVICE) for t in (tokens, experts, scores)]
    same(
        route_pairs(*on_gpu, num_tokens=200, num_experts=30),
        route_pairs(tokens, experts, scores, num_tokens=200, num_experts=30),
    )


@pytest.mark.parametrize("num_rows", [0, 5, 100, 200])
def test_route_rows(num_rows: int) -> None:
    rows = torch.tensor([30, 0, 41, 29])
    same(route_rows(rows.to(DEVICE), num_rows=num_rows), route_rows(rows, num_rows=num_rows))


@pytest.mark.unpoisoned
def test_in_a_cuda_graph() -> None:
    ids = assigned_ids("uniform", 900, 64, 4).to(DEVICE)
    scores = torch.rand(900, 4, device=DEVICE)
    route_assigned(ids, scores, num_experts=64)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = route_assigned(ids, scores, num_experts=64)
    for kind in ("sentinels", "one", "skewed"):
        ids.copy_(assigned_ids(kind, 900, 64, 4, seed=5))
        graph.replay()
        same(routing, route_assigned(ids.cpu(), scores.cpu(), num_experts=64))
