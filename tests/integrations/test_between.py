"""Grouped products with any function between them: gradients, padding, parameters of the function, bad input."""

from __future__ import annotations

import pytest
import torch
from strategies import build_routing, build_weights, ragged_assigned
from torch import Tensor, nn

from sonicmoe import Activation, InvalidArgument, moe_experts
from sonicmoe.activations import GATED, NAMES
from sonicmoe.integrations.between import experts_with, gather_rows, sum_rows
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
