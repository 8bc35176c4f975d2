"""Activations as values, and their reference mathematics against torch's own functions and autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from strategies import oracle_activation

from sonicmoe import GPT_OSS, Activation, InvalidArgument
from sonicmoe.activations import GATED, NAMES, PLAIN
from sonicmoe.reference.activation import act, act_backward

ALL = [*NAMES, str(GPT_OSS), "swiglu(alpha=1.5)", "swiglu(limit=0.5)", "swiglu(up_offset=-1.0)"]


@pytest.mark.parametrize("text", ALL)
def test_text_and_value_are_inverse(text: str) -> None:
    activation = Activation.parse(text)
    assert str(activation) == text
    assert Activation.parse(activation) is activation
    assert hash(activation) == hash(Activation.parse(text))


def test_gpt_oss_is_what_its_model_card_says() -> None:
    assert GPT_OSS == Activation("swiglu", alpha=1.702, limit=7.0, up_offset=1.0)
    assert str(GPT_OSS) == "swiglu(alpha=1.702,limit=7.0,up_offset=1.0)"


def test_spaces_order_and_defaults_do_not_matter() -> None:
    assert Activation.parse(" swiglu( limit = 7, alpha=1.0 ) ") == Activation("swiglu", limit=7.0)
    assert str(Activation.parse("swiglu(limit=7,alpha=2)")) == "swiglu(alpha=2.0,limit=7.0)"
    assert Activation.parse("swiglu()") == Activation("swiglu")


def test_gated_are_those_with_an_up_row() -> None:
    assert [name for name in NAMES if Activation(name).gated] == list(GATED)
    assert not any(Activation(name).gated for name in PLAIN)


@pytest.mark.parametrize(
    "spec",
    [
        "swish",
        "SwiGLU",
        "",
        None,
        7,
        ["swiglu"],
        "swiglu(",
        "swiglu(alpha)",
        "swiglu(alpha=x)",
        "swiglu(beta=1)",
        "swiglu(alpha=1)x",
        "swiglu(name=1)",
        "swiglu(limit=0)",
        "swiglu(limit=-7)",
        "swiglu(limit=inf)",
        "swiglu(alpha=nan)",
        "swiglu(up_offset=inf)",
        "geglu(alpha=1.7)",
        "gelu(limit=7)",
    ],
)
def test_what_is_not_supported_raises(spec: object) -> None:
    with pytest.raises(InvalidArgument, match="activation"):
        Activation.parse(spec)  # type: ignore[arg-type]


def test_an_unknown_name_raises_with_the_list() -> None:
    with pytest.raises(InvalidArgument) as error:
        Activation("mish")
    assert "mish" in str(error.value) and all(name in str(error.value) for name in NAMES)


def _inputs(activation: Activation) -> torch.Tensor:
    """Values on both sides of zero and of the limit; away from the kinks, where a derivative is a convention."""
    points = torch.linspace(-3.05, 3.1, 24, dtype=torch.float64)
    if not activation.gated:
        return points.reshape(4, 6)
    return torch.cartesian_prod(points, points)


@pytest.mark.parametrize("text", ALL)
def test_value_and_derivative_agree_with_torch(text: str) -> None:
    activation = Activation.parse(text)
    h = _inputs(activation).requires_grad_()
    expected = oracle_activation(activation, h, "concat")
    da = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    (expected_dh,) = torch.autograd.grad(expected, h, da)
    torch.testing.assert_close(act(activation, h.detach()), expected.detach())
    torch.testing.assert_close(act_backward(activation, h.detach(), da), expected_dh)


def test_clamped_elements_have_no_derivative_and_those_at_the_limit_have() -> None:
    activation = Activation("swiglu", limit=2.0)
    gate = torch.tensor([1.0, 2.0, 2.5, 1.0, 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.5, -2.5])
    dgate, dup = act_backward(activation, torch.cat((gate, up)), torch.ones(6)).chunk(2)
    assert (dgate != 0).tolist() == [True, True, False, True, True, True]
    assert (dup != 0).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("name", NAMES)
def test_extreme_inputs_give_no_nan(name: str) -> None:
    activation = Activation(name)
    h = torch.tensor([[-1e4, 0.0, 30.0, 1e4]])
    h = torch.cat((h, torch.ones_like(h)), dim=1) if activation.gated else h
    assert torch.isfinite(act(activation, h)).all()
    assert torch.isfinite(act_backward(activation, h, torch.ones_like(act(activation, h)))).all()


def test_constants_are_numbers_of_any_kind() -> None:
    limited = Activation("swiglu", limit=np.float32(7), alpha=1)
    assert limited == Activation("swiglu", limit=7.0) == Activation.parse(str(limited))
    for constant in ("1.7x", [1.0], None):
        with pytest.raises(InvalidArgument, match="alpha"):
            Activation("swiglu", alpha=constant)  # type: ignore[arg-type]
