"""The module: parameters, what it computes, what it refuses, and that it learns."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sonicmoe import GPT_OSS, InvalidArgument, MoE, load_balancing_loss, moe_experts, route_token_rounding, route_topk

E, K, H, I = 8, 2, 16, 12  # noqa: E741


def _module(**options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(E, K, H, I, **options)


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("activation", "width"), [("swiglu", 2 * I), ("relu2", I), (GPT_OSS, 2 * I)])
@pytest.mark.parametrize("add_bias", [False, True])
def test_parameters(activation: Any, width: int, add_bias: bool) -> None:
    module = _module(activation_function=activation, add_bias=add_bias, std=0.5)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    expected = {"router.weight": (E, H), "w1": (E, width, H), "w2": (E, H, I)}
    expected |= {"b1": (E, width), "b2": (E, H)} if add_bias else {}
    assert shapes == expected == {name: tuple(p.shape) for name, p in module.state_dict().items()}
    for weight in (module.router.weight, module.w1, module.w2):
        assert abs(weight.mean()) < 0.15 and abs(weight.std() - 0.5) < 0.15
    if add_bias:
        assert not module.b1.any() and not module.b2.any()


def test_keyword_names_of_the_public_interface() -> None:
    module = MoE(
        num_experts=E,
        num_experts_per_tok=K,
        hidden_size=H,
        intermediate_size=I,
        activation_function="geglu",
        add_bias=True,
        std=0.02,
        routing="token_rounding",
        device="meta",
        dtype=torch.bfloat16,
    )
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())


@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("w1_layout", ["concat", "interleaved"])
def test_is_router_routing_experts_and_loss(add_bias: bool, w1_layout: str) -> None:
    module = _module(add_bias=add_bias, w1_layout=w1_layout, std=0.3)
    if module.b1 is not None and module.b2 is not None:
        torch.nn.init.normal_(module.b1)
        torch.nn.init.normal_(module.b2)
    x = _x(3, 5)
    o, aux_loss = module(x)
    logits = x.view(-1, H) @ module.router.weight.T
    routing = route_topk(logits, K)
    expected = moe_experts(x, module.w1, module.w2, routing, module.b1, module.b2, w1_layout=w1_layout)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(aux_loss, load_balancing_loss(logits, routing, K))
    assert o.shape == x.shape and aux_loss.shape == () and aux_loss.dtype == torch.float32


def test_gradients_reach_every_parameter_and_x() -> None:
    module = _module(add_bias=True, std=0.3)
    x = _x(20).requires_grad_()
    o, _ = module(x)
    o.square().sum().backward()
    assert x.grad is not None and x.grad.any()
    for name, p in module.named_parameters():
        assert p.grad is not None and p.grad.any(), name


def test_the_loss_reaches_the_router() -> None:
    module = _module(std=0.3)
    module(_x(20))[1].backward()
    assert module.router.weight.grad is not None and module.router.weight.grad.any()


def test_token_rounding_is_for_training_only() -> None:
    module = _module(routing="token_rounding", tile_m=4, std=0.5)
    x = _x(24)
    logits = module.router(x)
    rounded, plain = route_token_rounding(logits, K, tile_m=4), route_topk(logits, K)
    training = module(x)[0]
    torch.testing.assert_close(training, moe_experts(x, module.w1, module.w2, rounded))
    evaluated = module.eval()(x)[0]
    torch.testing.assert_close(evaluated, moe_experts(x, module.w1, module.w2, plain))
    assert not torch.allclose(training, evaluated)


@pytest.mark.parametrize("options", [{"scoring": "softmax_topk"}, {"scoring": "softmax_topk", "renormalize": True}])
def test_scoring_is_passed_on(options: dict[str, Any]) -> None:
    module, x = _module(**options, std=0.5), _x(24)
    expected = moe_experts(x, module.w1, module.w2, route_topk(module.router(x), K, **options))
    torch.testing.assert_close(module(x)[0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 0}, "num_experts_per_tok: got 0, accepted 1 to num_experts = 8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: got 9"),
        ({"num_experts_per_tok": 2.0}, "num_experts_per_tok: got float, accepted an integer"),
        ({"num_experts": "8"}, "num_experts: got str, accepted an integer"),
        ({"tile_m": 0}, "tile_m: got 0, accepted at least 1"),
        ({"rule": "coin"}, "rule: got 'coin', accepted one of nearest"),
        ({"scoring": "argmax"}, "scoring: got 'argmax', accepted one of topk_softmax"),
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"intermediate_size": -8}, "intermediate_size: got -8"),
        ({"routing": "expert_choice"}, "routing: got 'expert_choice', accepted one of topk, token_rounding"),
        ({"activation_function": "mish"}, "activation: got 'mish'"),
        ({"w1_layout": "blocked"}, "w1_layout: got 'blocked'"),
        ({"activation_function": "relu", "w1_layout": "interleaved"}, "w1_layout: got 'interleaved'"),
        ({"backend": "triton"}, "backend: got 'triton'"),
        ({"routing": "token_rounding", "scoring": "sigmoid"}, "scoring: got 'sigmoid'"),
        ({"routing": "token_rounding", "renormalize": True}, "renormalize: got True"),
    ],
)
def test_what_it_refuses(changes: dict[str, Any], message: str) -> None:
    options = {"num_experts": E, "num_experts_per_tok": K, "hidden_size": H, "intermediate_size": I}
    with pytest.raises(InvalidArgument) as error:
        MoE(**options | changes)
    assert message in str(error.value)


def test_x_of_another_hidden_size_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="x.shape: got \\(5, 8\\), accepted \\(..., 16\\)"):
        _module()(torch.ones(5, 8))


def test_bf16_and_autocast() -> None:
    module = _module(std=0.3)
    x = _x(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, aux_loss = module(x)
    assert o.dtype == torch.bfloat16 and aux_loss.dtype == torch.float32
    low = copy.deepcopy(module).bfloat16()
    torch.testing.assert_close(low(x.bfloat16())[0], o)


def test_no_tokens() -> None:
    o, aux_loss = _module()(_x(0))
    assert o.shape == (0, H) and torch.isfinite(aux_loss)


def test_says_what_it_is() -> None:
    text = repr(_module(activation_function=GPT_OSS, backend="torch", scoring="sigmoid"))
    for part in ("experts=8", "per_tok=2", f"activation={GPT_OSS}", "routing=topk, scoring=sigmoid", "backend=torch"):
        assert part in text
    assert "routing=token_rounding, rule=down, tile_m=4" in repr(
        _module(routing="token_rounding", rule="down", tile_m=4)
    )


def test_state_dict_and_copy() -> None:
    module, other = _module(std=0.3), MoE(E, K, H, I)
    other.load_state_dict(module.state_dict())
    x = _x(9)
    assert torch.equal(module(x)[0], other(x)[0])
    assert torch.equal(copy.deepcopy(module)(x)[0], module(x)[0])


@pytest.mark.parametrize("routing", ["topk", "token_rounding"])
def test_learns(routing: str) -> None:
    """A few steps of Adam halve the error of a regression that a single linear map cannot fit."""
    module = _module(routing=routing, tile_m=8, std=0.2)
    x = _x(64)
    target = torch.sin(2 * x) * x.roll(1, dims=1)
    optimiser = torch.optim.Adam(module.parameters(), lr=2e-2)
    losses = []
    for _ in range(60):
        o, aux_loss = module(x)
        loss = (o - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        (loss + 0.01 * aux_loss).backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.unpoisoned
def test_torch_compile() -> None:
    torch._dynamo.reset()
    module = _module(std=0.3)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (9, 20):
        x = _x(num_tokens)
        torch.testing.assert_close(compiled(x), module(x))
