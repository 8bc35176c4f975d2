"""The plan against a loop, its invariants, and that a broken one is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import ASSIGNED, assigned_ids
from strategies import build_routing, ragged_assigned
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sonicmoe import (
    InvalidArgument,
    Routing,
    route_assigned,
    route_pairs,
    route_rows,
    route_token_rounding,
    route_topk,
)
from sonicmoe.routing import RULES, check_invariants


def _loop(slots: list[tuple[int, int]], num_experts: int) -> tuple[list[int], list[int], list[int]]:
    """cu_rows, row_slot and slot_row of (token, expert) slots, by appending."""
    of_expert: list[list[int]] = [[] for _ in range(num_experts)]
    for s, (_, e) in enumerate(slots):
        if 0 <= e < num_experts:
            of_expert[e].append(s)
    cu_rows, row_slot, slot_row = [0], [], [-1] * len(slots)
    for slot_list in of_expert:
        for s in slot_list:
            slot_row[s] = len(row_slot)
            row_slot.append(s)
        cu_rows.append(len(row_slot))
    return cu_rows, row_slot, slot_row


def _assert_is_loop(routing: Routing, slots: list[tuple[int, int]], num_experts: int) -> None:
    check_invariants(routing)
    cu_rows, row_slot, slot_row = _loop(slots, num_experts)
    padding = [0] * (len(slots) - len(row_slot))
    assert routing.cu_rows.tolist() == cu_rows and routing.num_experts == num_experts
    assert routing.row_slot.tolist() == row_slot + padding
    assert routing.row_token.tolist() == [slots[s][0] for s in row_slot] + padding
    assert routing.slot_row.tolist() == slot_row


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 3, 2), (1, 1, 1), (17, 5, 3), (40, 300, 4)])
@pytest.mark.parametrize("kind", ASSIGNED)
def test_assigned(kind: str, tokens: int, experts: int, k: int, dtype: torch.dtype) -> None:
    ids = assigned_ids(kind, tokens, experts, k).to(dtype)
    scores = torch.randn(tokens, k, requires_grad=True)
    routing = route_assigned(ids, scores, num_experts=experts)
    _assert_is_loop(routing, [(t, e) for t, row in enumerate(ids.tolist()) for e in row], experts)
    valid = (ids >= 0) & (ids < experts)
    assert torch.equal(routing.scores.detach(), (scores.detach() * valid).flatten())
    (gradient,) = torch.autograd.grad(routing.scores.sum(), scores)
    assert torch.equal(gradient, valid.float())


def test_sentinels_do_not_wrap_or_leak() -> None:
    """An int64 id that is 1 modulo 2^32 is no expert, and NaN scores of skipped slots stay out."""
    ids = torch.tensor([[1, 2**32 + 1, -(2**32) + 1]])
    scores = torch.tensor([[1.0, float("nan"), float("inf")]], requires_grad=True)
    routing = route_assigned(ids, scores, num_experts=2)
    assert routing.cu_rows.tolist() == [0, 0, 1] and routing.scores.tolist() == [1, 0, 0]
    assert torch.autograd.grad(routing.scores.sum(), scores)[0].tolist() == [[1, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pairs(data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 4))
    pair = st.tuples(st.integers(-1, tokens), st.integers(-1, experts))
    pairs = data.draw(st.lists(pair, max_size=20))
    token, expert = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))
    scores = torch.arange(1.0, len(pairs) + 1, dtype=torch.float64).requires_grad_()
    routing = route_pairs(token, expert, scores, num_tokens=tokens, num_experts=experts)
    inside = [p for p in range(len(pairs)) if 0 <= pairs[p][0] < tokens]
    order = sorted(inside, key=lambda p: pairs[p][0]) + [p for p in range(len(pairs)) if p not in inside]
    slots = [pairs[p] if p in inside else (tokens, -1) for p in order]
    _assert_is_loop(routing, slots, experts)
    used = [p in inside and 0 <= pairs[p][1] < experts for p in range(len(pairs))]
    assert routing.scores.tolist() == [(p + 1.0) * used[p] for p in order]
    assert routing.cu_slots is not None
    assert routing.cu_slots.tolist() == [sum(pairs[p][0] < t for p in inside) for t in range(tokens + 1)]
    weights = torch.arange(len(pairs), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(routing.scores @ weights, scores)
    assert gradient.tolist() == [float(order.index(p)) * used[p] for p in range(len(pairs))]


@pytest.mark.parametrize(("rows", "num_rows"), [([3, 0, 4], 10), ([3, 0, 4], 7), ([0, 0], 2), ([5], 0), ([6, 6], 8)])
def test_rows(rows: list[int], num_rows: int) -> None:
    routing = route_rows(torch.tensor(rows), num_rows=num_rows)
    check_invariants(routing)
    used = min(sum(rows), num_rows)
    assert routing.cu_rows.tolist() == [min(sum(rows[:e]), num_rows) for e in range(len(rows) + 1)]
    assert routing.row_token.tolist() == list(range(used)) + [0] * (num_rows - used)
    assert routing.slot_row.tolist() == list(range(used)) + [-1] * (num_rows - used)
    assert routing.scores.tolist() == [1.0] * num_rows and routing.num_tokens == num_rows


@pytest.mark.unpoisoned
def test_scores_of_rows_whatever_the_default_dtype() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert route_rows(torch.tensor([3, 1]), num_rows=4).scores.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


BREAKAGES: dict[str, Callable[[Routing], Routing]] = {
    "cu_rows: ": lambda r: r._replace(cu_rows=r.cu_rows.flip(0).contiguous()),
    "cu_rows.dtype": lambda r: r._replace(cu_rows=r.cu_rows.long()),
    "cu_rows.stride": lambda r: r._replace(cu_rows=r.cu_rows.repeat_interleave(2)[::2]),
    "row_token: got other tokens": lambda r: r._replace(row_token=r.row_token + r.num_tokens),
    "row_token: got another token": lambda r: r._replace(row_token=torch.zeros_like(r.row_token)),
    "row_token: got another order": lambda r: r._replace(row_token=_swapped(r.row_token)),
    "row_token: got another value": lambda r: r._replace(row_token=torch.cat((r.row_token[:-1], r.row_token[5:6]))),
    "row_slot: got other slots": lambda r: r._replace(row_slot=r.row_slot - 1),
    "row_slot: got a slot twice": lambda r: r._replace(row_slot=torch.cat((r.row_slot[1:2], r.row_slot[1:]))),
    "row_slot.shape": lambda r: r._replace(row_slot=r.row_slot[:-1]),
    "slot_row: got another map": lambda r: r._replace(slot_row=torch.full_like(r.slot_row, -1)),
    "slot_row: got a row in an unused": lambda r: r._replace(slot_row=torch.zeros_like(r.slot_row)),
    "slot_row.shape": lambda r: r._replace(scores=r.scores[1:]),
    "cu_slots.shape": lambda r: r._replace(num_tokens=r.num_tokens + 1),
    "cu_slots: ": lambda r: r._replace(cu_slots=r.cu_slots + 1 if r.cu_slots is not None else None),
    "scores.dtype": lambda r: r._replace(scores=r.scores.bfloat16()),
}


def _swapped(row_token: torch.Tensor) -> torch.Tensor:
    """The first two rows of expert 0 in the other order."""
    return torch.cat((row_token[1:2], row_token[:1], row_token[2:]))


@pytest.mark.parametrize("message", BREAKAGES)
def test_a_broken_routing_is_found(message: str) -> None:
    routing = build_routing(ragged_assigned(12, 4, seed=1), 4, padding=3)
    check_invariants(routing)
    with pytest.raises(InvalidArgument) as error:
        check_invariants(BREAKAGES[message](routing))
    assert f"routing.{message}" in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i, s: route_assigned(i[0], s[0], num_experts=3), "expert_ids.shape: got (2,), accepted (T, K)"),
        (lambda i, s: route_assigned(i.float(), s, num_experts=3), "expert_ids.dtype: got torch.float32"),
        (lambda i, s: route_assigned(i, s[:1], num_experts=3), "scores.shape: got (1, 2), accepted (4, 2)"),
        (lambda i, s: route_assigned(i, s.int(), num_experts=3), "scores.dtype: got torch.int32"),
        (lambda i, s: route_assigned(i, s.to("meta"), num_experts=3), "scores.device: got meta"),
        (lambda i, s: route_assigned(i, s, num_experts=0), "num_experts: got 0"),
        (lambda i, s: route_assigned(i, s, num_experts=4.5), "num_experts: got float, accepted an integer"),
        (lambda i, s: route_topk(s, True), "k: got bool, accepted an integer"),
        (lambda i, s: route_topk(s, "2"), "k: got str, accepted an integer"),
        (lambda i, s: route_assigned(i, s / 0, num_experts=3, validate=True), "scores: got 8 NaN of 8"),
        (lambda i, s: route_pairs(i, i, s, num_tokens=1, num_experts=3), "token_ids.shape"),
        (lambda i, s: route_pairs(i[0], i[0, :1], s[0], num_tokens=1, num_experts=3), "expert_ids.shape"),
        (lambda i, s: route_pairs(i[0], i[0], s[0], num_tokens=-1, num_experts=3), "num_tokens: got -1"),
        (
            lambda i, s: route_pairs(i[0] + 1, i[0], s[0], num_tokens=1, num_experts=3, validate=True),
            "token_ids: got 2 outside, accepted 0 to 0",
        ),
        (lambda i, s: route_rows(i, num_rows=3), "rows_per_expert.shape"),
        (lambda i, s: route_rows(i[0], num_rows=-1), "num_rows: got -1"),
    ],
)
def test_what_is_refused(call: Callable[..., Routing], message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        call(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2))
    assert message in str(error.value)


def test_the_worked_example_of_the_documentation() -> None:
    routing = route_assigned(torch.tensor([[2, 0], [0, 1], [3, 2]]), torch.ones(3, 2), num_experts=3)
    assert routing.slot_row.tolist() == [3, 0, 1, 2, -1, 4] and routing.cu_rows.tolist() == [0, 2, 3, 5]
    assert routing.row_slot.tolist() == [1, 2, 3, 0, 5, 0] and routing.row_token.tolist() == [0, 1, 1, 0, 2, 0]


ROUTES: dict[str, Callable[[torch.Tensor], Routing]] = {
    "topk": lambda z: route_topk(z, 2, scoring="sigmoid", bias=z[0].sin(), num_groups=2, top_groups=1),
    **{rule: lambda z, rule=rule: route_token_rounding(z, 2, tile_m=4, rule=rule) for rule in RULES},
    "assigned": lambda z: route_assigned(z.int(), z, num_experts=4),
    "pairs": lambda z: route_pairs(z[:, 0].int(), z[:, 1].int(), z[:, 2], num_tokens=9, num_experts=4),
    "rows": lambda z: route_rows(z[0].abs().int(), num_rows=9),
}


@pytest.mark.unpoisoned
@pytest.mark.parametrize("route", ROUTES)
def test_never_reads_a_value_on_the_host(route: str) -> None:
    """Fake tensors have no values: an .item(), a nonzero or a size that depends on values would raise."""
    with FakeTensorMode():
        logits = torch.randn(9, 4, requires_grad=True)
        with pytest.raises(DataDependentOutputException):
            logits.sum().item()
        routing = ROUTES[route](logits)
        if routing.scores.requires_grad:
            torch.autograd.grad(routing.scores.sum(), logits)
