"""Top-K against a loop over floats: every scoring, ties, groups, bias, what is not finite, and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import skewed_logits, tied_logits

from sonicmoe import InvalidArgument, Routing, load_balancing_loss, route_topk
from sonicmoe.routing import SCORINGS, check_invariants, router_z_loss

INF = math.inf
NAN = math.nan


def _softmax(values: list[float]) -> list[float]:
    top = max(values)
    weights = [0.0 if v == -INF else math.exp(v - top) for v in values]
    return [w / sum(weights) if top > -INF else 0.0 for w in weights]


def _sigmoid(v: float) -> float:
    return 0.0 if v == -INF else 1 / (1 + math.exp(-v))


def loop_topk(
    logits: list[float],
    k: int,
    scoring: str,
    renormalize: bool = False,
    bias: list[float] | None = None,
    groups: tuple[int, int] = (1, 1),
) -> tuple[list[int], list[float]]:
    """Ids and scores of one token."""
    experts = range(len(logits))
    z = [-INF if math.isnan(v) else v for v in logits]
    probability = {"sigmoid": [_sigmoid(v) for v in z], "softmax_topk": _softmax(z), "topk_softmax": z}[scoring]
    offset = bias or [0.0] * len(z)
    biased = [-INF if z[e] == -INF else probability[e] + offset[e] for e in experts]
    compared = z if bias is None else biased
    size = len(z) // groups[0]

    def worth(group: int) -> float:
        values = sorted((biased[e] for e in range(group * size, (group + 1) * size)), reverse=True)
        if scoring != "sigmoid" or values[0] == -INF:
            return values[0]
        return sum(v for v in values[:2] if v > -INF)

    allowed = sorted(range(groups[0]), key=lambda g: (-worth(g), g))[: groups[1]]
    candidates = [e for e in experts if e // size in allowed]
    ids = sorted(candidates, key=lambda e: (-compared[e], e))[:k]
    scores = _softmax([z[e] for e in ids]) if scoring == "topk_softmax" else [probability[e] for e in ids]
    if renormalize and sum(scores) > 0:
        scores = [s / sum(scores) for s in scores]
    return ids, scores


def _assert_is_loop(logits: torch.Tensor, k: int, scoring: str, **options: Any) -> None:
    """Options as of route_topk, with a bias as a list."""
    bias, groups = options.pop("bias", None), options.pop("groups", (1, 1))
    given_bias = None if bias is None else torch.tensor(bias, dtype=logits.dtype)
    routing = route_topk(
        logits, k, scoring=scoring, bias=given_bias, num_groups=groups[0], top_groups=groups[1], **options
    )
    expected = [loop_topk(row, k, scoring, bias=bias, groups=groups, **options) for row in logits.tolist()]
    _assert_matches(routing, expected, k)


def _assert_matches(routing: Routing, expected: list[tuple[list[int], list[float]]], k: int) -> None:
    check_invariants(routing)
    expert = torch.searchsorted(routing.cu_rows[1:].contiguous(), routing.slot_row, right=True).view(-1, k).tolist()
    assert expert == [ids for ids, _ in expected]
    scores = torch.tensor([s for _, s in expected], dtype=routing.scores.dtype).flatten()
    torch.testing.assert_close(routing.scores, scores, rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 4, 2), (1, 1, 1), (30, 8, 3), (20, 6, 6), (9, 40, 17)])
def test_is_the_loop(tokens: int, experts: int, k: int, scoring: str, renormalize: bool) -> None:
    _assert_is_loop(skewed_logits(tokens, experts), k, scoring, renormalize=renormalize)


def test_the_comparison_finds_wrong_scores_and_ids() -> None:
    logits = skewed_logits(10, 6)
    for wrong in (logits.neg(), logits.roll(1, dims=1), 1.001 * logits):
        routing = route_topk(wrong, 2)
        with pytest.raises(AssertionError):
            _assert_matches(routing, [loop_topk(row, 2, "topk_softmax") for row in logits.tolist()], 2)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_ties_go_to_the_lower_expert(scoring: str) -> None:
    _assert_is_loop(tied_logits(50, 9), 4, scoring)
    _assert_is_loop(torch.zeros(3, 600), 5, scoring)
    _assert_is_loop(tied_logits(50, 12), 3, scoring, groups=(4, 2))


def test_neighbouring_floats_are_told_apart() -> None:
    """Every bit of the mantissa counts, also where softmax or sigmoid of both are the same number."""
    low = torch.tensor(20.0)
    high = torch.nextafter(low, torch.tensor(INF))
    for scoring in SCORINGS:
        _assert_is_loop(torch.stack([low, low, high]).unsqueeze(0), 2, scoring)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2), (4, 4), (8, 3)])
def test_groups_and_bias(groups: tuple[int, int], scoring: str) -> None:
    logits = skewed_logits(60, 8, skew=0.5)
    bias = [0.8, -0.7, 0.0, 0.3, -0.2, 0.9, -0.9, 0.1]
    for options in ({}, {"bias": bias}, {"bias": bias, "renormalize": True}):
        _assert_is_loop(logits, 2, scoring, groups=groups, **options)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_values(data: st.DataObject) -> None:
    """-inf and NaN among them: never chosen while a finite one is left, score 0."""
    size, num_groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    experts, top_groups = size * num_groups, data.draw(st.integers(1, num_groups))
    k = data.draw(st.integers(1, size * top_groups))
    value = st.sampled_from([-INF, NAN, -1.0, 0.0, 0.5, 0.5, 2.0])
    row = st.lists(value, min_size=experts, max_size=experts)
    logits = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)), dtype=torch.float64)
    bias = data.draw(st.none() | st.lists(st.sampled_from([-0.5, 0.0, 0.25]), min_size=experts, max_size=experts))
    scoring, renormalize = data.draw(st.sampled_from(SCORINGS)), data.draw(st.booleans())
    _assert_is_loop(logits, k, scoring, bias=bias, groups=(num_groups, top_groups), renormalize=renormalize)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_not_finite(scoring: str) -> None:
    logits = torch.tensor([[-INF] * 3, [1, -INF, NAN], [INF, 0, INF]], requires_grad=True)
    routing = route_topk(logits, 2, scoring=scoring)
    assert routing.scores[:2].tolist() == [0, 0] and routing.scores[3] == 0
    assert torch.isfinite(routing.scores).all()
    (gradient,) = torch.autograd.grad(routing.scores.square().sum(), logits)
    assert torch.isfinite(gradient).all() and not gradient[0].any()
    with pytest.raises(InvalidArgument, match="logits: got 1 NaN of 9 values, accepted no NaN"):
        route_topk(logits, 2, scoring=scoring, validate=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_at_least_fp32(dtype: torch.dtype) -> None:
    logits = skewed_logits(20, 8).to(dtype).requires_grad_()
    routing = route_topk(logits, 2, scale=2.5)
    wide = logits.detach().to(torch.promote_types(dtype, torch.float32))
    assert routing.scores.dtype == wide.dtype
    torch.testing.assert_close(routing.scores, 2.5 * route_topk(wide, 2).scores)
    assert torch.autograd.grad(routing.scores[0], logits)[0].dtype == dtype


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradients(scoring: str, renormalize: bool) -> None:
    logits = skewed_logits(5, 6).double()
    logits[1, 2] = -INF
    finite = logits > -INF

    def scores(values: torch.Tensor) -> torch.Tensor:
        full = logits.masked_scatter(finite, values)
        bias = torch.linspace(-0.2, 0.2, 6, dtype=torch.float64)
        return route_topk(full, 3, scoring=scoring, renormalize=renormalize, bias=bias, num_groups=3, top_groups=2)[0]

    assert torch.autograd.gradcheck(scores, logits[finite].requires_grad_())


def test_load_balancing_loss() -> None:
    logits = skewed_logits(30, 6).double().requires_grad_()
    routing = route_topk(logits, 2)
    rows = [_softmax(row) for row in logits.tolist()]
    chosen = [loop_topk(row, 2, "topk_softmax")[0] for row in logits.tolist()]
    expected = 0.0
    for e in range(6):
        expected += 6 * sum(ids.count(e) for ids in chosen) / 60 * sum(row[e] for row in rows) / 30
    loss = load_balancing_loss(logits, routing, 2)
    assert abs(loss.item() - expected) < 1e-12 and expected > 1.1
    assert torch.autograd.gradcheck(lambda z: load_balancing_loss(z, routing, 2), logits)
    even = torch.eye(6).repeat(5, 1)
    assert abs(load_balancing_loss(even, route_topk(even, 1), 1).item() - 1) < 1e-6
    one = torch.zeros(30, 6).index_fill(1, torch.tensor([0]), 50.0)
    assert abs(load_balancing_loss(one, route_topk(one, 1), 1).item() - 6) < 1e-6
    assert load_balancing_loss(one[:0], route_topk(one[:0], 1), 1) == 0
    with pytest.raises(InvalidArgument, match="routing.num_tokens"):
        load_balancing_loss(one[1:], route_topk(one, 1), 1)
    with pytest.raises(InvalidArgument, match="routing.num_experts"):
        load_balancing_loss(one[:, 1:], route_topk(one, 1), 1)


def test_router_z_loss() -> None:
    logits = skewed_logits(30, 6).double().requires_grad_()
    torch.testing.assert_close(router_z_loss(logits), logits.logsumexp(1).square().mean())
    assert torch.autograd.gradcheck(router_z_loss, logits)
    masked = torch.tensor([[-INF, -INF], [0.0, -INF], [3.0, -INF]], requires_grad=True)
    loss = router_z_loss(masked)
    assert abs(loss.item() - 3) < 1e-6
    assert torch.autograd.grad(loss, masked)[0].tolist() == [[0, 0], [0, 0], [2, 0]]
    assert router_z_loss(masked[:0]) == 0


@pytest.mark.unpoisoned
@pytest.mark.parametrize("scoring", SCORINGS)
def test_torch_compile(scoring: str) -> None:
    def call(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bias = torch.arange(8, device=logits.device) / 8
        routing = route_topk(logits.sin(), 2, scoring=scoring, bias=bias, num_groups=4, top_groups=2)
        loss = load_balancing_loss(logits, routing, 2) + router_z_loss(logits)
        return routing.scores, routing.cu_rows, routing.row_token, routing.row_slot, routing.slot_row, loss

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tokens in (9, 7, 40, 300):
        logits = skewed_logits(tokens, 8).requires_grad_()
        actual, expected = compiled(logits), call(logits)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(out[0].square().sum() + out[-1], logits) for out in (actual, expected)]
        torch.testing.assert_close(*gradients)
        assert gradients[1][0].any()
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: got 0, accepted 1 to E = 6"),
        ({"k": 7}, "k: got 7, accepted 1 to E = 6"),
        ({"logits": torch.zeros(6)}, "logits.shape: got (6,), accepted (T, E)"),
        ({"logits": torch.zeros(4, 0)}, "logits.shape: got (4, 0)"),
        ({"logits": torch.zeros(4, 6, dtype=torch.int32)}, "logits.dtype: got torch.int32"),
        ({"scoring": "softmax"}, "scoring: got 'softmax', accepted one of topk_softmax, softmax_topk, sigmoid"),
        ({"bias": torch.zeros(5)}, "bias.shape: got (5,), accepted (6,)"),
        ({"bias": torch.zeros(6, device="meta")}, "bias.device: got meta"),
        ({"num_groups": 2}, "num_groups, top_groups: got 2, None, accepted both or neither"),
        ({"num_groups": 4, "top_groups": 2}, "num_groups: got 4, accepted a divisor of E = 6"),
        ({"num_groups": 3, "top_groups": 4}, "top_groups: got 4, accepted 1 to num_groups = 3"),
        ({"num_groups": 3, "top_groups": 1, "k": 3}, "k: got 3, accepted at most 2"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        route_topk(**{"logits": torch.zeros(4, 6), "k": 2} | options)
    assert message in str(error.value)
