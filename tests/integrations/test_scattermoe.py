"""ScatterMoE's layers by sonicmoe, against its formula in a loop and in its order of rows."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scattermoe_like import GLUMLP as TheirGLUMLP
from scattermoe_like import MLP as TheirMLP
from torch import Tensor, nn

from sonicmoe import InvalidArgument
from sonicmoe.integrations.recognise import recognise
from sonicmoe.integrations.scattermoe import GLUMLP, MLP, convert, exchanged

T, H, I, E, K = 13, 12, 10, 5, 2  # noqa: E741


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def pair(gated: bool, bias: bool, activation: Callable[[Tensor], Tensor]) -> tuple[Any, MLP]:
    """A layer as ScatterMoE has it, with parameters that matter, and ours made of it."""
    torch.manual_seed(0)
    theirs = (TheirGLUMLP if gated else TheirMLP)(H, I, E, K, bias=bias, activation=activation).double()
    for p in theirs.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5 if p.dim() == 3 else 0.5)
    return theirs, convert(theirs)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=generator, dtype=torch.float64)
    p = torch.rand(T, K, generator=generator, dtype=torch.float64)
    ids = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    return [x.requires_grad_(), p.requires_grad_(), ids]


ACTIVATIONS: list[tuple[bool, Callable[[Tensor], Tensor], str | None]] = [
    (True, nn.SiLU(), "swiglu"),
    (True, F.gelu, "geglu"),
    (True, F.mish, None),
    (False, squared_relu, "relu2"),
    (False, nn.GELU(approximate="tanh"), "gelu_tanh"),
    (False, torch.sin, None),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("gated", "activation", "fused"), ACTIVATIONS, ids=[a[2] or a[1].__name__ for a in ACTIVATIONS]
)
def test_output_and_gradients(
    gated: bool, activation: Callable[[Tensor], Tensor], fused: str | None, bias: bool
) -> None:
    theirs, ours = pair(gated, bias, activation)
    assert str(ours._fused()) == str(fused)
    results = []
    for layer in (theirs, ours):
        x, p, ids = inputs()
        y = layer(x, p, ids)
        (y * torch.linspace(-1, 1, H, dtype=y.dtype)).sum().backward()
        results.append([y.detach(), x.grad, p.grad, *(q.grad for q in layer.parameters())])
    for (name, _), place in zip(theirs.named_parameters(), range(3, 7), strict=False):
        if gated and name.startswith("experts."):
            results[1][place] = exchanged(results[1][place])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
        assert want.abs().max() > 0.1


@pytest.mark.parametrize("gated", [False, True])
def test_checkpoints_are_scattermoe_s(gated: bool) -> None:
    theirs, ours = pair(gated, True, F.gelu)
    saved = ours.state_dict()
    assert list(saved) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(saved[name], value), name
    assert torch.equal(ours.experts.weight, theirs.experts.weight) is not gated
    fresh = type(ours)(H, I, E, K, bias=True, activation=F.gelu).double()
    fresh.load_state_dict(theirs.state_dict())
    given = inputs()
    for twin in (fresh, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(*given), ours(*given))
    # What was converted shares its memory wherever the order allows it.
    assert ours.output_experts.weight.data_ptr() == theirs.output_experts.weight.data_ptr()


def test_parameters_start_as_scattermoe_s() -> None:
    ours = GLUMLP(64, 32, 16, 2, bias=True)
    assert 0.019 < ours.experts.weight.std() < 0.021 and 0.019 < ours.output_experts.weight.std() < 0.021
    assert ours.experts.bias is not None and not ours.experts.bias.any()
    assert ours.experts.weight.shape == (16, 64, 64) and ours.output_experts.weight.shape == (16, 64, 32)


def test_shapes_autocast_and_experts_elsewhere() -> None:
    _, ours = pair(True, False, nn.SiLU())
    x, p, ids = inputs()
    cube = torch.stack((x, x))
    twice = ours(cube, torch.cat((p, p)), torch.cat((ids, ids)))
    assert twice.shape == (2, T, H)
    torch.testing.assert_close(twice[1], ours(x, p, ids))
    torch.testing.assert_close(ours(x, p, ids.clone().fill_(E)), torch.zeros(T, H, dtype=torch.float64))
    for activation in (nn.SiLU(), F.mish):
        _, ours = pair(True, True, activation)
        given = (x.float(), p.float(), ids)
        want = ours.float()(*given)
        with torch.autocast("cpu", torch.bfloat16):
            y = ours(*given)
        assert y.dtype == torch.bfloat16 and 1e-4 < (y - want).norm() / want.norm() < 0.02


def test_an_activation_that_is_changed_or_has_parameters() -> None:
    theirs, ours = pair(False, False, F.relu)
    for activation in (squared_relu, torch.sin, nn.PReLU(init=0.0).double()):
        theirs.activation = ours.activation = activation
        torch.testing.assert_close(ours(*inputs()), theirs(*inputs()))
    assert str(ours._fused()) == "None"


@pytest.mark.parametrize("converted", [False, True])
def test_dropout_in_the_activation_is_not_lost(converted: bool) -> None:
    theirs, _ = pair(True, False, nn.Sequential(nn.SiLU(), nn.Dropout(0.5)))
    ours = convert(theirs.eval())
    if not converted:
        ours = GLUMLP(H, I, E, K, activation=theirs.activation).double()
        ours.load_state_dict(theirs.state_dict())
    for training, fused in ((False, "swiglu"), (True, "None"), (False, "swiglu"), (True, "None")):
        ours.train(training)
        y = ours(*inputs())
        assert str(ours._fused()) == fused
        assert torch.allclose(y, theirs.eval()(*inputs())) is not training


def test_an_activation_whose_formula_is_changed() -> None:
    theirs, ours = pair(False, False, nn.GELU())
    assert str(ours._fused()) == "gelu"
    ours.activation.approximate = "tanh"
    assert theirs.activation is ours.activation
    torch.testing.assert_close(ours(*inputs()), theirs(*inputs()))
    assert str(ours._fused()) == "gelu_tanh"


def assert_as_eager(compiled: Any, ours: MLP) -> None:
    """Output and gradients of all parameters."""
    outputs = [compiled(*inputs()), ours(*inputs())]
    gradients = [torch.autograd.grad(o.square().sum(), list(ours.parameters())) for o in outputs]
    for got, want in zip((outputs[0], *gradients[0]), (outputs[1], *gradients[1]), strict=True):
        assert want.norm() > 0.1 and torch.equal(got, want)


@pytest.mark.unpoisoned
def test_compiled_layers_see_an_activation_that_is_changed() -> None:
    torch.compiler.reset()
    _, ours = pair(True, True, F.relu)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    for ours.activation in (F.relu, F.mish, squared_relu, torch.sin):
        assert_as_eager(compiled, ours)
    _, ours = pair(True, True, nn.GELU())
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_as_eager(compiled, ours)
    ours.activation.approximate = "tanh"
    assert_as_eager(compiled, ours)
    for ours.activation in (nn.Mish(), nn.SiLU()):
        assert_as_eager(compiled, ours)


def test_recognising_draws_none_of_the_model_s_random_numbers() -> None:
    before = torch.random.get_rng_state()
    assert recognise(nn.Dropout(0.5), gated=False) is None
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("activation", [nn.SiLU(), F.mish])
def test_weights_of_any_dtype_and_meta_tensors(activation: Callable[[Tensor], Tensor]) -> None:
    _, ours = pair(True, True, activation)
    x, p, ids = inputs()
    ours, x = ours.float(), x.float()
    torch.testing.assert_close(ours(x, p, ids), ours(x, p.float(), ids), rtol=0, atol=0)
    y = ours.to("meta")(x.to("meta"), p.to("meta"), ids.to("meta"))
    assert y.is_meta and y.shape == x.shape


def test_what_raises() -> None:
    with pytest.raises(InvalidArgument, match="activation"):
        MLP(H, I, E, K)
    with pytest.raises(InvalidArgument, match="activation: got 'silu'"):
        GLUMLP(H, I, E, K, activation="silu")  # type: ignore[arg-type]
    _, ours = pair(False, False, F.relu)
    x, p, ids = inputs()
    with pytest.raises(InvalidArgument, match="top_k"):
        ours(x, p[:, :1], ids[:, :1])
    theirs, _ = pair(False, False, F.relu)
    theirs.hidden_size = 7
    with pytest.raises(InvalidArgument, match="of ScatterMoE"):
        convert(theirs)
    with pytest.raises(InvalidArgument, match="module: got Linear, accepted an MLP or a GLUMLP of ScatterMoE"):
        convert(nn.Linear(2, 2))
