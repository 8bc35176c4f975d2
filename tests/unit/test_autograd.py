"""The autograd Function: derivatives, what runs, what is kept, and what surrounds it in training."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import Weights, build_routing, build_weights, ragged_assigned, top_k_assigned
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sonicmoe import GPT_OSS, Routing, moe_experts, ops
from sonicmoe.activations import NAMES

T, E, K, H, I = 7, 4, 2, 6, 5  # noqa: E741


class Problem:
    """A layer's leaves, and the layer as a function of them."""

    def __init__(
        self,
        activation: str = "swiglu",
        w1_layout: str = "concat",
        ragged: bool = False,
        bias: bool = True,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        assigned = ragged_assigned(T, E) if ragged else top_k_assigned(T, E, K)
        self.weights = build_weights(T, E, H, I, activation, bias=bias, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        self.routing = build_routing(assigned, E, padding=4 if ragged else 0, dtype=wide)
        self.routing.scores.requires_grad_()
        self.options: dict[str, Any] = {"activation": activation, "w1_layout": w1_layout}

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = self.weights._asdict() | {"scores": self.routing.scores}
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def run(self, leaves: dict[str, Tensor] | None = None, **options: Any) -> Tensor:
        given = dict(self.leaves if leaves is None else leaves)
        routing = self.routing._replace(scores=given.pop("scores"))
        return moe_experts(**given, routing=routing, **self.options, **options)


@pytest.mark.parametrize("activation", [*NAMES, str(GPT_OSS), "swiglu(alpha=1.702,limit=0.8,up_offset=1.0)"])
@pytest.mark.parametrize("ragged", [False, True])
def test_gradcheck(activation: str, ragged: bool) -> None:
    problem = Problem(activation, ragged=ragged)
    names = list(problem.leaves)

    def layer(*leaves: Tensor) -> Tensor:
        return problem.run(dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(layer, tuple(problem.leaves.values()), fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh"])
def test_gradcheck_interleaved(activation: str) -> None:
    problem = Problem(activation, w1_layout="interleaved", ragged=True)
    names = list(problem.leaves)

    def layer(*leaves: Tensor) -> Tensor:
        return problem.run(dict(zip(names, leaves, strict=True)))

    assert torch.autograd.gradcheck(layer, tuple(problem.leaves.values()), fast_mode=False, atol=1e-6)


class _Recorder(TorchDispatchMode):
    """The names of the sonicmoe ops that run, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sonicmoe":
            self.names.append(func._schema.name.removeprefix("sonicmoe::"))
        return func(*args, **(kwargs or {}))


FORWARD = ["up_proj", "down_proj", "aggregate"]


@pytest.mark.parametrize(
    ("required", "backward"),
    [
        ("x w1 w2 scores", "down_dgrad up_dgrad down_wgrad_aggregate_ up_wgrad"),
        ("x w1 w2 b1 b2 scores", "bias_grad down_dgrad up_dgrad down_wgrad_aggregate_ up_wgrad bias_grad"),
        ("x scores", "down_dgrad up_dgrad aggregate"),
        ("x", "down_dgrad up_dgrad aggregate"),
        ("x w2", "down_dgrad up_dgrad down_wgrad_aggregate_"),
        ("w1", "down_dgrad up_wgrad"),
        ("w2", "down_dgrad down_wgrad"),
        ("w1 w2", "down_dgrad down_wgrad up_wgrad"),
        ("scores", "down_dgrad"),
        ("b1", "down_dgrad bias_grad"),
        ("b2", "bias_grad"),
    ],
)
@pytest.mark.parametrize("ragged", [False, True])
def test_only_what_is_required_runs_and_is_right(required: str, backward: str, ragged: bool) -> None:
    problem = Problem(ragged=ragged)
    do = torch.randn(T, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    full = dict(zip(problem.leaves, torch.autograd.grad(problem.run(), list(problem.leaves.values()), do), strict=True))
    wanted = required.split()
    leaves = {n: leaf.detach().requires_grad_(n in wanted) for n, leaf in problem.leaves.items()}
    with _Recorder() as recorder:
        problem.run(leaves).backward(do)
    assert recorder.names == FORWARD + backward.split()
    for name, leaf in leaves.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, full[name])
        else:
            assert leaf.grad is None


def _kept(problem: Problem, leaves: dict[str, Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        problem.run(leaves)
    return kept


def test_keeps_x_h_weights_and_routing_only() -> None:
    problem = Problem()
    leaves = problem.leaves
    own = {t.data_ptr() for t in (*leaves.values(), *problem.routing[:-1]) if t is not None}
    kept = _kept(problem, leaves)
    new = [tuple(t.shape) for t in kept if t.data_ptr() not in own]
    assert new == [(T * K, 2 * I)], "h alone is new"


@pytest.mark.parametrize(("frozen", "dropped"), [("w1", "x"), ("x", "w1")])
def test_what_a_frozen_tensor_makes_needless_is_not_kept(frozen: str, dropped: str) -> None:
    problem = Problem()
    leaves = {n: leaf.detach().requires_grad_(n != frozen) for n, leaf in problem.leaves.items()}
    assert leaves[dropped].data_ptr() not in {t.data_ptr() for t in _kept(problem, leaves)}


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "nothing requires grad"])
def test_h_is_not_made_where_nothing_is_differentiated(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    leaves = problem.leaves
    expected = problem.run()
    shapes = []
    up_proj = ops.bodies.up_proj

    def spy(*args: Any) -> Any:
        h, a = up_proj(*args)
        shapes.append(tuple(h.shape))
        return h, a

    monkeypatch.setattr(ops.bodies, "up_proj", spy)
    if how == "nothing requires grad":
        o = problem.run({n: leaf.detach() for n, leaf in leaves.items()})
    else:
        with getattr(torch, how)():
            o = problem.run()
    assert shapes == [(0, 2 * I)]
    assert not o.requires_grad
    torch.testing.assert_close(o, expected.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("required", ["x", "b1", "w2", "scores"])
@pytest.mark.parametrize("linear", [False, True])
def test_differentiating_twice_raises(required: str, linear: bool) -> None:
    """Also where the gradient of o requires none itself, and where the rest of the graph is twice differentiable."""
    problem = Problem()
    leaves = {n: leaf.detach().requires_grad_(n == required) for n, leaf in problem.leaves.items()}
    leaf = leaves[required]
    o = problem.run(leaves)
    (gradient,) = torch.autograd.grad(o.sum() if linear else o.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_experts has no second derivative"):
        (gradient.square().sum() + leaf.square().sum()).backward()
    o = problem.run(leaves)
    (gradient,) = torch.autograd.grad(o.sum() if linear else o.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_experts has no second derivative"):
        torch.autograd.grad(gradient.square().sum() + leaf.square().sum(), leaf)


def test_create_graph_alone_gives_the_same_gradient() -> None:
    problem = Problem()
    x = problem.leaves["x"]
    (dx,) = torch.autograd.grad(problem.run().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(problem.run().sum(), x)
    torch.testing.assert_close(dx.detach(), expected, rtol=0, atol=0)


def test_create_graph_where_all_gradients_go_to_buffers() -> None:
    problem, plain = Problem(), Problem()
    leaves = {n: leaf.detach().requires_grad_(n in ("w1", "w2")) for n, leaf in problem.leaves.items()}
    buffers = {f"{n}_grad": torch.zeros(leaves[n].shape, dtype=torch.float32) for n in ("w1", "w2")}
    problem.run(leaves, **buffers).sum().backward(create_graph=True)
    expected = torch.autograd.grad(plain.run().sum(), [plain.leaves["w1"], plain.leaves["w2"]])
    for buffer, gradient in zip(buffers.values(), expected, strict=True):
        assert gradient.abs().max() > 0.1
        torch.testing.assert_close(buffer.to(gradient), gradient, rtol=1e-6, atol=1e-6)
    assert leaves["w1"].grad is None


class TestDhInThePlaceOfH:
    """Where this is h's last use, and only there: a second backward and what others keep must still find h."""

    @staticmethod
    def _used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        used: list[str] = []

        def spy(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *arguments: (used.append(name), body(*arguments))[1]

        for name in ("down_dgrad", "down_dgrad_"):
            monkeypatch.setattr(ops.bodies, name, spy(name, getattr(ops.bodies, name)))
        return used

    def test_by_a_plain_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used, problem = self._used(monkeypatch), Problem(ragged=True)
        problem.run().sum().backward()
        assert used == ["down_dgrad_"]

    def test_by_the_last_of_two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used, problem = self._used(monkeypatch), Problem(ragged=True)
        leaves, o = list(problem.leaves.values()), problem.run().square().sum()
        first = torch.autograd.grad(o, leaves, retain_graph=True)
        second = torch.autograd.grad(o, leaves, retain_graph=True)
        third = torch.autograd.grad(o, leaves)
        assert used == ["down_dgrad", "down_dgrad", "down_dgrad_"]
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third, strict=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(o, leaves)

    def test_not_under_create_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used, problem = self._used(monkeypatch), Problem()
        torch.autograd.grad(problem.run().sum(), problem.leaves["x"], create_graph=True)
        assert used == ["down_dgrad"]

    def test_not_where_hooks_see_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        used, problem, kept = self._used(monkeypatch), Problem(), []

        def pack(t: Tensor) -> tuple[Tensor, Tensor]:
            kept.append((t, t.clone()))
            return kept[-1]

        with saved_tensors_hooks(pack, lambda pair: pair[0]):
            o = problem.run()
        o.sum().backward()
        assert used == ["down_dgrad"] and len(kept) > 5
        assert all(torch.equal(t, before) for t, before in kept)

    @pytest.mark.parametrize(("reentrant", "name"), [(False, "down_dgrad"), (True, "down_dgrad_")])
    def test_of_a_checkpoint(self, monkeypatch: pytest.MonkeyPatch, reentrant: bool, name: str) -> None:
        used, problem = self._used(monkeypatch), Problem()
        names = list(problem.leaves)

        def layer(*leaves: Tensor) -> Tensor:
            return problem.run(dict(zip(names, leaves, strict=True)))

        checkpoint(layer, *problem.leaves.values(), use_reentrant=reentrant).sum().backward()
        assert used == [name]


@pytest.mark.parametrize("frozen", ["", "w2"])
def test_what_a_backward_has_read_is_freed_under_a_checkpoint(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When dx's rows are allocated: h, which nobody else holds there, and a_s where w2's gradient is not wanted."""
    problem, alive = Problem(), []
    leaves = {n: leaf.detach().requires_grad_(n != frozen) for n, leaf in problem.leaves.items()}
    down_dgrad, up_dgrad = ops.bodies.down_dgrad, ops.bodies.up_dgrad
    seen: list[weakref.ref[Tensor]] = []

    def first(*arguments: Any) -> Any:
        dh, a_s, parts = down_dgrad(*arguments)
        seen.extend(map(weakref.ref, (arguments[3], a_s)))
        return dh, a_s, parts

    def then(*arguments: Any) -> Any:
        alive.extend(r() is not None for r in seen)
        return up_dgrad(*arguments)

    monkeypatch.setattr(ops.bodies, "down_dgrad", first)
    monkeypatch.setattr(ops.bodies, "up_dgrad", then)
    checkpoint(lambda *_: problem.run(leaves), *leaves.values(), use_reentrant=False).sum().backward()
    assert alive == [False, frozen != "w2"]


def _surroundings() -> dict[str, Callable[[Problem], Tensor]]:
    def on_cpu(problem: Problem) -> Tensor:
        with save_on_cpu():
            return problem.run()

    def recomputed(problem: Problem, reentrant: bool) -> Tensor:
        names = list(problem.leaves)

        def layer(*leaves: Tensor) -> Tensor:
            return problem.run(dict(zip(names, leaves, strict=True)))

        return checkpoint(layer, *problem.leaves.values(), use_reentrant=reentrant)

    return {
        "save_on_cpu": on_cpu,
        "checkpoint": lambda problem: recomputed(problem, False),
        "reentrant checkpoint": lambda problem: recomputed(problem, True),
    }


@pytest.mark.parametrize("surrounding", list(_surroundings()))
def test_surroundings_change_nothing(surrounding: str) -> None:
    plain, surrounded = Problem(ragged=True), Problem(ragged=True)
    plain.run().square().sum().backward()
    _surroundings()[surrounding](surrounded).square().sum().backward()
    for name, leaf in plain.leaves.items():
        torch.testing.assert_close(surrounded.leaves[name].grad, leaf.grad, rtol=0, atol=0)


def test_two_runs_are_bitwise_equal_also_if_determinism_is_asked_for() -> None:
    def gradients() -> list[Tensor]:
        problem = Problem(ragged=True, dtype=torch.bfloat16)
        problem.run().float().square().sum().backward()
        return [leaf.grad for leaf in problem.leaves.values() if leaf.grad is not None]

    first = gradients()
    assert len(first) == 6
    torch.use_deterministic_algorithms(True)
    try:
        second = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("w1_layout", ["concat", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_gradients_add_into_fp32_buffers(w1_layout: str, dtype: torch.dtype) -> None:
    plain = Problem(w1_layout=w1_layout, ragged=True, dtype=dtype)
    wide = Problem(w1_layout=w1_layout, ragged=True, dtype=dtype)
    do = torch.randn(T, H, generator=torch.Generator().manual_seed(3)).to(dtype)
    plain.run().backward(do)
    w1_grad = torch.full_like(plain.weights.w1, 3.0, dtype=torch.float32, requires_grad=False)
    w2_grad = torch.full_like(plain.weights.w2, -2.0, dtype=torch.float32, requires_grad=False)
    for _ in range(2):
        wide.run(w1_grad=w1_grad, w2_grad=w2_grad).backward(do)
    assert wide.weights.w1.grad is None and wide.weights.w2.grad is None
    eps = torch.finfo(dtype).eps
    assert plain.weights.w1.grad is not None and plain.weights.w2.grad is not None
    torch.testing.assert_close((w1_grad - 3.0) / 2, plain.weights.w1.grad.float(), rtol=eps, atol=2e-6)
    torch.testing.assert_close((w2_grad + 2.0) / 2, plain.weights.w2.grad.float(), rtol=eps, atol=2e-6)
    assert plain.weights.w1.grad.abs().max() > 0.1 and plain.weights.w2.grad.abs().max() > 0.1


def test_a_buffer_of_a_frozen_weight_is_left_alone() -> None:
    problem = Problem()
    w1_grad = torch.ones(E, 2 * I, H)
    leaves = {n: leaf.detach().requires_grad_(n != "w1") for n, leaf in problem.leaves.items()}
    problem.run(leaves, w1_grad=w1_grad).sum().backward()
    assert torch.equal(w1_grad, torch.ones(E, 2 * I, H))
    assert leaves["w2"].grad is not None


def test_autograd_notices_a_buffer_that_was_added_to() -> None:
    problem = Problem(dtype=torch.float32)
    w2_grad = torch.zeros(E, H, I)
    version = w2_grad._version
    problem.run(w2_grad=w2_grad).sum().backward()
    assert w2_grad._version > version


def test_no_tokens_give_empty_output_and_zero_weight_gradients() -> None:
    weights = build_weights(0, E, H, I, "swiglu", bias=True)
    routing = build_routing([], E, dtype=torch.float64)
    routing.scores.requires_grad_()
    o = moe_experts(weights.x, weights.w1, weights.w2, routing, weights.b1, weights.b2)
    assert o.shape == (0, H)
    o.sum().backward()
    assert weights.x.grad is not None and weights.x.grad.shape == (0, H)
    assert routing.scores.grad is not None and routing.scores.grad.shape == (0,)
    for weight in weights[1:]:
        assert weight is not None and weight.grad is not None
        assert torch.equal(weight.grad, torch.zeros_like(weight))


class TestAutocast:
    """x and the fp32 master weights are cast as torch.nn.Linear casts them."""

    @staticmethod
    def _cast(problem: Problem, dtype: torch.dtype) -> tuple[Weights, Routing]:
        cast = Weights(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in problem.weights))
        return cast, problem.routing._replace(scores=problem.routing.scores.detach().requires_grad_())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("backward_inside", [False, True])
    def test_is_the_layer_in_that_dtype_with_fp32_gradients(self, dtype: torch.dtype, backward_inside: bool) -> None:
        problem = Problem(dtype=torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            o = problem.run()
            if backward_inside:
                o.float().square().sum().backward()
        if not backward_inside:
            o.float().square().sum().backward()
        cast, routing = self._cast(problem, dtype)
        expected = moe_experts(cast.x, cast.w1, cast.w2, routing, cast.b1, cast.b2)
        expected.float().square().sum().backward()
        assert o.dtype == dtype
        assert torch.equal(o, expected)
        for master, leaf in zip(problem.weights, cast, strict=True):
            assert master is not None and leaf is not None and master.grad is not None and leaf.grad is not None
            assert master.grad.dtype == torch.float32
            assert torch.equal(master.grad, leaf.grad.float())
        assert problem.routing.scores.grad is not None
        torch.testing.assert_close(problem.routing.scores.grad, routing.scores.grad, rtol=0, atol=0)

    def test_fp64_stays_as_with_linear(self) -> None:
        problem = Problem()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o = problem.run()
        assert o.dtype == torch.float64
        assert torch.equal(o, problem.run())

    def test_mixed_dtypes_that_autocast_unites_are_accepted(self) -> None:
        problem = Problem(dtype=torch.float32)
        leaves = problem.leaves | {"x": problem.leaves["x"].detach().bfloat16()}
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert problem.run(leaves).dtype == torch.bfloat16
