"""Token rounding against a loop over experts and tokens: all six rules, ties, caps, bounds, scores and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_cases import logits_of_counts, skewed_logits, tied_logits
from torch import Tensor

from sonicmoe import (
    InvalidArgument,
    Routing,
    load_balancing_loss,
    ops,
    reference,
    route_token_rounding,
    route_topk,
)
from sonicmoe.reference.token_rounding import packed, unpacked
from sonicmoe.routing import RULES, check_invariants, round_counts, rounding_counts

DETERMINISTIC = ("nearest", "balanced", "up", "down")


def loop_counts(counts: list[int], tile_m: int, rule: str, num_tokens: int) -> list[int]:
    """f' of a rule without chance, expert by expert."""
    rounded, error = [], 0
    for f in counts:
        low = f - f % tile_m
        high = low + tile_m if f % tile_m else low
        if rule == "nearest":
            choice = high if high - f < f - low else low
        elif rule == "balanced":
            choice = high if abs(error + high - f) < abs(error + low - f) else low
        else:
            choice = high if rule == "up" else low
        rounded.append(choice if choice <= num_tokens else low)
        error += rounded[-1] - f
    return rounded


def loop_scores(logits: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Scores of all pairs and the chosen experts of each token."""
    scores, chosen = [], []
    for row in logits.tolist():
        ids = sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]
        weights = [math.exp(z - max(row)) for z in row]
        kept = sum(weights[e] for e in ids)
        scores.append([w / (kept if e in ids else sum(weights)) for e, w in enumerate(weights)])
        chosen.append(ids)
    return scores, chosen


def pairs_of(routing: Routing) -> list[tuple[int, int]]:
    """(token, expert) of the used slots, in their order."""
    assert routing.cu_slots is not None
    used = int(routing.cu_slots[-1])
    rows = routing.slot_row[:used]
    expert = torch.searchsorted(routing.cu_rows[1:].contiguous(), rows, right=True)
    return list(zip(routing.row_token[rows.long()].tolist(), expert.tolist(), strict=True))


def _assert_is_loop(logits: Tensor, k: int, tile_m: int, routing: Routing, rounded: list[int]) -> None:
    """The routing keeps, of each expert, the first rounded[e] tokens in order of preference, with their scores."""
    check_invariants(routing)
    tokens, experts = logits.shape
    assert routing.slot_row.shape[0] == min(tokens * experts, tokens * k + experts * (tile_m - 1))
    scores, chosen = loop_scores(logits, k)
    expected = []
    for e, count in enumerate(rounded):
        order = sorted(range(tokens), key=lambda t: (e not in chosen[t], -scores[t][e], t))
        expected += [(t, e) for t in order[:count]]
    expected.sort()
    assert routing.cu_rows.diff().tolist() == rounded
    assert pairs_of(routing) == expected
    used = torch.tensor([scores[t][e] for t, e in expected], dtype=routing.scores.dtype)
    unused = routing.scores.new_zeros(routing.scores.shape[0] - len(expected))
    torch.testing.assert_close(routing.scores, torch.cat((used, unused)), rtol=2e-6, atol=1e-30)


def _counts(logits: Tensor, k: int) -> list[int]:
    return route_topk(logits, k).cu_rows.diff().tolist()


@pytest.mark.parametrize("rule", DETERMINISTIC)
@pytest.mark.parametrize(
    ("tokens", "experts", "k", "tile_m"),
    [
        (0, 3, 1, 4),
        (3, 4, 2, 8),
        (40, 6, 2, 8),
        (41, 5, 5, 4),
        (30, 1, 1, 8),
        (32, 1, 1, 8),
        (50, 7, 3, 1),
        (64, 9, 2, 5),
    ],
)
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_is_the_loop(tokens: int, experts: int, k: int, tile_m: int, skew: float, rule: str) -> None:
    # fp64, in which no two scores of different logits are equal or swapped by their rounding.
    logits = skewed_logits(tokens, experts, skew).double()
    routing = route_token_rounding(logits, k, tile_m=tile_m, rule=rule)
    rounded = loop_counts(_counts(logits, k), tile_m, rule, tokens)
    _assert_is_loop(logits, k, tile_m, routing, rounded)


@pytest.mark.parametrize("rule", DETERMINISTIC)
def test_equal_scores_keep_the_lower_token(rule: str) -> None:
    """Exactly equal logits: of experts the lower one is chosen, of tokens the lower one is kept."""
    logits = torch.zeros(24, 4, dtype=torch.float64)
    routing = route_token_rounding(logits, 2, tile_m=16, rule=rule)
    _assert_is_loop(logits, 2, 16, routing, loop_counts([24, 24, 0, 0], 16, rule, 24))
    logits = tied_logits(40, 6, levels=2).double()
    routing = route_token_rounding(logits, 1, tile_m=8, rule=rule)
    check_invariants(routing)
    assert routing.cu_rows.diff().tolist() == loop_counts(_counts(logits, 1), 8, rule, 40)


def test_the_rules_by_hand() -> None:
    """Counts 12, 4, 5, 3, 0, 8 of 32 tokens in tiles of 8: a tie at 12 and at 4 drops."""
    logits = logits_of_counts([12, 4, 5, 3, 0, 8], 32)
    expected = {
        "nearest": [8, 0, 8, 0, 0, 8],
        # running errors: -4, then 0 by rising, then 3, then 0, 0, 0
        "balanced": [8, 8, 8, 0, 0, 8],
        "up": [16, 8, 8, 8, 0, 8],
        "down": [8, 0, 0, 0, 0, 8],
    }
    for rule, rounded in expected.items():
        assert route_token_rounding(logits, 1, tile_m=8, rule=rule).cu_rows.diff().tolist() == rounded


def test_never_more_than_all_tokens() -> None:
    """17 of 20 tokens cannot become 24, nor can anything of 5 tokens fill a tile of 8."""
    for rule in RULES:
        routing = route_token_rounding(logits_of_counts([17, 3, 0], 20), 1, tile_m=8, rule=rule)
        assert routing.cu_rows[1] == 16
        check_invariants(routing)
        nothing = route_token_rounding(skewed_logits(5, 3), 2, tile_m=8, rule=rule)
        assert nothing.cu_rows.tolist() == [0, 0, 0, 0] and not nothing.scores.any()
        check_invariants(nothing)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rounded_counts(data: st.DataObject) -> None:
    tile_m, num_tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    counts = data.draw(st.lists(st.integers(0, num_tokens), min_size=1, max_size=12))
    for rule in DETERMINISTIC:
        rounded = round_counts(torch.tensor(counts), tile_m, rule, num_tokens).tolist()
        assert rounded == loop_counts(counts, tile_m, rule, num_tokens), rule
        assert all(abs(r - f) < tile_m and r % tile_m == 0 for r, f in zip(rounded, counts, strict=True))
        capped = any(f % tile_m and f - f % tile_m + tile_m > num_tokens for f in counts)
        assert rule != "balanced" or capped or 2 * abs(sum(rounded) - sum(counts)) <= tile_m


def test_stochastic_by_frequency() -> None:
    """Each expert rises with probability (f - floor f) / tile_m: 0, 1/8, 1/2 and 7/8 here, by 2000 draws."""
    counts, tile_m = torch.tensor([16, 9, 12, 7]), 8
    draws = torch.rand(2000, 4, generator=torch.Generator().manual_seed(0))
    rounded = torch.stack([round_counts(counts, tile_m, "stochastic", 64, u) for u in draws])
    share = ((rounded - counts // tile_m * tile_m) / tile_m).mean(dim=0)
    # Four standard deviations of a mean of 2000.
    assert ((share - torch.tensor([0, 1 / 8, 1 / 2, 7 / 8])).abs() < 0.045).all() and share[0] == 0
    edge = round_counts(counts, tile_m, "stochastic", 64, torch.tensor([0.0, 1 / 8, 0.5, 0.874]))
    assert edge.tolist() == [16, 8, 8, 8]


def test_stochastic_by_mass() -> None:
    """Rises if the draw is below the chosen share of the last tile's mass: here (0.5 + 0.25) / (0.5 + 0.25 + 0.25)."""
    sorted_scores = torch.tensor([[0.9, 0.8, 0.7, 0.6, 0.5, 0.25, 0.15, 0.1, 0.05]])
    for draw, expected in ((0.0, 8), (0.749, 8), (0.751, 4), (0.999, 4)):
        rounded = round_counts(torch.tensor([6]), 4, "stochastic_mass", 9, torch.tensor([draw]), sorted_scores)
        assert rounded.tolist() == [expected]
    nothing = round_counts(torch.tensor([6]), 4, "stochastic_mass", 9, torch.zeros(1), torch.zeros(1, 9))
    assert nothing.tolist() == [4]


@pytest.mark.parametrize("rule", ["stochastic", "stochastic_mass"])
def test_stochastic_routings(rule: str) -> None:
    """Either multiple of each expert, by the draws of the generator; reproducible, and its own generator only."""
    logits = skewed_logits(60, 12, skew=0.5).double()
    counts = _counts(logits, 2)
    scores, chosen = loop_scores(logits, 2)
    seen = set()
    for seed in range(6):
        state = torch.get_rng_state()
        first, second = (
            route_token_rounding(logits, 2, tile_m=8, rule=rule, generator=torch.Generator().manual_seed(seed))
            for _ in range(2)
        )
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(first[:6], second[:6], strict=True))
        draws = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist()
        rounded = []
        for e, f in enumerate(counts):
            low = f - f % 8
            order = sorted(range(60), key=lambda t: (e not in chosen[t], -scores[t][e], t))
            mass = [scores[t][e] for t in order[low : low + 8]]
            share = f % 8 / 8 if rule == "stochastic" else sum(mass[: f % 8]) / sum(mass)
            rounded.append(low + 8 if f % 8 and draws[e] < share else low)
        _assert_is_loop(logits, 2, 8, first, rounded)
        seen.add(tuple(rounded))
    assert len(seen) > 1
    torch.manual_seed(3)
    a = route_token_rounding(logits, 2, tile_m=8, rule=rule)
    torch.manual_seed(3)
    assert torch.equal(a.cu_rows, route_token_rounding(logits, 2, tile_m=8, rule=rule).cu_rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_preference_is_exact_in_fp32(dtype: torch.dtype) -> None:
    """Tiny scores keep their order behind the chosen ones; a sum of score and bonus would make them equal."""
    logits = torch.zeros(16, 3)
    logits[:, 2] = -30 - torch.arange(16) / 4
    logits[:3, 2] = 1
    routing = route_token_rounding(logits.to(dtype), 2, tile_m=8, rule="up")
    assert [t for t, e in pairs_of(routing) if e == 2] == [0, 1, 2, 3, 4, 5, 6, 7]
    routing = route_token_rounding(logits.flip(0).to(dtype), 2, tile_m=8, rule="up")
    assert [t for t, e in pairs_of(routing) if e == 2] == [8, 9, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("rule", RULES)
def test_scores_and_gradients(rule: str) -> None:
    logits = skewed_logits(12, 4).double().requires_grad_()

    def scores(values: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return route_token_rounding(values, 2, tile_m=4, rule=rule, generator=generator).scores

    assert torch.autograd.gradcheck(scores, logits)


@pytest.mark.parametrize("rule", ["nearest", "up", "down"])
@pytest.mark.parametrize("experts", [4, 33])
def test_the_backward_that_the_kernel_computes_is_that_of_autograd(rule: str, experts: int) -> None:
    """From the bits alone; what the unused slots' gradients hold does not matter."""
    logits = skewed_logits(30, experts).double()
    logits[0], logits[1, 1:], logits[2, 0], logits[3, 2] = -math.inf, -math.inf, math.nan, math.inf
    leaf = logits.clone().requires_grad_()
    rounded = reference.token_rounding(leaf, None, 2, 4, rule, 30 * experts)
    used = int(rounded.cu_rows[-1])
    dscores = torch.randn(30 * experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(rounded.scores, leaf, dscores)
    dscores[used:] = math.nan
    bits = (rounded.chosen, rounded.kept)
    actual = ops.token_rounding_backward(dscores, logits, rounded.cu_slots, *bits, "torch")
    assert 0 < used < 30 * experts and expected.abs().max() > 0.1
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    there = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    both = there.clone()
    ops.token_rounding_backward_add_(both, dscores, logits, rounded.cu_slots, *bits, "torch")
    torch.testing.assert_close(both - there, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("experts", [1, 31, 32, 33, 100])
def test_bits(experts: int) -> None:
    bits = torch.rand(7, experts, generator=torch.Generator().manual_seed(0)) < 0.5
    words = packed(bits)
    assert words.dtype == torch.int32 and words.shape == (7, (experts + 31) // 32)
    assert torch.equal(unpacked(words, experts), bits) and not torch.equal(unpacked(words, experts), ~bits)
    assert int(words[3, 0]) & 1 == int(bits[3, 0])


def test_tile_of_one_is_top_k() -> None:
    logits = skewed_logits(30, 5)
    for rule in RULES:
        assert route_token_rounding(logits, 2, tile_m=1, rule=rule).cu_rows.diff().tolist() == _counts(logits, 2)


def test_not_finite() -> None:
    logits = skewed_logits(24, 4)
    logits[0], logits[1, 1:], logits[2, 0], logits[3, 2] = -math.inf, -math.inf, math.nan, math.inf
    logits.requires_grad_()
    routing = route_token_rounding(logits, 2, tile_m=8, rule="up")
    check_invariants(routing)
    assert torch.isfinite(routing.scores).all()
    assert torch.isfinite(torch.autograd.grad(routing.scores.square().sum(), logits)[0]).all()
    with pytest.raises(InvalidArgument, match="logits: got 1 NaN"):
        route_token_rounding(logits, 2, tile_m=8, validate=True)


def test_rounding_counts() -> None:
    logits = logits_of_counts([12, 4, 5, 3, 0, 8], 32)
    counted = rounding_counts(route_token_rounding(logits, 1, tile_m=8), logits, 1)
    assert counted.chosen.tolist() == [12, 4, 5, 3, 0, 8] and counted.routed.tolist() == [8, 0, 8, 0, 0, 8]
    assert counted.dropped.tolist() == [4, 4, 0, 3, 0, 0] and counted.padded.tolist() == [0, 0, 3, 0, 0, 0]
    plain = rounding_counts(route_topk(logits, 1), logits, 1)
    assert not plain.dropped.any() and not plain.padded.any()


@pytest.mark.unpoisoned
@pytest.mark.parametrize("rule", RULES)
def test_torch_compile(rule: str) -> None:
    def call(logits: Tensor) -> tuple[Tensor, ...]:
        r = route_token_rounding(logits.sin(), 2, tile_m=8, rule=rule)
        assert r.cu_slots is not None
        return r.scores, r.cu_rows, r.row_token, r.row_slot, r.slot_row, r.cu_slots

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (40, 37, 300):
        logits = skewed_logits(tokens, 6).requires_grad_()
        results = []
        for function in (compiled, call):
            torch.manual_seed(0)
            out = function(logits)
            results.append((out, torch.autograd.grad(out[0].square().sum(), logits)))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 7}, "k: got 7, accepted 1 to E = 6"),
        ({"tile_m": 0}, "tile_m: got 0, accepted at least 1"),
        ({"rule": "ceil"}, f"rule: got 'ceil', accepted one of {', '.join(RULES)}"),
        ({"logits": torch.zeros(4, 6, device="meta"), "generator": torch.Generator()}, "generator.device: got cpu"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        route_token_rounding(**{"logits": torch.zeros(4, 6), "k": 2} | options)
    assert message in str(error.value)


def test_counts_and_loss_want_the_routing_of_their_logits() -> None:
    logits = skewed_logits(16, 4)
    for of in (lambda r: rounding_counts(r, logits, 2), lambda r: load_balancing_loss(logits, r, 2)):
        for routing, message in (
            (route_topk(logits[:8], 2), "routing.num_tokens: got 8"),
            (route_topk(logits[:, :3], 2), "routing.num_experts: got 3"),
            (None, "routing: got NoneType, accepted a sonicmoe.Routing"),
        ):
            with pytest.raises(InvalidArgument) as error:
                of(routing)
            assert message in str(error.value)
