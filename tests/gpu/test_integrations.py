"""Adapters by the kernels: rows that somebody else dispatched, ScatterMoE, the first implementation's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import scattermoe_like
import torch
import torch.distributed as dist
import torch.nn.functional as F
from closeness import assert_as_good
from torch import Tensor, nn

from sonicmoe import moe_experts, route_assigned, route_pairs, route_topk
from sonicmoe.compat import moe_general_routing_inputs, moe_TC_softmax_topk_layer
from sonicmoe.integrations import scattermoe
from sonicmoe.integrations.rows import experts_of_rows

DEVICE, DTYPE = "cuda", torch.bfloat16
T, E, K, H, I = 150, 6, 2, 128, 64  # noqa: E741
COUNTS, SPARE = (70, 0, 130, 1, 64, 35), 20


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """A leaf in bf16 on the GPU."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale
    return made.to(DEVICE, DTYPE).requires_grad_()


def weights(gated: bool = True) -> dict[str, Tensor]:
    width = 2 * I if gated else I
    return {
        "w1": drawn(E, width, H, seed=1, scale=H**-0.5),
        "w2": drawn(E, H, I, seed=2, scale=I**-0.5),
        "b1": drawn(E, width, seed=3),
        "b2": drawn(E, H, seed=4),
    }


def exact(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().cpu().double().requires_grad_() for name, t in leaves.items()}


def results(o: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and every gradient, on the CPU; those of scores as vectors, which are compared with their mean size."""
    pattern = torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(o)
    gradients = torch.autograd.grad((o * pattern).sum(), list(leaves.values()))
    named = {"o": o.detach(), **dict(zip(leaves, gradients, strict=True))}
    return {name: (t.flatten() if name in ("p", "scores") else t).cpu() for name, t in named.items()}


def as_good(got: dict[str, Tensor], yardstick: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, true in truth.items():
        assert_as_good(name, got[name], yardstick[name], true, DTYPE)


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_rows(placement: str, activation: str) -> None:
    leaves = {"x": drawn(sum(COUNTS) + SPARE, H), **weights(activation == "swiglu")}
    scores = torch.rand(sum(COUNTS) + SPARE, generator=torch.Generator().manual_seed(5)) + 0.1
    leaves["scores"] = scores.to(DEVICE).requires_grad_()
    counts = torch.tensor(COUNTS, device=DEVICE)

    def by(backend: str, given: dict[str, Tensor], counts: Tensor) -> dict[str, Tensor]:
        o = experts_of_rows(
            **given, rows_per_expert=counts, placement=placement, activation=activation, backend=backend
        )
        assert not o[sum(COUNTS) :].any()
        return results(o, given)

    as_good(by("cute", leaves, counts), by("torch", leaves, counts), by("torch", exact(leaves), counts.cpu()))


@pytest.mark.parametrize("num_rows", [0, 12])
def test_rows_of_nobody(num_rows: int) -> None:
    leaves = {"x": drawn(num_rows, H), **weights()}
    o = experts_of_rows(**leaves, rows_per_expert=torch.zeros(E, dtype=torch.int32, device=DEVICE), backend="cute")
    assert not o.any()
    for name, gradient in zip(leaves, torch.autograd.grad(o.sum(), list(leaves.values())), strict=True):
        assert not gradient.any(), name


@pytest.mark.parametrize(
    ("gated", "activation"), [(True, F.silu), (True, F.mish), (False, F.gelu)], ids=["swiglu", "mish", "gelu"]
)
def test_scattermoe(gated: bool, activation: Callable[[Tensor], Tensor]) -> None:
    """Against its own class where there is one, else against a loop with its layout."""
    theirs = _scattermoe_layer(gated, activation)
    for seed, p in enumerate(theirs.parameters()):
        nn.init.trunc_normal_(p, std=p.shape[-1] ** -0.5, generator=torch.Generator(DEVICE).manual_seed(seed))
    ours = scattermoe.convert(theirs)
    loop_of = scattermoe_like.GLUMLP if gated else scattermoe_like.MLP
    loop = loop_of(H, I, E, K, bias=False, activation=activation).double()
    loop.load_state_dict({name: value.cpu().double() for name, value in theirs.state_dict().items()})
    x, ids = drawn(T, H), torch.rand(T, E, generator=torch.Generator().manual_seed(6)).argsort(1)[:, :K]
    p = torch.rand(T, K, generator=torch.Generator().manual_seed(7)).to(DEVICE, DTYPE).requires_grad_()
    found = []
    for layer, device in ((ours, DEVICE), (theirs, DEVICE), (loop, "cpu")):
        given = {"x": x, "p": p, **dict(layer.named_parameters())}
        if layer is loop:
            given |= exact({"x": x, "p": p})
        found.append(results(layer(given["x"], given["p"], ids.to(device)), given))
        if gated and layer is ours:
            found[-1]["experts.weight"] = scattermoe.exchanged(found[-1]["experts.weight"])
    as_good(*found)


def _scattermoe_layer(gated: bool, activation: Callable[[Tensor], Tensor]) -> Any:
    if find_spec("scattermoe") is None:
        module: Any = scattermoe_like
    else:
        module = pytest.importorskip("scattermoe.mlp")
    kind = module.GLUMLP if gated else module.MLP
    return kind(H, I, E, K, bias=False, activation=activation).to(DEVICE, DTYPE)


def test_names_of_the_first_implementation() -> None:
    leaves = {"x": drawn(T, H), "router": drawn(E, H, seed=8, scale=H**-0.5), **weights()}

    def views(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
        return w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2

    def ours(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        o, logits, rows = moe_TC_softmax_topk_layer(x, router, *views(w1, b1, w2, b2), E, 0)
        assert rows.tolist() == [T] * E and logits.shape == (T, E)
        return o

    # All experts for all tokens: near a tie, rounding the logits would choose others.
    def by_torch(x: Tensor, router: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return moe_experts(x, w1, w2, route_topk(x @ router.T, E), b1, b2, w1_layout="interleaved", backend="torch")

    true = exact(leaves)
    as_good(results(ours(**leaves), leaves), results(by_torch(**leaves), leaves), results(by_torch(**true), true))


def test_pairs_by_the_first_implementations_name() -> None:
    leaves = {"x": drawn(T, H), **weights()}
    generator = torch.Generator().manual_seed(3)
    tokens, experts = (torch.randint(0, n, (400,), generator=generator) for n in (T, E))
    leaves["scores"] = torch.rand(400, generator=generator).to(DEVICE).requires_grad_()

    def ours(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, scores: Tensor) -> Tensor:
        given = (tokens.to(DEVICE), experts.to(DEVICE), w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2)
        return moe_general_routing_inputs(x, scores, *given, E)[0]

    def by_torch(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor, b2: Tensor, scores: Tensor) -> Tensor:
        pairs = (tokens.to(x.device), experts.to(x.device), scores)
        routing = route_pairs(*pairs, num_tokens=T, num_experts=E)
        return moe_experts(x, w1, w2, routing, b1, b2, w1_layout="interleaved", backend="torch")

    true = exact(leaves)
    as_good(results(ours(**leaves), leaves), results(by_torch(**leaves), leaves), results(by_torch(**true), true))


def test_torchtitan() -> None:
    pytest.importorskip("torchtitan", reason="torchtitan is not installed: see the Makefile")
    titan = pytest.importorskip(
        "torchtitan.models.common.moe", exc_type=ImportError, reason="torchtitan lacks what it needs"
    )
    from sonicmoe.integrations.torchtitan import convert

    config = titan.GroupedExperts.Config(dim=H, hidden_dim=I, num_experts=E)
    theirs, ours = config.build().to(DEVICE, DTYPE), convert(config).build().to(DEVICE, DTYPE)
    for p in theirs.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    ours.load_state_dict(theirs.state_dict())
    x, counts = drawn(sum(COUNTS), H), torch.tensor(COUNTS, device=DEVICE)
    found = [results(m(x, counts), {"x": x, **dict(m.named_parameters())}) for m in (ours, theirs)]
    true = exact({"x": x, **dict(theirs.named_parameters())})
    w1 = torch.cat((true["w1_EFD"], true["w3_EFD"]), dim=1)
    ids = torch.repeat_interleave(torch.tensor(COUNTS)).unsqueeze(1)
    routing = route_assigned(ids, torch.ones(len(ids), 1).double(), num_experts=E)
    found.append(results(moe_experts(true["x"], w1, true["w2_EDF"], routing), true))
    as_good(*found)


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pytest.importorskip("megatron.core", reason="needs the extra `megatron`")
    from megatron.core import parallel_state

    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def test_megatron_adds_into_main_grad(megatron: None) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from sonicmoe.integrations.megatron import GroupedExperts

    config = TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=2,
        ffn_hidden_size=I,
        moe_ffn_hidden_size=I,
        num_moe_experts=E,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        params_dtype=DTYPE,
    )
    layer = GroupedExperts(E, config)
    assert layer.weight1.device.type == DEVICE and layer.weight1.dtype == DTYPE
    leaves = {"x": drawn(sum(COUNTS), H), "w1": layer.weight1, "w2": layer.weight2}
    probs = torch.rand(sum(COUNTS), generator=torch.Generator().manual_seed(5)).to(DEVICE).requires_grad_()
    counts = torch.tensor(COUNTS, device=DEVICE)
    leaves["scores"] = probs
    found = [
        results(experts_of_rows(**given, rows_per_expert=c, placement="before", backend="torch"), given)
        for given, c in ((leaves, counts), (exact(leaves), counts.cpu()))
    ]
    config.gradient_accumulation_fusion = True
    for p in layer.parameters():
        p.grad_added_to_main_grad, p.main_grad = False, torch.full(p.shape, 2.0, device=DEVICE)
    o, _ = layer(leaves["x"], counts, probs)
    pattern = torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(o)
    (o * pattern).sum().backward()
    got = {"o": o.detach(), "x": leaves["x"].grad, "scores": probs.grad}
    got |= {"w1": layer.weight1.main_grad - 2, "w2": layer.weight2.main_grad - 2}
    assert all(p.grad_added_to_main_grad for p in layer.parameters())
    as_good({name: t.cpu() for name, t in got.items()}, *found)
