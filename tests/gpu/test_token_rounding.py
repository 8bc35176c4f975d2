"""Token rounding on the GPU.

Which pairs are kept depends on the order of scores, and those of two exponentials need not round alike. So the kernels
are held to their own scores: from those that they report when all pairs are kept, torch on the CPU must get exactly
the same pairs, slots, rows and scores; and these scores, and what top-K chose, are compared with torch's. Where
scores are well apart, all is equal.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from closeness import assert_as_good
from routing_cases import logits_of_counts, skewed_logits, tied_logits
from torch import Tensor

from sonicmoe import Routing, jit, ops, reference, route_token_rounding
from sonicmoe.cute_kernels.rounding import MAX_EXPERTS, RoundingSpec, masks
from sonicmoe.reference.scores import working
from sonicmoe.reference.token_rounding import Rounded, packed, pair_scores, rounded, unpacked
from sonicmoe.routing import RULES, check_invariants

DEVICE = "cuda"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DETERMINISTIC = ("nearest", "balanced", "up", "down")


def bound(tokens: int, experts: int, k: int, tile_m: int) -> int:
    return min(tokens * experts, tokens * k + experts * (tile_m - 1))


class Launched(NamedTuple):
    """On the CPU: the results, and the scores of all pairs (T, E) of experts that top-K chose at all, 0 else."""

    rounded: Rounded
    scores: Tensor


def launch(logits: Tensor, k: int, tile_m: int, rule: str, draws: Tensor | None) -> Launched:
    """The kernels; and again with tiles of all tokens, so that each expert of any token keeps all of them."""
    tokens, experts = logits.shape
    actual, every = launch_once(logits, k, tile_m, rule, draws), launch_once(logits, k, tokens, "up", None)
    kept = unpacked(every.kept, experts)
    assert torch.equal(kept, unpacked(every.chosen, experts).any(dim=0).expand(tokens, experts))
    scores = torch.zeros(tokens, experts)
    # Slots are in the order of tokens, then of experts.
    scores[kept] = every.scores[: int(kept.sum())]
    return Launched(actual, scores)


def launch_once(logits: Tensor, k: int, tile_m: int, rule: str, draws: Tensor | None, guard: int = 8) -> Rounded:
    """The kernels with buffers of our own, whose guards are shown to be left alone; scratch is noise."""
    tokens, experts = logits.shape
    name = next(n for n, d in DTYPES.items() if d == logits.dtype)
    spec = RoundingSpec(experts, k, name, rule, tile_m)
    words, slots = masks(tokens), bound(tokens, experts, k, tile_m)

    def index(*shape: int) -> Tensor:
        return torch.full(shape, -7, dtype=torch.int32, device=DEVICE)

    softmax = torch.full((tokens, 4), math.nan, device=DEVICE)
    tiles, marks, state = index(experts, words, 4), index(words, experts, 2), index(2 * experts + words)
    if spec.counted:
        state.zero_()
    sizes = (slots, experts + 1, slots, slots, slots, tokens + 1, tokens * masks(experts), tokens * masks(experts))
    buffers = [index(n + 2 * guard) for n in sizes]
    buffers[0] = torch.full((slots + 2 * guard,), -7.0, device=DEVICE)
    inside = [b[guard:-guard] for b in buffers]
    inside[-2:] = [b.view(tokens, masks(experts)) for b in inside[-2:]]
    on_gpu = None if draws is None else draws.to(DEVICE)
    jit.launch(spec, logits.to(DEVICE), on_gpu, softmax, tiles, state, marks, *inside)
    for n, b in zip(Rounded._fields, buffers, strict=True):
        assert (b[:guard] == -7).all() and (b[-guard:] == -7).all(), n
    return Rounded(*(b.cpu() for b in inside))


def check(logits: Tensor, k: int, tile_m: int, rule: str, seed: int = 0, ties: bool = False) -> bool:
    """The kernels on logits of the CPU; whether everything is as torch has it from the logits alone.

    ties: scores that would be equal without rounding are common, so that torch may well have it otherwise.
    """
    tokens, experts = logits.shape
    draws = None
    if rule.startswith("stochastic"):
        draws = torch.rand(experts, generator=torch.Generator().manual_seed(seed))
    slots = bound(tokens, experts, k, tile_m)
    actual, scores = launch(logits, k, tile_m, rule, draws)

    true_scores, chosen = pair_scores(working(logits.double()), k)
    assert torch.equal(unpacked(actual.chosen, experts), chosen)
    # Roundings of z - top, which is up to 30, and of its exponent to base 2, of a sum and products; and fp32's least
    # normal number. An expert that no token chose reports none, and keeps none.
    wrong = (scores.double() - true_scores).abs() > 4e-6 * true_scores + 2e-38
    assert not wrong[:, chosen.any(dim=0)].any()

    expected = rounded(scores, chosen, draws, tile_m, rule, slots)
    for name, a, e in zip(Rounded._fields, actual, expected, strict=True):
        assert torch.equal(a, e), f"{name} of {rule}"
    routing = Routing(*actual[:5], actual.cu_slots, tokens)
    check_invariants(routing)
    counts = routing.cu_rows.diff()
    assert not (counts % tile_m).any() and ((counts - chosen.sum(0)).abs() < tile_m).all()
    by_torch = reference.token_rounding(logits, draws, k, tile_m, rule, slots)
    kept, of_torch = (unpacked(r.kept, experts) for r in (actual, by_torch))
    if rule != "stochastic_mass":
        assert torch.equal(actual.cu_rows, by_torch.cu_rows)
        assert ties or (kept != of_torch).sum() <= max(4, 1e-3 * float(kept.sum()))
    return all(torch.equal(a, e) for a, e in zip(actual[1:], by_torch[1:], strict=True))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("skew", [0.0, 1.0, 3.0])
def test_rules(rule: str, dtype: str, skew: float) -> None:
    check(skewed_logits(1000, 100, skew).to(DTYPES[dtype]), 3, 64, rule)


@pytest.mark.parametrize("experts", [1, 2, 8, 31, 32, 33, 100, 128, 256, 1000, MAX_EXPERTS])
@pytest.mark.parametrize("rule", ["nearest", "balanced", "stochastic_mass"])
def test_experts(experts: int, rule: str) -> None:
    for k in {1, min(2, experts), min(40, experts), experts if experts < 64 else 8}:
        check(skewed_logits(300, experts, 1.0), k, 16, rule)


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 37, 128, 1000, 24576])
@pytest.mark.parametrize("tile_m", [1, 8, 64, 128, 200])
@pytest.mark.parametrize("rule", RULES)
def test_tokens_and_tiles(tokens: int, tile_m: int, rule: str) -> None:
    check(skewed_logits(tokens, 12, 1.0), 2, tile_m, rule)


@pytest.mark.parametrize("rule", RULES)
def test_more_tokens_than_a_segment(rule: str) -> None:
    check(skewed_logits(70000, 5, 0.5), 1, 128, rule)


@pytest.mark.parametrize("tile_m", [300, 511, 1000, 3000])
@pytest.mark.parametrize("rule", ["up", "down", "stochastic_mass"])
def test_many_to_find(tile_m: int, rule: str) -> None:
    """More than threads of a CTA, and more than fit on its list."""
    check(skewed_logits(20000, 6, 0.7), 2, tile_m, rule)


@pytest.mark.parametrize("k", [1, 10, 12, 13, 40, 64])
@pytest.mark.parametrize("rule", ["nearest", "stochastic_mass"])
def test_many_experts(k: int, rule: str) -> None:
    """The two greatest logits of a lane are looked at first, or not; and half as many warps select."""
    check(skewed_logits(2000, 512, 0.5), k, 32, rule)
    logits = skewed_logits(300, 512, 0.5)
    # All of the K greatest are in the same lane's hands, or tied.
    logits[:100, 5::32] += 20
    logits[100:200] = tied_logits(100, 512, levels=3)
    check(logits, k, 16, rule, ties=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("tokens", [40, 3000])
def test_equal_scores(rule: str, tokens: int) -> None:
    """Only ties: of equal experts the lower one is chosen, of equal tokens the lower one is kept."""
    check(tied_logits(tokens, 6, levels=2), 2, 16, rule, ties=True)
    assert check(torch.zeros(tokens, 6), 2, 16, rule) or rule == "stochastic_mass"
    # All of an expert's keys in the same few threads' hands, or in none.
    logits = torch.zeros(tokens, 6)
    logits[::512] = 1 + torch.arange(6.0)
    check(logits, 2, 128, rule)


@pytest.mark.parametrize("rule", RULES)
def test_well_separated_scores_give_what_torch_gives(rule: str) -> None:
    """A permutation per expert of steps of 1 / 512, and one expert so far above that it makes every denominator."""
    generator = torch.Generator().manual_seed(1)
    tokens, experts = 1024, 9
    logits = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(experts)], dim=1) / 512.0
    logits[:, 4] = 30
    for k in (1, 2, 4):
        assert check(logits, k, 128, rule)


def test_the_rules_by_hand() -> None:
    logits = logits_of_counts([12, 4, 5, 3, 0, 8], 32)
    by_hand = {"nearest": [8, 0, 8, 0, 0, 8], "balanced": [8, 8, 8, 0, 0, 8], "up": [16, 8, 8, 8, 0, 8]}
    for rule, expected in {**by_hand, "down": [8, 0, 0, 0, 0, 8]}.items():
        assert route_token_rounding(logits.to(DEVICE), 1, tile_m=8, rule=rule).cu_rows.diff().tolist() == expected
        assert expected != [0] * 6


@pytest.mark.parametrize(("tokens", "experts", "k"), [(24576, 128, 8), (32768, 256, 16), (16384, 512, 10)])
@pytest.mark.parametrize("rule", ["nearest", "stochastic"])
def test_shapes_of_the_paper(tokens: int, experts: int, k: int, rule: str) -> None:
    check(skewed_logits(tokens, experts, 0.5), k, 128, rule)


@pytest.mark.parametrize("rule", RULES)
def test_not_finite(rule: str) -> None:
    logits = skewed_logits(100, 40)
    logits[0], logits[1, 1:], logits[2, 0], logits[3, 2] = -math.inf, -math.inf, math.nan, math.inf
    logits[4], logits[5, ::2], logits[6] = 0.0, -0.0, math.nan
    check(logits, 3, 16, rule)
    on_gpu = logits.to(DEVICE).requires_grad_()
    routing = route_token_rounding(on_gpu, 3, tile_m=16, rule=rule)
    gradient = torch.autograd.grad(routing.scores.square().sum(), on_gpu)[0]
    assert torch.isfinite(gradient).all() and not gradient[~torch.isfinite(on_gpu)].any()


def test_the_test_sees_a_wrong_result() -> None:
    """One pair exchanged for another of the same expert, zeros, or a flipped sign are not equal."""
    logits = skewed_logits(200, 8, 0.5)
    expected = reference.token_rounding(logits, None, 2, 16, "nearest", bound(200, 8, 2, 16))
    kept = unpacked(expected.kept, 8)
    swapped = kept.clone()
    swapped[kept[:, 0].nonzero()[0], 0], swapped[(~kept[:, 0]).nonzero()[0], 0] = False, True
    assert not torch.equal(swapped, kept) and torch.equal(swapped.sum(0), kept.sum(0))
    for wrong in (torch.zeros_like, torch.neg):
        for name in ("scores", "cu_rows", "row_token", "row_slot", "slot_row", "cu_slots", "chosen", "kept"):
            assert not torch.equal(wrong(getattr(expected, name)), getattr(expected, name)), name


@pytest.mark.parametrize("rule", RULES)
def test_two_runs_are_equal(rule: str) -> None:
    logits = skewed_logits(5000, 64, 1.0).to(DEVICE)
    logits[::3] = logits[0]
    runs = []
    for _ in range(3):
        leaf = logits.clone().requires_grad_()
        generator = torch.Generator(DEVICE).manual_seed(7)
        routing = route_token_rounding(leaf, 4, tile_m=64, rule=rule, generator=generator)
        runs.append((*routing[:6], torch.autograd.grad(routing.scores.square().sum(), leaf)[0]))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("rule", ["stochastic", "stochastic_mass"])
def test_draws(rule: str) -> None:
    """Those of the generator and no others; the same ones give the same routing, others another."""
    logits = skewed_logits(2000, 32, 0.5)
    on_gpu, seen = logits.to(DEVICE), set()
    for seed in range(4):
        state = torch.cuda.get_rng_state()
        generators = [torch.Generator(DEVICE).manual_seed(seed) for _ in range(3)]
        first, second = (route_token_rounding(on_gpu, 2, tile_m=64, rule=rule, generator=g) for g in generators[:2])
        assert torch.equal(state, torch.cuda.get_rng_state())
        assert all(torch.equal(a, b) for a, b in zip(first[:6], second[:6], strict=True))
        draws = torch.rand(32, device=DEVICE, generator=generators[2]).cpu()
        expected = reference.token_rounding(logits, draws, 2, 64, rule, first.scores.shape[0])
        assert torch.equal(first.cu_rows.cpu(), expected.cu_rows)
        seen.add(tuple(first.cu_rows.tolist()))
    assert len(seen) > 1
    torch.cuda.manual_seed(3)
    a = route_token_rounding(on_gpu, 2, tile_m=64, rule=rule)
    torch.cuda.manual_seed(3)
    assert torch.equal(a.cu_rows, route_token_rounding(on_gpu, 2, tile_m=64, rule=rule).cu_rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "k"), [(2, 2), (8, 2), (33, 5), (128, 8), (256, 16), (1000, 40), (MAX_EXPERTS, 8)])
@pytest.mark.parametrize("rule", ["up", "down"])
def test_gradients(dtype: str, experts: int, k: int, rule: str) -> None:
    """Of the pairs that are kept, against the same in fp64, row by row; unused slots' gradients are not read."""
    logits = skewed_logits(200, experts, 1.0).to(DTYPES[dtype])
    leaf = logits.to(DEVICE).requires_grad_()
    routing = route_token_rounding(leaf, k, tile_m=8, rule=rule)
    used = int(routing.cu_rows[-1])
    dscores = torch.randn(routing.scores.shape, generator=torch.Generator().manual_seed(0))
    dscores[used:] = math.nan
    (actual,) = torch.autograd.grad(routing.scores, leaf, dscores.to(DEVICE))
    assert actual.dtype == logits.dtype
    chosen = pair_scores(working(logits), k)[1]
    kept = torch.zeros(200, experts, dtype=torch.bool)
    expert = torch.repeat_interleave(torch.arange(experts), routing.cu_rows.diff().cpu().long())
    kept[routing.row_token[:used].cpu().long(), expert] = True
    words = [packed(bits) for bits in (chosen, kept)]
    truth = reference.token_rounding_backward(dscores.double(), logits.double(), routing.cu_slots.cpu(), *words)
    # What a row's terms add up to before they cancel: some roundings of that, and one of the result.
    weighted = (dscores * routing.scores.detach().cpu()).nan_to_num().abs()
    scale = torch.zeros(200).index_add(
        0, routing.row_token[:used].cpu(), weighted[routing.row_slot[:used].cpu().long()]
    )
    allowed = torch.finfo(logits.dtype).eps * truth.abs() + 4e-6 * scale.unsqueeze(1) + torch.finfo(logits.dtype).tiny

    def close(result: Tensor) -> bool:
        return bool(((result.double() - truth).abs() <= allowed).all())

    one_flipped = truth.clone()
    one_flipped[truth.abs().amax(dim=1).argmax()] *= -1
    assert not any(map(close, (torch.zeros_like(truth), -truth, one_flipped, truth * math.nan)))
    assert close(actual.cpu()) and not actual.cpu()[~kept.any(dim=1)].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("experts", "k"), [(33, 5), (256, 16)])
def test_gradients_are_added_to_others(dtype: str, experts: int, k: int) -> None:
    logits = skewed_logits(200, experts, 1.0).to(DEVICE, DTYPES[dtype])
    logits[0], logits[1, ::2], logits[2, 0] = -math.inf, -math.inf, math.nan
    rounded = ops.token_rounding(logits, None, k, 8, "nearest", bound(200, experts, k, 8), "cute")
    arguments = (torch.randn_like(rounded[0]), logits, *rounded[-3:])
    of_scores = ops.token_rounding_backward(*arguments, "cute")
    assert of_scores.abs().max() > 0.1
    there = torch.randn_like(logits)
    both, again = there.clone(), there.clone()
    for added in (both, again):
        ops.token_rounding_backward_add_(added, *arguments, "cute")
    assert torch.equal(both, again)
    within = torch.finfo(logits.dtype).eps * (there.abs() + 2 * of_scores.abs()).double() + 6e-8
    assert bool(((both.double() - (there.double() + of_scores.double())).abs() <= within).all())


@pytest.mark.parametrize("rule", DETERMINISTIC)
def test_gradients_of_the_whole(rule: str) -> None:
    """Against autograd in fp64 through torch's version, on logits whose order is beyond doubt."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.stack([torch.randperm(512, generator=generator) for _ in range(9)], dim=1) / 256.0
    weights = torch.randn(bound(512, 9, 3, 64), generator=generator)
    results = []
    for leaf in (logits.to(DEVICE), logits, logits.double()):
        leaf = leaf.clone().requires_grad_()
        routing = route_token_rounding(leaf, 3, tile_m=64, rule=rule)
        total = routing.scores @ weights.to(routing.scores)
        results.append(torch.autograd.grad(total, leaf)[0].cpu())
    some = results[2].abs().amax(dim=1) > 0
    assert_as_good("dlogits", *(r[some] for r in results), torch.float32)


def test_no_second_derivative() -> None:
    leaf = skewed_logits(64, 8).to(DEVICE).requires_grad_()
    scores = route_token_rounding(leaf, 2, tile_m=8).scores
    (gradient,) = torch.autograd.grad(scores.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="route_token_rounding has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(0, 8), (5, 3)])
def test_nothing_to_keep(shape: tuple[int, int]) -> None:
    for rule in RULES:
        routing = route_token_rounding(torch.randn(shape, device=DEVICE), 2, tile_m=8, rule=rule)
        check_invariants(routing)
        assert not routing.cu_rows.any() and not routing.scores.any()


@pytest.mark.parametrize(("experts", "dtype"), [(4096, torch.float32), (40, torch.float64)])
def test_what_has_no_kernel_is_left_to_torch(experts: int, dtype: torch.dtype) -> None:
    logits = skewed_logits(64, experts, 1.0).to(dtype)
    assert not ops.token_rounding_has_kernel(logits, 16, 64 * experts)
    actual, expected = (route_token_rounding(z, 8, tile_m=16) for z in (logits.to(DEVICE), logits))
    check_invariants(actual)
    assert torch.equal(actual.cu_rows.cpu(), expected.cu_rows)


def test_logits_in_another_layout() -> None:
    logits = skewed_logits(300, 20, 1.0).to(DEVICE)
    padded = torch.full((300, 23), math.nan, device=DEVICE)
    padded[:, 1:21] = logits
    a, b = (route_token_rounding(z, 2, tile_m=32) for z in (padded[:, 1:21], logits))
    assert all(torch.equal(x, y) for x, y in zip(a[:6], b[:6], strict=True))


@pytest.mark.unpoisoned
@pytest.mark.parametrize("rule", RULES)
def test_in_a_cuda_graph(rule: str) -> None:
    """Captured once, it serves every other batch of logits, also forward and backward together, with draws anew."""
    logits = skewed_logits(3000, 48, 1.0).to(DEVICE).requires_grad_()
    weights = torch.randn(bound(3000, 48, 4, 64), device=DEVICE)

    def step() -> tuple[Routing, Tensor]:
        routing = route_token_rounding(logits, 4, tile_m=64, rule=rule)
        return routing, torch.autograd.grad(routing.scores @ weights, logits)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing, gradient = step()
    counts = set()
    for seed in (1, 2):
        with torch.no_grad():
            logits.copy_(skewed_logits(3000, 48, 1.0, seed=seed))
        graph.replay()
        check_invariants(routing)
        counts.add(tuple(routing.cu_rows.tolist()))
        if rule in DETERMINISTIC:
            eager, eager_gradient = step()
            assert all(torch.equal(a, b) for a, b in zip(routing[:6], eager[:6], strict=True))
            assert torch.equal(gradient, eager_gradient)
    assert len(counts) == 2
    for _ in range(4):
        graph.replay()
        counts.add(tuple(routing.cu_rows.tolist()))
    assert (len(counts) == 2) == (rule in DETERMINISTIC)
