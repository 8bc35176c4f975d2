"""Grouped products with any function between them: gradients, padding, parameters of the function, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from strategies import build_routing, build_weights, ragged_assigned
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sonicmoe import Activation, InvalidArgument, moe_experts, ops
from sonicmoe.activations import GATED, NAMES
from sonicmoe.integrations.between import check_weight, experts_with, gather_rows, sum_rows
from sonicmoe.integrations.recognise import recognise
from sonicmoe.reference.activation import act

T, E, H, I = 9, 5, 8, 6  # noqa: E741


def problem(activation: str = "swiglu") -> tuple[list[Tensor], list[list[int]]]:
    assigned = ragged_assigned(T, E)
    made = build_weights(T, E, H, I, activation, bias=True)
    return [t for t in made if t is not None], assigned


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "relu2"])
def test_the_same_as_fused(activation: str) -> None:
    (x, w1, w2, b1, b2), assigned = problem(activation)
    routing = build_routing(assigned, E, padding=4, dtype=torch.float64)
    scores = routing.scores.requires_grad_()
    kind = Activation.parse(activation)
    ours = experts_with(lambda h: act(kind, h), x, w1, w2, routing, b1, b2, backend="torch")
    fused = moe_experts(x, w1, w2, routing, b1, b2, activation=activation)
    torch.testing.assert_close(ours, fused)
    leaves = (x, w1, w2, b1, b2, scores)
    pattern = torch.randn(ours.shape, generator=torch.Generator().manual_seed(4), dtype=ours.dtype)
    got, want = (torch.autograd.grad((o * pattern).sum(), leaves) for o in (ours, fused))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
        assert w.abs().max() > 0.01


def test_gradcheck_with_a_function_and_a_norm_that_have_parameters() -> None:
    leaves, assigned = problem()
    routing = build_routing(assigned, E, padding=4, dtype=torch.float64)
    slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    norm = nn.RMSNorm(H, dtype=torch.float64)

    def layer(*given: Tensor) -> Tensor:
        x, w1, w2, b1, b2, scores, s, weight = given

        def function(h: Tensor) -> Tensor:
            gate, up = h.chunk(2, dim=-1)
            return torch.tanh(s * gate) * up + s

        def after(y: Tensor) -> Tensor:
            return nn.functional.rms_norm(y, (H,), weight, 1e-5)

        r = routing._replace(scores=scores)
        return experts_with(function, x, w1, w2, r, b1, b2, after_down=after, backend="torch")

    given = (*leaves, routing.scores.requires_grad_(), slope, norm.weight)
    assert torch.autograd.gradcheck(layer, given, fast_mode=True)
    assert layer(*given).abs().max() > 0.1


def test_gathering_and_summing_rows() -> None:
    (x, *_), assigned = problem()
    routing = build_routing(assigned, E, dtype=torch.float64)
    num_rows = int(routing.cu_rows[-1])
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, routing, num_rows, "torch"), (x,))
    rows = torch.randn(num_rows, H, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: sum_rows(r, routing, "torch"), (rows,))
    # One is the other's transpose.
    left = (gather_rows(x, routing, num_rows, "torch") * rows).sum()
    torch.testing.assert_close(left, (x * sum_rows(rows, routing, "torch")).sum())


def test_gathering_and_summing_can_be_differentiated_twice() -> None:
    (x, *_), assigned = problem()
    routing = build_routing(assigned, E, dtype=torch.float64)
    num_rows = int(routing.cu_rows[-1])

    def both(x: Tensor) -> Tensor:
        return sum_rows(gather_rows(x, routing, num_rows, "torch").square(), routing, "torch").square()

    assert torch.autograd.gradgradcheck(both, (x,), fast_mode=True)


@pytest.mark.parametrize("required", ["x", "w1", "w2", "b1", "b2", "scores"])
def test_differentiating_experts_twice_raises(required: str) -> None:
    """Also where the gradient of o requires none itself, and where the rest of the graph is twice differentiable."""
    given, assigned = problem()
    routing = build_routing(assigned, E, dtype=torch.float64)
    leaves = dict(zip(("x", "w1", "w2", "b1", "b2", "scores"), (*given, routing.scores), strict=True))
    leaves = {name: t.detach().requires_grad_(name == required) for name, t in leaves.items()}
    leaf, scores = leaves[required], leaves.pop("scores")
    o = experts_with(torch.relu, routing=routing._replace(scores=scores), backend="torch", **width(leaves))
    (gradient,) = torch.autograd.grad(o.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (gradient.square().sum() + leaf.square().sum()).backward()


def width(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """w2 for a function that keeps the width of h."""
    return {**leaves, "w2": torch.cat((leaves["w2"], leaves["w2"]), dim=-1)}


def test_a_view_of_x_reaches_the_ops_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    (x, w1, w2, *_), assigned = problem()
    routing = build_routing(assigned, E, dtype=torch.float64)
    view = torch.stack((x, x), dim=-1).detach()[..., 0].requires_grad_()
    assert not view.is_contiguous()
    seen = []

    def checked(op: Any) -> Any:
        return lambda x, *others: seen.append(x.is_contiguous()) or op(x, *others)

    monkeypatch.setattr(ops, "up_proj", checked(ops.up_proj))
    monkeypatch.setattr(ops, "up_wgrad", checked(ops.up_wgrad))
    o, want = (experts_with(swiglu, t, w1, w2, routing, backend="torch") for t in (view, x))
    assert torch.equal(o, want)
    o.sum().backward()
    # up_wgrad is the product of rows by rows of both weights.
    assert len(seen) == 4 and all(seen)


def swiglu(h: Tensor) -> Tensor:
    return act(Activation("swiglu"), h)


class Fills(TorchDispatchMode):
    """The names of the ops that fill by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "masked_fill" in str(func):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_the_padding_is_filled_in_place() -> None:
    (x, w1, w2, *_), assigned = problem()
    routing = build_routing(assigned, E, padding=4, dtype=torch.float64)
    with Fills() as fills:
        experts_with(swiglu, x, w1, w2, routing, backend="torch").sum().backward()
    assert fills.names == {"aten.masked_fill_.Scalar"}


def test_weights_that_do_not_fit_raise() -> None:
    (x, w1, w2, *_), assigned = problem()
    routing = build_routing(assigned, E, dtype=torch.float64)
    for bad_w1, bad_w2, backend in (
        (w1[..., :-1], w2, "torch"),
        (w1.float(), w2, "torch"),
        (w1, w2[..., :-1], "torch"),
        (w1, w2[:, :-1], "torch"),
        (w1[:, :-1].contiguous(), w2, "cute"),
        (w1.transpose(0, 1).contiguous().transpose(0, 1), w2, "cute"),
    ):
        with pytest.raises(InvalidArgument, match="w1|w2"):
            experts_with(lambda h: h.chunk(2, -1)[0], x, bad_w1, bad_w2, routing, backend=backend)


BAD = {
    "x.shape": {"x": torch.zeros(3, 3, H, dtype=torch.float64)},
    "w2.shape": {"w2": torch.zeros(E - 1, H, I, dtype=torch.float64)},
    "b1.shape": {"b1": torch.zeros(E, I, dtype=torch.float64)},
    "b1.dtype": {"b1": torch.zeros(E, 2 * I)},
    "b2.shape": {"b2": torch.zeros(1, H, dtype=torch.float64)},
    "b2.dtype": {"b2": torch.zeros(E, H)},
    "routing": {"routing": None},
    "routing.num_tokens": {"routing": build_routing(ragged_assigned(T - 1, E), E, dtype=torch.float64)},
    "routing.num_experts": {"routing": build_routing(ragged_assigned(T, E - 1), E - 1, dtype=torch.float64)},
}


@pytest.mark.parametrize("argument", BAD)
def test_what_does_not_fit_is_named(argument: str) -> None:
    given, assigned = problem()
    routing = build_routing(assigned, E, dtype=torch.float64)
    arguments = dict(zip(("x", "w1", "w2", "b1", "b2"), given, strict=True), routing=routing)
    with pytest.raises(InvalidArgument) as raised:
        experts_with(swiglu, backend="torch", **{**arguments, **BAD[argument]})
    assert raised.value.argument == argument


def test_a_weight_that_starts_in_between_raises() -> None:
    w = torch.zeros(8 * 8 + 1, dtype=torch.bfloat16)[1:].view(1, 8, 8)
    with pytest.raises(InvalidArgument, match=r"w1\.data_ptr"):
        check_weight("w1", w, torch.zeros(4, 8, dtype=torch.bfloat16), "cute")


CONCATENATED = [*NAMES, "swiglu(alpha=1.3,limit=2.0,up_offset=1.0)", "swiglu(limit=5.0)"]
INTERLEAVED = [*GATED, *CONCATENATED[-2:]]


@pytest.mark.parametrize(
    ("name", "interleaved"), [*((n, False) for n in CONCATENATED), *((n, True) for n in INTERLEAVED)]
)
def test_every_activation_is_recognised_and_no_other(name: str, interleaved: bool) -> None:
    kind = Activation.parse(name)

    def function(h: Tensor) -> Tensor:
        return act(kind, torch.cat((h[..., ::2], h[..., 1::2]), -1) if interleaved else h)

    constants = [c for c in (kind.alpha, kind.limit) if c is not None]
    assert recognise(function, kind.gated, interleaved, constants) == kind
    for wrong in (lambda h: -function(h), lambda h: 1.001 * function(h), lambda h: 0 * function(h)):
        assert recognise(wrong, kind.gated, interleaved, constants) is None
    if kind.gated:
        assert recognise(function, kind.gated, not interleaved, constants) is None
    if kind.limit is not None:
        assert recognise(function, kind.gated, interleaved) is None
