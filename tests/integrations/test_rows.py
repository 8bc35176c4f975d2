"""Rows that somebody else dispatched: by the function itself, torchtitan's experts and Megatron-Core's."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sonicmoe import InvalidArgument
from sonicmoe.integrations.rows import experts_of_rows

COUNTS = [3, 0, 5, 2]
E, H, I, SPARE = 4, 16, 8, 3  # noqa: E741


def leaves(num_rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (num_rows, H),
        "w1": (E, 2 * I, H),
        "w2": (E, H, I),
        "b1": (E, 2 * I),
        "b2": (E, H),
        "scores": (num_rows,),
    }
    made = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {
        n: (t / (t.shape[-1] ** 0.5 if t.dim() == 3 else 1)).to(dtype).detach().requires_grad_()
        for n, t in made.items()
    }


def naive(given: dict[str, Tensor], placement: str, bias: bool) -> Tensor:
    x, w1, w2, scores = (given[n] for n in ("x", "w1", "w2", "scores"))
    rows, start = [], 0
    for e, count in enumerate(COUNTS):
        part, score = x[start : start + count], scores[start : start + count, None]
        h = part @ w1[e].T + (given["b1"][e] if bias else 0)
        a = F.silu(h[:, :I]) * h[:, I:]
        b2 = given["b2"][e] if bias else 0
        rows.append((score * a) @ w2[e].T + b2 if placement == "before" else score * (a @ w2[e].T + b2))
        start += count
    rows.append(torch.zeros(x.shape[0] - start, H, dtype=x.dtype))
    return torch.cat(rows)


@pytest.mark.parametrize("placement", ["before", "after"])
@pytest.mark.parametrize("bias", [False, True])
def test_placement_of_scores(placement: str, bias: bool) -> None:
    given = leaves(sum(COUNTS) + SPARE)
    with torch.no_grad():
        # What lies beyond the counts is nobody's row.
        given["x"][sum(COUNTS) :] = float("nan")
        given["scores"][sum(COUNTS) :] = float("nan")
    biases = {"b1": given["b1"], "b2": given["b2"]} if bias else {}
    o = experts_of_rows(
        given["x"], given["w1"], given["w2"], torch.tensor(COUNTS), given["scores"], placement, **biases
    )
    want = naive(given, placement, bias)
    torch.testing.assert_close(o, want)
    other = naive(given, "after" if placement == "before" else "before", bias)
    assert torch.allclose(other, want) is not bias
    names = [n for n in given if bias or n not in ("b1", "b2")]
    pattern = torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=o.dtype)
    got_grads, want_grads = (torch.autograd.grad((y * pattern).sum(), [given[n] for n in names]) for y in (o, want))
    for name, got, wanted in zip(names, got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, wanted, msg=name)
        assert wanted.abs().max() > 0.01


@pytest.mark.parametrize("num_rows", [0, 4], ids=["no rows", "only spare rows"])
def test_nothing_for_anybody(num_rows: int) -> None:
    given = leaves(num_rows)
    o = experts_of_rows(
        given["x"],
        given["w1"],
        given["w2"],
        torch.zeros(E, dtype=torch.int32),
        given["scores"],
        "before",
        b1=given["b1"],
        b2=given["b2"],
    )
    assert o.shape == (num_rows, H) and not o.any()
    o.sum().backward()
    for name, leaf in given.items():
        assert leaf.grad is not None and not leaf.grad.any(), name


def test_bad_arguments() -> None:
    given = leaves(sum(COUNTS))
    with pytest.raises(InvalidArgument, match="placement"):
        experts_of_rows(given["x"], given["w1"], given["w2"], torch.tensor(COUNTS), given["scores"], "between")
    with pytest.raises(InvalidArgument, match="scores.shape"):
        experts_of_rows(given["x"], given["w1"], given["w2"], torch.tensor(COUNTS), given["scores"][:3])
    for scores in (torch.ones(sum(COUNTS), dtype=torch.int64), torch.ones(sum(COUNTS), dtype=torch.bool)):
        with pytest.raises(InvalidArgument, match="scores.dtype"):
            experts_of_rows(given["x"], given["w1"], given["w2"], torch.tensor(COUNTS), scores)
    with pytest.raises(InvalidArgument, match="x.shape"):
        experts_of_rows(given["x"][0, 0], given["w1"], given["w2"], torch.tensor(COUNTS))


@pytest.mark.parametrize("placement", ["before", "after"])
def test_a_bias_that_does_not_fit_raises(placement: str) -> None:
    """Also where it is added after the layer."""
    given = leaves(sum(COUNTS))
    arguments = (given["x"], given["w1"], given["w2"], torch.tensor(COUNTS), given["scores"], placement)
    b2 = given["b2"].detach()
    for bad, what in ((b2[:1], "shape"), (b2[:, :1].contiguous(), "shape"), (b2[0], "shape"), (b2.float(), "dtype")):
        with pytest.raises(InvalidArgument, match=f"b2.{what}"):
            experts_of_rows(*arguments, b2=bad)


@pytest.mark.parametrize("placement", ["before", "after"])
def test_scores_of_any_dtype_and_autocast(placement: str) -> None:
    given = leaves(sum(COUNTS), torch.float32)
    arguments = (given["x"], given["w1"], given["w2"], torch.tensor(COUNTS))
    biases = (given["b1"], given["b2"])
    want = experts_of_rows(*arguments, given["scores"], placement, *biases)
    double = given["scores"].detach().double().requires_grad_()
    o = experts_of_rows(*arguments, double, placement, *biases)
    assert torch.equal(o, want)
    o.sum().backward()
    assert double.grad is not None and double.grad.dtype == torch.float64 and double.grad.any()
    with torch.autocast("cpu", torch.bfloat16):
        half = experts_of_rows(*arguments, double, placement, *biases)
    assert half.dtype == torch.bfloat16 and 1e-4 < relative(half, want) < 0.02


def relative(got: Tensor, want: Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


@pytest.fixture
def torchtitan_moe(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("torchtitan", reason="torchtitan is not installed: see the Makefile")
    if find_spec("triton") is None:
        # Only kernels of a dispatcher of torchtitan's need it, and nothing here calls them.
        monkeypatch.setitem(sys.modules, "torchtitan.distributed.minimal_async_ep.kernels", MagicMock())
    return pytest.importorskip("torchtitan.models.common.moe")


def test_torchtitan(torchtitan_moe: Any) -> None:
    Theirs = torchtitan_moe.GroupedExperts
    from sonicmoe.integrations.torchtitan import GroupedExperts, convert

    config = Theirs.Config(dim=H, hidden_dim=I, num_experts=E)
    theirs, ours = config.build(), convert(config).build()
    assert type(ours) is GroupedExperts
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    ours.load_state_dict(theirs.state_dict())
    counts = torch.tensor(COUNTS)
    results = []
    for module in (theirs, ours, None):
        x = leaves(sum(COUNTS))["x"].detach().bfloat16().requires_grad_()
        if module is not None:
            o = module(x, counts)
        else:
            weights = {n: p.detach().bfloat16().double().requires_grad_() for n, p in theirs.named_parameters()}
            exact = x.detach().double().requires_grad_()
            w1 = torch.cat((weights["w1_EFD"], weights["w3_EFD"]), dim=1)
            parts = {"x": exact, "w1": w1, "w2": weights["w2_EDF"], "scores": torch.ones(sum(COUNTS)).double()}
            o, x = naive(parts, "after", bias=False), exact
        pattern = torch.linspace(-1, 1, o.numel()).view_as(o).to(o.dtype)
        (o * pattern).sum().backward()
        named = dict(module.named_parameters()) if module is not None else weights
        results.append([o, x.grad, *(named[n].grad for n in ("w1_EFD", "w2_EDF", "w3_EFD"))])
    for their, our, true in zip(*results, strict=True):
        assert relative(our, true) <= 1.5 * relative(their, true) < 0.05


@pytest.fixture
def megatron(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    reason = "needs the extra `megatron`, and triton where megatron-core is 0.18 or newer"
    pytest.importorskip("megatron.core.transformer.moe.experts", exc_type=ImportError, reason=reason)
    from megatron.core import parallel_state

    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield parallel_state
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def megatron_config(**options: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {"gated_linear_unit": True, "activation_func": F.silu, "add_bias_linear": False, **options}
    return TransformerConfig(
        num_layers=1,
        hidden_size=H,
        num_attention_heads=2,
        ffn_hidden_size=I,
        moe_ffn_hidden_size=I,
        num_moe_experts=E,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        **options,
    )


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


MEGATRON = {
    "swiglu": {},
    "geglu": {"activation_func": F.gelu},
    "clamped": {"activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0},
    "squared_relu": {"activation_func": squared_relu, "gated_linear_unit": False},
}


@pytest.mark.parametrize("case", MEGATRON)
def test_megatron(megatron: Any, case: str) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    from sonicmoe.integrations.megatron import GroupedExperts

    config, groups = megatron_config(**MEGATRON[case]), ProcessGroupCollection.use_mpu_process_groups()
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    theirs = SequentialMLP(E, config, submodules, groups)
    ours = GroupedExperts(E, config, pg_collection=groups)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    for name, stacked in ours.named_parameters():
        each = [getattr(e, f"linear_fc{name[-1]}").weight for e in theirs.local_experts]
        stacked.data.copy_(torch.stack(each))
    results = []
    for module in (theirs, ours):
        given = leaves(sum(COUNTS), torch.float32)
        o, bias = module(given["x"], torch.tensor(COUNTS), given["scores"])
        assert bias is None
        (o * torch.linspace(-1, 1, H)).sum().backward()
        results.append([o, given["x"].grad, given["scores"].grad])
    for name, stacked in ours.named_parameters():
        each = [getattr(e, f"linear_fc{name[-1]}").weight.grad for e in theirs.local_experts]
        results[0].append(torch.stack(each))
        results[1].append(stacked.grad)
    for their, our in zip(*results, strict=True):
        assert relative(our, their) < 1e-5


def test_megatron_main_grad(megatron: Any) -> None:
    """What DistributedDataParallel does to parameters, done by hand: it needs CUDA."""
    from sonicmoe.integrations.megatron import GroupedExperts

    config = megatron_config()
    ours = GroupedExperts(E, config)
    given = leaves(sum(COUNTS), torch.float32)
    arguments = (given["x"], torch.tensor(COUNTS), given["scores"])
    ours(*arguments)[0].sum().backward()
    want = {n: p.grad.clone() for n, p in ours.named_parameters()}

    config.gradient_accumulation_fusion = True
    seen = []
    for name, p in ours.named_parameters():
        p.grad, p.grad_added_to_main_grad = None, False
        p.main_grad, p.zero_out_wgrad = torch.full(p.shape, 2.0), name == "weight1"

        def ready(p: Any, name: str = name) -> None:
            added = getattr(p, "grad_added_to_main_grad", None)
            seen.append((name, added, p.grad, p.main_grad.clone()))

        p.register_post_accumulate_grad_hook(ready)
    ours(*arguments)[0].sum().backward()
    assert sorted(name for name, *_ in seen) == ["weight1", "weight2"]
    for name, added, dummy, main_grad in seen:
        assert added
        # Zeros where they are asked for; else nothing is written.
        assert not dummy.any() if name == "weight1" else dummy.isnan().all()
        torch.testing.assert_close(main_grad, 2.0 + want[name])
        assert not torch.equal(main_grad, torch.full_like(main_grad, 2.0))
    (dummy,) = torch.autograd.grad(ours(*arguments)[0].sum(), ours.weight1, create_graph=True)
    with pytest.raises(RuntimeError, match="GroupedExperts has no second derivative"):
        dummy.sum().backward()
    # Without Megatron's mark nobody would drop such a gradient.
    for p in ours.parameters():
        del p.grad_added_to_main_grad
        p.grad = None
    ours(*arguments)[0].sum().backward()
    assert all(p.grad is None for p in ours.parameters())


def test_megatron_sharded_state_dict(megatron: Any) -> None:
    from sonicmoe.integrations.megatron import GroupedExperts

    ours = GroupedExperts(E, megatron_config())
    ours.ep_group = SimpleNamespace(rank=lambda: 2, size=lambda: 3)
    sharded = ours.sharded_state_dict("experts.", ((0, 1, 5),))["experts.weight1"]
    assert tuple(sharded.global_shape) == (5, 3 * E, 2 * I, H)
    assert tuple(sharded.global_offset) == (1, 2 * E, 0, 0)


@pytest.mark.parametrize("option", [{"add_bias_linear": True}, {"activation_func": torch.tanh}])
def test_megatron_of_other_mathematics_raises(megatron: Any, option: dict[str, Any]) -> None:
    from sonicmoe.integrations.megatron import GroupedExperts

    with pytest.raises(InvalidArgument, match="config"):
        GroupedExperts(E, megatron_config(**option))
