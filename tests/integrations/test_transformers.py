"""The registered backend against `eager`, on transformers' real model code with small random configurations."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sonicmoe import InvalidArgument

transformers = pytest.importorskip("transformers", minversion="5.8", reason="needs the extra `transformers`")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface  # noqa: E402
from transformers_models import (  # noqa: E402
    MODELS,
    NAME,
    Inputs,
    build,
    check_half_precision,
    error,
    every_model,
    experts_module,
    experts_of,
    inputs,
    run,
    scale_up,
    tokens,
    train_step,
)

import sonicmoe.integrations.transformers as adapter  # noqa: E402


@every_model
def test_logits_and_all_gradients_are_those_of_eager(name: str) -> None:
    tolerance, model, ids = 5e-6, build(name), tokens()
    want, want_grads = train_step(model, "eager", ids)
    for wrong in (0.0, -1.0):
        hooks = [e.register_forward_hook(lambda _m, _i, o, wrong=wrong: wrong * o) for e in experts_of(model)]
        assert error(train_step(model, "eager", ids)[0], want) > 1000 * tolerance
        for hook in hooks:
            hook.remove()
    got, got_grads = train_step(model, NAME, ids)
    assert error(got, want) < tolerance
    assert got_grads.keys() == want_grads.keys()
    for parameter, gradient in want_grads.items():
        assert error(got_grads[parameter], gradient) < 10 * tolerance, parameter
    for experts in experts_of(model):
        assert adapter._activation(experts) == MODELS[name].activation


@every_model
def test_in_bf16_not_further_from_fp32_than_eager(name: str) -> None:
    check_half_precision(name, "cpu")


@every_model
def test_generates_the_same_tokens(name: str) -> None:
    model, ids = build(name).eval(), tokens(1, 5)
    generated = []
    for implementation in ("eager", NAME):
        model.set_experts_implementation(implementation)
        generated.append(model.generate(ids, do_sample=False, max_new_tokens=12))
    assert generated[0].shape[1] > ids.shape[1] and torch.equal(*generated)


@every_model
def test_saving_and_loading_are_unchanged(name: str, tmp_path: Path) -> None:
    model, ids = adapter.lay_out_for_kernels(build(name)).eval(), tokens()
    model.save_pretrained(tmp_path / "eager")
    model.set_experts_implementation(NAME)
    model.save_pretrained(tmp_path / "ours")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "eager" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", experts_implementation=NAME)
    assert loaded.config._experts_implementation == NAME
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert error(loaded(ids).logits.detach(), model(ids).logits.detach()) < 1e-6


def test_the_name_is_its_own() -> None:
    assert ALL_EXPERTS_FUNCTIONS[NAME] is adapter.experts_forward
    assert ExpertsInterface()["sonicmoe"] is not adapter.experts_forward


# Experts modules by themselves: what a whole model does not reach.


def compare(experts: Any, given: Inputs, tolerance: float = 2e-6) -> None:
    for got, want in zip(run(experts, NAME, given), run(experts, "eager", given), strict=True):
        assert got.dtype == want.dtype and error(got, want) < tolerance


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
def test_any_number_of_tokens(name: str, num_tokens: int) -> None:
    experts = experts_module(name)
    compare(experts, inputs(experts, num_tokens))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_no_tokens(name: str) -> None:
    experts = experts_module(name)
    for result in run(experts, NAME, inputs(experts, 0)):
        assert not result.any()
    assert all(p.grad is not None for p in experts.parameters())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h"])
def test_ids_of_experts_elsewhere_are_skipped(name: str) -> None:
    """Under expert parallelism transformers gives them id num_experts and weight 0."""
    experts = experts_module(name)
    given = inputs(experts, 12)
    elsewhere = torch.rand(12, 2, generator=torch.Generator().manual_seed(5)) < 0.4
    # Not every eager forward knows such ids: an expert with weight 0 does the same.
    weights = given.weights.detach().masked_fill(elsewhere, 0).requires_grad_()
    want = run(experts, "eager", Inputs(given.x, given.ids.masked_fill(elsewhere, 0), weights))
    want[2].masked_fill_(elsewhere, 0)
    ids = given.ids.masked_fill(elsewhere, experts.num_experts)
    poisoned = given.weights.detach().masked_fill(elsewhere, float("nan")).requires_grad_()
    for skipped in (weights, poisoned):
        for got, wanted in zip(run(experts, NAME, Inputs(given.x, ids, skipped)), want, strict=True):
            assert error(got, wanted) < 2e-6


@pytest.mark.parametrize("name", MODELS)
def test_experts_in_bf16_with_scores_in_fp32(name: str) -> None:
    experts = experts_module(name).bfloat16()
    half = inputs(experts, 40, dtype=torch.bfloat16)
    got, eager = run(experts, NAME, half), run(experts, "eager", half)
    full = Inputs(half.x.detach().float().requires_grad_(), half.ids, half.weights.detach().requires_grad_())
    truth = run(experts.float(), "eager", full)
    assert got[0].dtype == torch.bfloat16
    for ours, theirs, true in zip(got, eager, truth, strict=True):
        assert error(ours, true) <= 1.5 * error(theirs, true) + 1e-6


def test_autocast_and_norms_that_leave_fp32() -> None:
    experts = experts_module("mixtral")
    given = inputs(experts, 20)
    truth = run(experts, "eager", given)
    with torch.autocast("cpu", torch.bfloat16):
        got, eager = run(experts, NAME, given), run(experts, "eager", given)
    for ours, theirs, true in zip(got, eager, truth, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        assert 1e-4 < error(ours, true) <= 1.5 * error(theirs, true)
    o = run(experts.bfloat16(), NAME, given)[0]
    assert o.dtype == torch.float32 and error(o, truth[0]) < 0.02


def test_frozen_weights_get_no_gradient() -> None:
    experts = experts_module("gpt_oss").requires_grad_(False)
    given = inputs(experts, 9)
    run(experts, NAME, given)
    assert given.x.grad is not None and all(p.grad is None for p in experts.parameters())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "quick_gelu"])
def test_activations_that_are_recognised(activation: str) -> None:
    names = {"gelu": "geglu", "relu": "reglu", "quick_gelu": "swiglu(alpha=1.702)"}
    experts = experts_module("mixtral", hidden_act=activation)
    assert adapter._activation(experts) == names.get(activation, "geglu_tanh")
    compare(experts, inputs(experts, 15))


@pytest.mark.parametrize("activation", ["mish", "hardswish", "relu6", "gelu_10", "tanh", "xielu"])
def test_other_activations_run_as_they_are(activation: str) -> None:
    experts = experts_module("mixtral", hidden_act=activation)
    assert adapter._activation(experts) is None
    compare(experts, inputs(experts, 15), tolerance=1e-5)


# What experts with a gate, a layout or a norm of their own are recognised as. A version that lacks them says so.
UNUSUAL = {
    "aria.AriaExperts": "swiglu",
    "beam.BeamExperts": "swiglu",
    "deepseek_v4.DeepseekV4Experts": "swiglu(limit={limit})",
    "gemma4.Gemma4TextExperts": "swiglu",
    "glm5_next.Glm5NextTextExperts": "swiglu(limit={limit})",
    "gpt_oss.GptOssExperts": "swiglu(alpha=1.702,limit={limit},up_offset=1.0)",
    "hy_v4.HYV4Experts": "swiglu(limit={limit})",
    "inkling2.Inkling2Experts": None,
    "minimax_m3_vl.MiniMaxM3VLExperts": "swiglu(alpha=1.702,limit={limit},up_offset=1.0)",
    "muse_spark.MuseSparkExperts": None,
    "nemotron_h.NemotronHExperts": "relu2",
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": "swiglu(alpha=1.702,limit={limit},up_offset=1.0)",
}


def experts_of_this_version() -> set[str]:
    """Every class behind ExpertsInterface, as package.Class."""
    decorated = re.compile(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", re.MULTILINE)
    sources = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return {f"{path.parent.name}.{name}" for path in sources for name in decorated.findall(path.read_text())}


class AnyConfig:
    """What experts modules read of a configuration, by any of its names."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        sizes = (("experts", 4), ("intermediate", 12), ("hidden_size", 16), ("eps", 1e-6))
        for part, value in (*sizes, ("mlp_hidden_act", "relu2"), ("act", "silu")):
            if part in name:
                return value
        if "latent" in name:
            return None
        if "limit" in name or "alpha" in name or "cap" in name:
            return 1.702 if "alpha" in name else 1.5
        raise AttributeError(name)


@pytest.mark.parametrize("path", sorted(experts_of_this_version() | set(UNUSUAL)))
def test_experts_of_every_model(path: str) -> None:
    package, name = path.split(".")
    version = f"transformers {transformers.__version__}"
    module = pytest.importorskip(f"transformers.models.{package}.modeling_{package}", reason=f"{version} has none")
    experts = getattr(module, name)(AnyConfig())
    if not hasattr(experts, "has_gate"):
        pytest.skip(f"in {version} not behind ExpertsInterface")
    scale_up(experts)
    recognised = None if adapter._has_post_norm(experts) else adapter._activation(experts)
    if path in UNUSUAL:
        want, limit = UNUSUAL[path], getattr(experts, "limit", getattr(experts, "swiglu_limit", None))
        assert recognised == (want and want.format(limit=limit))
    compare(experts, inputs(experts, 21), tolerance=1e-5)


def test_a_function_changed_later_is_recognised_again() -> None:
    experts = experts_module("mixtral")
    assert adapter._activation(experts) == "swiglu"
    experts.act_fn = nn.Tanh()
    compare(experts, inputs(experts, 15))
    experts = experts_module("gpt_oss")
    compare(experts, inputs(experts, 15))
    experts.limit = 0.5
    assert "limit=0.5" in str(adapter._activation(experts))
    compare(experts, inputs(experts, 15))


def test_dropout_in_the_activation_is_not_lost() -> None:
    experts = experts_module("mixtral")
    experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    for training, want in ((False, "swiglu"), (True, None), (False, "swiglu")):
        assert adapter._activation(experts.train(training)) == want
    experts.act_fn = nn.GELU()
    assert adapter._activation(experts) == "geglu"
    experts.act_fn.approximate = "tanh"
    assert adapter._activation(experts) == "geglu_tanh"


@pytest.mark.parametrize("activation", ["silu", "mish"])
def test_weights_in_fp64_and_meta_tensors(activation: str) -> None:
    experts = experts_module("mixtral", hidden_act=activation)
    given = inputs(experts, 15)
    double = given._replace(weights=given.weights.detach().double().requires_grad_())
    for got, want in zip(run(experts, NAME, double), run(experts, NAME, given), strict=True):
        assert error(got.to(want.dtype), want) < 1e-6
    assert double.weights.grad is not None and double.weights.grad.dtype == torch.float64
    o = experts.to("meta")(*(t.to("meta") for t in given))
    assert o.is_meta and o.shape == given.x.shape


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest floating tensor that anything makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.is_floating_point() and not func.is_view:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", MODELS)
def test_no_weight_is_copied(name: str) -> None:
    experts = experts_module(name)
    given = inputs(experts, 4)
    experts.config._experts_implementation = NAME
    experts(*given)
    with torch.no_grad(), LargestTensor() as seen:
        experts(*given)
    # One expert's weight at a time may be read in another layout by the torch backend; never all of them.
    assert 0 < seen.largest <= max(p.numel() // p.shape[0] for p in experts.parameters())


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "nemotron_h", "mish"])
def test_compiles_without_a_graph_break(name: str) -> None:
    experts = experts_module("mixtral", hidden_act="mish") if name == "mish" else experts_module(name)
    given = inputs(experts, 7)
    experts.config._experts_implementation = NAME
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    o = compiled(*given)
    o.sum().backward()
    assert given.x.grad is not None
    want_dx = given.x.grad.clone()
    given.x.grad = None
    want = experts(*given)
    want.sum().backward()
    assert torch.equal(o, want) and given.x.grad is not None and torch.equal(given.x.grad, want_dx)


@pytest.mark.unpoisoned
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_experts_see_a_function_changed_later(dynamic: bool | None) -> None:
    torch.compiler.reset()

    def compiled(name: str) -> tuple[Any, Any]:
        experts = experts_module(name)
        experts.config._experts_implementation = NAME
        return experts, torch.compile(experts, backend="eager", fullgraph=True, dynamic=dynamic)

    def check(module: Any, by_compiler: Any, want: str) -> None:
        given = inputs(module, 7)
        assert want == str(adapter._activation(module))
        assert torch.equal(by_compiler(*given), module(*given))

    gpt_oss, by_compiler = compiled("gpt_oss")
    for gpt_oss.limit in (7.0, 0.5, 0.25):
        check(gpt_oss, by_compiler, f"swiglu(alpha=1.702,limit={gpt_oss.limit},up_offset=1.0)")
    mixtral, by_compiler = compiled("mixtral")
    check(mixtral, by_compiler, "swiglu")
    mixtral.act_fn = nn.GELU()
    check(mixtral, by_compiler, "geglu")
    mixtral.act_fn.approximate = "tanh"
    check(mixtral, by_compiler, "geglu_tanh")
    mixtral.act_fn = nn.Sequential(nn.GELU(), nn.Dropout(0.5)).eval()
    check(mixtral, by_compiler, "geglu")
    mixtral.act_fn[1].p = 0.0
    check(mixtral.train(), by_compiler, "geglu")


def test_hopper_asks_for_the_kernels_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "resolve_backend", lambda *_: "cute")
    experts = experts_module("gpt_oss")
    given = inputs(experts, 3)
    experts.config._experts_implementation = NAME
    with pytest.raises(InvalidArgument, match="lay_out_for_kernels"):
        experts(*given)
    before = experts.gate_up_proj.detach().clone()
    assert adapter.lay_out_for_kernels(experts) is experts
    assert torch.equal(experts.gate_up_proj, before)
    w1, w2, *_ = adapter._weights(experts)
    assert w1.is_contiguous() and w2.is_contiguous()
    monkeypatch.undo()
    compare(experts, given)
