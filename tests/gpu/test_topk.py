"""Top-K on the GPU: ids against the reference on the CPU, by equality; scores and gradients against fp64."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from routing_cases import skewed_logits, tied_logits
from torch import Tensor

from sonicmoe import ops, reference, route_topk
from sonicmoe.jit import target
from sonicmoe.reference.scores import softmax
from sonicmoe.reference.topk import RENORMALIZE_EPSILON
from sonicmoe.routing import SCORINGS, check_invariants

DEVICE = "cuda"
INF, NAN = math.inf, math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXPERTS = (1, 2, 3, 31, 32, 33, 64, 100, 128, 256, 257, 512, 1000, 4096)
# exp(z - top) is as exact as z - top, of which half an eps is at most 20 here; and a few roundings more.
SCORE_TOLERANCE = 3e-6
# Of logits whose comparison needs a softmax or a sigmoid: neighbours that differ by a rounding may change places.
ROUNDING = 1e-6
MAY_CHANGE = 0.01


class Case(NamedTuple):
    """What an op takes besides logits."""

    k: int
    bias: Tensor | None = None
    scoring: str = "topk_softmax"
    renormalize: bool = False
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0

    @property
    def is_exact(self) -> bool:
        """Whether what is compared are the logits themselves."""
        by_sigmoid = self.scoring == "sigmoid" and self.top_groups < self.num_groups
        return not by_sigmoid and (self.bias is None or self.scoring == "topk_softmax")


def run(logits: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """(scores, ids) of the kernel, on the CPU; two runs are bitwise equal."""
    bias = None if case.bias is None else case.bias.to(DEVICE)
    arguments = (logits.to(DEVICE), *case._replace(bias=bias), "cute")
    scores, ids = ops.topk(*arguments)
    again = ops.topk(*arguments)
    assert torch.equal(scores, again[0]) and torch.equal(ids, again[1])
    assert scores.dtype == torch.float32 and ids.dtype == torch.int32
    return scores.cpu(), ids.cpu()


def as_double(logits: Tensor) -> Tensor:
    """What the logits count as: -inf for NaN, the largest number of fp32 for +inf; neither with a gradient."""
    return logits.double().nan_to_num(nan=-INF, posinf=torch.finfo(torch.float32).max, neginf=-INF)


def true_scores(z: Tensor, ids: Tensor, case: Case) -> Tensor:
    """Of given ids, in fp64, differentiable in z."""
    chosen = z.gather(1, ids.long())
    if case.scoring == "sigmoid":
        scores = chosen.sigmoid()
    else:
        scores = softmax(chosen) if case.scoring == "topk_softmax" else softmax(z).gather(1, ids.long())
    if case.renormalize and case.scoring != "topk_softmax":
        scores = scores / (scores.sum(dim=1, keepdim=True) + RENORMALIZE_EPSILON)
    return scores * case.scale


def close(actual: Tensor, truth: Tensor) -> bool:
    # Below the normal numbers of fp32 anything goes.
    return torch.allclose(actual.double(), truth, rtol=SCORE_TOLERANCE, atol=1e-37)


def why_wrong_gradient(actual: Tensor, truth: Tensor, dscores: Tensor, case: Case, dtype: torch.dtype) -> str | None:
    """A token's error relative to its gradient, with some eps of what cancels in it."""
    error = (actual.double() - truth).norm(dim=1)
    # The smallest steps of fp16 are 6e-8.
    cancelled = 4e-6 * abs(case.scale) * dscores.double().norm(dim=1)
    allowed = 2 * torch.finfo(dtype).eps * truth.norm(dim=1) + cancelled + truth.shape[1] ** 0.5 * 6e-8
    worst = (error - allowed).argmax() if error.numel() else 0
    return (
        None if bool((error <= allowed).all()) else f"token {worst}: {error[worst]:.3g}, allowed {allowed[worst]:.3g}"
    )


def check_ids(logits: Tensor, ids: Tensor, case: Case) -> None:
    _, expected = reference.topk(logits, *case)
    if case.is_exact:
        assert torch.equal(ids, expected)
        return
    differ = (ids != expected).any(dim=1)
    assert differ.double().mean() <= MAY_CHANGE
    if case.num_groups == 1 and case.bias is not None:
        z = as_double(logits)
        compared = (z.sigmoid() if case.scoring == "sigmoid" else softmax(z)) + case.bias.double()
        of_ids, of_expected = (compared.gather(1, i.long()) for i in (ids, expected))
        assert (of_ids - of_expected)[differ].abs().max() <= ROUNDING if bool(differ.any()) else True


def check_gradients(logits: Tensor, ids: Tensor, case: Case) -> None:
    dscores = torch.randn(ids.shape, generator=torch.Generator().manual_seed(5))
    leaf = logits.double().requires_grad_()
    (truth,) = torch.autograd.grad(true_scores(as_double(leaf), ids, case), leaf, dscores.double())
    arguments = (dscores.to(DEVICE), ids.to(DEVICE), logits.to(DEVICE), case.scoring, case.renormalize, case.scale)
    on_gpu = ops.topk_backward(*arguments, "cute")
    assert torch.equal(on_gpu, ops.topk_backward(*arguments, "cute")) and on_gpu.dtype == logits.dtype
    actual = on_gpu.cpu()
    if truth.numel() and truth.abs().amax() > 1e-3:
        for wrong in (torch.zeros_like(truth), -truth, truth.roll(1, 1) if truth.shape[1] > 1 else -truth):
            assert why_wrong_gradient(wrong, truth, dscores, case, logits.dtype) is not None
    assert (why := why_wrong_gradient(actual, truth, dscores, case, logits.dtype)) is None, why
    if case.scoring != "softmax_topk":
        assert not actual.scatter(1, ids.long(), 0).any()


def check(logits: Tensor, case: Case) -> None:
    """Ids, scores and gradients."""
    scores, ids = run(logits, case)
    assert scores.shape == ids.shape == (logits.shape[0], case.k)
    check_ids(logits, ids, case)
    truth = true_scores(as_double(logits), ids, case)
    if truth.numel() and truth.max() > 0:
        for wrong in (torch.zeros_like(truth), -truth, truth * (1 + 2 * SCORE_TOLERANCE), truth.roll(1, 0) + 1e-3):
            assert not close(wrong, truth)
    assert close(scores, truth)
    check_gradients(logits, ids, case)


def shapes() -> list[Any]:
    """Every number of experts, few and many of them chosen, with kinds and dtypes in turns."""
    found: list[Any] = []
    for experts in EXPERTS:
        tops = {1, min(experts, 8), min(experts, 64), min(experts, 128) if experts <= 128 or experts == 4096 else 33}
        for top in sorted(tops):
            i = len(found)
            found.append((experts, top, SCORINGS[i % 3], DTYPES[i // 3 % 3], i % 2 == 0))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(("experts", "k"), [(33, 5), (128, 40)])
def test_gradients_are_added_to_others(experts: int, k: int, scoring: str, dtype: torch.dtype) -> None:
    logits = skewed_logits(100, experts).to(DEVICE, dtype)
    logits[0], logits[1, ::2], logits[2, 0] = -INF, -INF, INF
    scores, ids = ops.topk(logits, k, None, scoring, True, 1, 1, 2.5, "cute")
    arguments = (torch.randn_like(scores), ids, logits, scoring, True, 2.5)
    of_scores = ops.topk_backward(*arguments, "cute")
    assert of_scores.any()
    there = torch.randn_like(logits)
    both = there.clone()
    ops.topk_backward_add_(both, *arguments, "cute")
    again = there.clone()
    ops.topk_backward_add_(again, *arguments, "cute")
    assert torch.equal(both, again)
    within = torch.finfo(dtype).eps * (there.abs() + 2 * of_scores.abs()).double() + 6e-8
    assert bool(((both.double() - (there.double() + of_scores.double())).abs() <= within).all())


@pytest.mark.parametrize(("experts", "k", "scoring", "dtype", "renormalize"), shapes())
def test_shapes(experts: int, k: int, scoring: str, dtype: torch.dtype, renormalize: bool) -> None:
    case = Case(k, scoring=scoring, renormalize=renormalize)
    tokens = 37 if experts > 500 else 201
    check(skewed_logits(tokens, experts).to(dtype), case)
    check(tied_logits(tokens, experts).to(dtype), case)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (8, 3), (32, 32), (32, 9)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_way(biased: bool, groups: tuple[int, int], scoring: str, renormalize: bool) -> None:
    bias = torch.linspace(-0.3, 0.3, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(2))]
    case = Case(6, bias if biased else None, scoring, renormalize, *groups, scale=2.5)
    check(skewed_logits(300, 64, skew=0.5), case)
    if not biased:
        check(tied_logits(300, 64), case)


@pytest.mark.parametrize("experts", [33, 100, 160, 256, 1000, 4096])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_any_size(experts: int, scoring: str, dtype: torch.dtype) -> None:
    num_groups = {33: 3, 100: 4, 160: 8, 256: 8, 1000: 25, 4096: 32}[experts]
    bias = 0.1 * torch.randn(experts, generator=torch.Generator().manual_seed(3))
    for given in (None, bias):
        check(skewed_logits(50, experts, skew=0.5).to(dtype), Case(8, given, scoring, True, num_groups, 2))


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 1000])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_tokens(tokens: int, scoring: str) -> None:
    check(skewed_logits(tokens, 128), Case(8, scoring=scoring))


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("experts", [6, 33, 128, 1000])
def test_not_finite(experts: int, dtype: torch.dtype, scoring: str) -> None:
    logits = skewed_logits(8, experts).to(dtype)
    logits[0] = -INF
    logits[1] = NAN
    logits[2] = INF
    logits[3, 1:] = -INF
    logits[4, ::2] = NAN
    logits[5, ::3] = INF
    logits[6, :3] = torch.tensor([INF, NAN, -INF])
    bias = torch.linspace(-0.5, 0.5, experts)
    bias[-1] = NAN
    for case in (Case(5, None, scoring), Case(5, None, scoring, True, experts // 3 if experts < 40 else 2, 1)):
        if case.k <= experts // case.num_groups * case.top_groups:
            check(logits, case)
    scores, ids = run(logits, Case(5, bias, scoring))
    assert torch.equal(ids, reference.topk(logits, *Case(5, bias, scoring))[1])
    assert torch.isfinite(scores).all() and not scores[:2].any()


@pytest.mark.parametrize("scoring", SCORINGS)
def test_ties_zeros_and_neighbouring_floats(scoring: str) -> None:
    low = torch.tensor(20.0)
    row = torch.tensor([0.0, -0.0] * 16 + [low, low, torch.nextafter(low, torch.tensor(INF)), -0.0])
    tiny = torch.tensor([1e-45, 0.0, 2e-45, -1e-45, -0.0, 1e-45, -2e-45, 0.0] * 8)
    for logits in (row.repeat(3, 1), tiny.repeat(3, 1), torch.zeros(3, 600), torch.zeros(3, 600).neg()):
        case = Case(36 if logits.shape[1] == 36 else 8, scoring=scoring)
        scores, ids = run(logits, case)
        assert torch.equal(ids, reference.topk(logits, *case)[1])
        assert close(scores, true_scores(as_double(logits), ids, case))


def test_the_comparison_finds_wrong_ids() -> None:
    logits = skewed_logits(50, 20)
    _, ids = run(logits, Case(4))
    for wrong in (ids.flip(1), (ids + 1) % 20, torch.zeros_like(ids)):
        with pytest.raises(AssertionError):
            check_ids(logits, wrong, Case(4))


@pytest.mark.parametrize("scoring", SCORINGS)
def test_route_topk_takes_the_kernels(scoring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"scoring": scoring, "renormalize": True, "num_groups": 4, "top_groups": 2, "scale": 1.5}
    logits = skewed_logits(100, 32).requires_grad_()
    expected = route_topk(logits, 3, bias=torch.zeros(32), **options)
    dscores = torch.randn(300, generator=torch.Generator().manual_seed(6))
    (truth,) = torch.autograd.grad(expected.scores, logits, dscores)
    monkeypatch.delattr(reference, "topk")
    on_gpu = logits.detach().to(DEVICE).requires_grad_()
    routing = route_topk(on_gpu, 3, bias=torch.zeros(32, device=DEVICE), **options)
    check_invariants(routing)
    torch.testing.assert_close(routing.scores.cpu(), expected.scores, rtol=1e-5, atol=1e-7)
    (actual,) = torch.autograd.grad(routing.scores, on_gpu, dscores.to(DEVICE), create_graph=True)
    torch.testing.assert_close(actual.cpu(), truth, rtol=1e-4, atol=1e-6)
    assert truth.abs().max() > 0.01
    with pytest.raises(RuntimeError, match="route_topk has no second derivative"):
        actual.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "experts", "k", "groups"),
    [
        (torch.float64, 64, 4, (1, 1)),
        (torch.float32, 4097, 4, (1, 1)),
        (torch.float32, 256, 129, (1, 1)),
        (torch.float32, 64, 1, (64, 2)),
    ],
)
def test_the_rest_is_computed_by_torch(dtype: torch.dtype, experts: int, k: int, groups: tuple[int, int]) -> None:
    logits = skewed_logits(20, experts).to(dtype)
    routing, expected = (route_topk(z, k, num_groups=groups[0], top_groups=groups[1]) for z in (logits.cuda(), logits))
    assert torch.equal(routing.slot_row.cpu(), expected.slot_row)
    torch.testing.assert_close(routing.scores.cpu(), expected.scores)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_that_start_anywhere(dtype: torch.dtype) -> None:
    wide = skewed_logits(40, 24).to(dtype)
    odd = wide.flatten()[1 : 1 + 16 * 40].view(40, 16)
    for logits in (wide[:, 4:20], odd, wide[::2]):
        scores, ids = (t.cpu() for t in ops.topk(logits.to(DEVICE), *Case(4), "cute"))
        on_gpu = wide.to(DEVICE).flatten()[1 : 1 + 16 * 40].view(40, 16)
        if logits is odd:
            scores, ids = (t.cpu() for t in ops.topk(on_gpu, *Case(4), "cute"))
        check_ids(logits, ids, Case(4))
        assert close(scores, true_scores(as_double(logits), ids, Case(4)))


def test_writes_nothing_else() -> None:
    """The bytes around what the kernels write, which comes from one buffer each, stay as they were."""
    from sonicmoe import jit
    from sonicmoe.cute_kernels.topk import TopKBackwardSpec, TopKSpec

    tokens, experts, top, guard = 37, 33, 5, 16
    inside = slice(guard, -guard)
    logits = skewed_logits(tokens, experts).to(DEVICE)
    scores = torch.full((tokens + 2 * guard, top), NAN, device=DEVICE)
    ids = torch.full((tokens + 2 * guard, top), -7, dtype=torch.int32, device=DEVICE)
    dlogits = torch.full((tokens + 2 * guard, experts), NAN, device=DEVICE)
    jit.launch(TopKSpec(experts, top, "fp32"), logits, None, scores[inside], ids[inside])
    backward = TopKBackwardSpec(experts, top, "fp32", "softmax_topk")
    jit.launch(backward, scores[inside], ids[inside], logits, dlogits[inside])
    assert ((ids[inside] >= 0) & (ids[inside] < experts)).all()
    assert (ids[:guard] == -7).all() and (ids[-guard:] == -7).all()
    for t in (scores, dlogits):
        assert not t[inside].isnan().any()
        assert t[:guard].isnan().all() and t[-guard:].isnan().all()


def test_logits_past_2_31_elements() -> None:
    experts = 4096
    tokens = (1 << 31) // experts + 8
    logits = torch.zeros(tokens, experts, dtype=torch.bfloat16, device=DEVICE)
    logits[-4:] = skewed_logits(4, experts).to(DEVICE, torch.bfloat16)
    scores, ids = ops.topk(logits, *Case(2), "cute")
    _, expected = reference.topk(logits[-4:].cpu(), *Case(2))
    assert torch.equal(ids[-4:].cpu(), expected) and torch.equal(ids[0].cpu(), torch.tensor([0, 1], dtype=torch.int32))
    dlogits = ops.topk_backward(scores, ids, logits, "topk_softmax", False, 1.0, "cute")
    part = ops.topk_backward(scores[-4:], ids[-4:], logits[-4:], "topk_softmax", False, 1.0, "cute")
    assert torch.equal(dlogits[-4:], part) and part.any()


@pytest.mark.unpoisoned
def test_torch_compile_and_cuda_graph() -> None:
    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = route_topk(logits.sin(), 4, scoring="softmax_topk", renormalize=True)
        return routing.scores, routing.slot_row

    torch._dynamo.reset()
    target._capabilities.clear()  # nor may what an eager call notes make it compile again
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for tokens in (9, 40, 300):
        logits = skewed_logits(tokens, 64).to(DEVICE).requires_grad_()
        actual, expected = compiled(logits), call(logits)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        weight = torch.linspace(-1, 1, tokens * 4, device=DEVICE)
        gradients = [torch.autograd.grad(out[0], logits, weight)[0] for out in (actual, expected)]
        torch.testing.assert_close(*gradients)
        assert gradients[0].any()
        counts.append(counter.frame_count)
    assert counts[1:] == counts[:1] * 2

    static = skewed_logits(300, 64).to(DEVICE)
    ops.topk(static, *Case(4), "cute")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.topk(static, *Case(4), "cute")
    static.copy_(skewed_logits(300, 64, seed=9))
    graph.replay()
    for a, b in zip(captured, ops.topk(static, *Case(4), "cute"), strict=True):
        assert torch.equal(a, b)
