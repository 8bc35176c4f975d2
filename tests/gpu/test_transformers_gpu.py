"""Models of transformers by the kernels: experts and whole models against eager, memory, host time, graphs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_as_good
from torch import Tensor, nn

from sonicmoe import InvalidArgument, moe_experts, route_assigned

pytest.importorskip("transformers", minversion="5.8", reason="needs the extra `transformers`")

from transformers_models import (  # noqa: E402
    NAME,
    Inputs,
    build,
    check_half_precision,
    every_model,
    experts_module,
    experts_of,
    inputs,
    run,
    tokens,
)

import sonicmoe.integrations.transformers as adapter  # noqa: E402

DEVICE = "cuda"
# A block of Qwen3-30B-A3B.
BLOCK = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
BLOCK["num_hidden_layers"] = 1
# Host time of a call through the adapter, by that of the same call of moe_experts.
OVERHEAD = 1.35

EXPERTS = [("qwen3_moe", "swiglu"), ("gpt_oss", "clamped"), ("nemotron_h", "relu2"), ("mixtral", "mish")]
every_kind = pytest.mark.parametrize(("name", "case"), EXPERTS, ids=[case for _, case in EXPERTS])


def experts_on_gpu(name: str, case: str = "", **overrides: Any) -> Any:
    """In bf16, laid out for the kernels on the CPU: moving keeps the strides."""
    if case == "mish":
        overrides["hidden_act"] = "mish"
    return adapter.lay_out_for_kernels(experts_module(name, **overrides)).to(DEVICE, torch.bfloat16)


def block_at(num_tokens: int) -> tuple[Any, Inputs]:
    experts = experts_module("qwen3_moe", **BLOCK).to(DEVICE, torch.bfloat16)
    return experts, inputs(experts, num_tokens, k=8, device=DEVICE, dtype=torch.bfloat16)


def as_good_as_eager(experts: Any, half: Inputs) -> None:
    """Output and all gradients: from fp32 at most 1.5 times as far as eager's."""
    got, eager = run(experts, NAME, half), run(experts, "eager", half)
    full = Inputs(half.x.detach().float().requires_grad_(), half.ids, half.weights.detach().requires_grad_())
    truth = run(experts.float(), "eager", full)
    names = ["o", "dx", "dweights", *(n for n, _ in experts.named_parameters())]
    for name, *found in zip(names, got, eager, truth, strict=True):
        # A token's few gradients may all be small: they are compared with the mean size of all tokens'.
        ours, theirs, true = (t.flatten() if name == "dweights" else t for t in found)
        assert_as_good(name, ours, theirs, true, torch.bfloat16)


@every_kind
@pytest.mark.parametrize("num_tokens", [1, 7, 500])
def test_experts_against_eager(name: str, case: str, num_tokens: int) -> None:
    experts = experts_on_gpu(name, case)
    as_good_as_eager(experts, inputs(experts, num_tokens, device=DEVICE, dtype=torch.bfloat16))


@pytest.mark.parametrize("num_tokens", [1, 4, 2048])
def test_a_qwen3_moe_block(num_tokens: int) -> None:
    """At the size that people train and serve: also fewer tokens than experts."""
    as_good_as_eager(*block_at(num_tokens))


@every_kind
def test_no_tokens_and_experts_elsewhere(name: str, case: str) -> None:
    experts = experts_on_gpu(name, case)
    for result in run(experts, NAME, inputs(experts, 0, device=DEVICE, dtype=torch.bfloat16)):
        assert not result.any()
    assert all(p.grad is not None for p in experts.parameters())
    given = inputs(experts, 40, device=DEVICE, dtype=torch.bfloat16)
    elsewhere = (torch.rand(40, 2, generator=torch.Generator().manual_seed(5)) < 0.4).to(DEVICE)
    weights = given.weights.detach().masked_fill(elsewhere, float("nan")).requires_grad_()
    got = run(experts, NAME, Inputs(given.x, given.ids.masked_fill(elsewhere, experts.num_experts), weights))
    weightless = given.weights.detach().masked_fill(elsewhere, 0).requires_grad_()
    want = run(experts, NAME, Inputs(given.x, given.ids, weightless))
    assert not got[2][elsewhere].any() and want[2][elsewhere].any()
    want[2].masked_fill_(elsewhere, 0)
    for ours, theirs in zip(got, want, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


@every_model
def test_whole_models(name: str) -> None:
    check_half_precision(name, DEVICE)


@every_model
def test_generation_chooses_what_eager_would(name: str) -> None:
    """Token by token, the experts in bf16 and all else in fp32, so that no other rounding turns a router's choice.

    Each token is, by eager in fp32 on the whole sequence, within rounding of the best.
    """
    model = adapter.lay_out_for_kernels(build(name)).eval().to(DEVICE)
    for experts in experts_of(model):
        experts.bfloat16()
    ids = tokens(1, 5).to(DEVICE)
    model.set_experts_implementation(NAME)
    out = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    model.float().set_experts_implementation("eager")
    with torch.no_grad():
        logits = model(out).logits[0, ids.shape[1] - 1 : -1]
    # Not of the token that ends a text, which had to wait.
    logits[:, model.config.eos_token_id] = float("-inf")
    best, second = logits.topk(2, dim=1).values.T
    behind = best - logits.gather(1, out[0, ids.shape[1] :, None]).squeeze(1)
    assert (best - second).mean() > 5 * behind.max()


def test_transposed_weights_that_are_not_laid_out_raise() -> None:
    experts = experts_module("gpt_oss").to(DEVICE, torch.bfloat16)
    experts.config._experts_implementation = NAME
    with pytest.raises(InvalidArgument, match="lay_out_for_kernels"):
        experts(*inputs(experts, 3, device=DEVICE, dtype=torch.bfloat16))


def test_autocast_of_fp32_weights() -> None:
    experts = experts_module("qwen3_moe").to(DEVICE)
    given = inputs(experts, 60, device=DEVICE)
    truth = run(experts, "eager", given)
    with torch.autocast(DEVICE, torch.bfloat16):
        got, eager = run(experts, NAME, given), run(experts, "eager", given)
    for name, *found in zip(("o", "dx", "dweights", "w1", "w2"), got, eager, truth, strict=True):
        ours, theirs, true = (t.flatten() if name == "dweights" else t for t in found)
        assert ours.dtype == torch.float32
        assert_as_good(name, ours, theirs, true, torch.bfloat16)


@pytest.mark.unpoisoned
def test_compiled_and_in_a_graph_that_replays_with_other_experts() -> None:
    """Nothing waits for the device, and nothing depends on the routing that was captured."""
    experts = experts_on_gpu("qwen3_moe")
    experts.config._experts_implementation = NAME
    static, other = (inputs(experts, n, device=DEVICE, dtype=torch.bfloat16) for n in (64, 65))
    other = Inputs(*(t.detach()[1:].clone() for t in other))
    want = experts(*other).detach()
    compiled = torch.compile(experts, fullgraph=True)
    torch.testing.assert_close(compiled(*other), want)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        experts(*static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        o = experts(*static)
    with torch.no_grad():
        for mine, its in zip(static, other, strict=True):
            mine.copy_(its)
    graph.replay()
    assert torch.equal(o, want)


def peak(experts: Any, implementation: str, given: Inputs) -> int:
    """Bytes of forward and backward beside weights and input, after one that has warmed up."""
    experts.config._experts_implementation = implementation
    leaves = [given.x, given.weights, *experts.parameters()]
    do = torch.ones_like(given.x)

    def step() -> None:
        torch.autograd.grad(experts(*given), leaves, do)

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.unpoisoned
def test_a_block_needs_no_more_memory_than_by_grouped_mm() -> None:
    experts, given = block_at(16384)
    ours, theirs = (peak(experts, which, given) for which in (NAME, "grouped_mm"))
    assert 0 < ours <= theirs


def host_us(call: Callable[[], Tensor], rounds: int = 30, calls: int = 20) -> list[float]:
    """Host time of issuing a call, one number for each round."""
    found = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append(1e6 * (time.perf_counter() - start) / calls)
    return found


@pytest.mark.unpoisoned
@pytest.mark.parametrize("grad", [False, True])
def test_overhead_of_the_adapter(grad: bool) -> None:
    experts, given = block_at(64)
    experts.config._experts_implementation = NAME
    w1, w2 = experts.gate_up_proj, experts.down_proj

    def direct() -> Tensor:
        routing = route_assigned(given.ids, given.weights, num_experts=w1.shape[0])
        return moe_experts(given.x, w1, w2, routing)

    with torch.set_grad_enabled(grad):
        assert torch.equal(experts(*given), direct())
        times: dict[str, list[float]] = {"adapter": [], "direct": []}
        for _ in range(5):
            times["adapter"] += host_us(lambda: experts(*given), rounds=10)
            times["direct"] += host_us(direct, rounds=10)
    assert isinstance(experts, nn.Module)
    # The machine's noise only adds: compare the quickest fifth.
    quick = {name: sorted(t)[len(t) // 5] for name, t in times.items()}
    assert quick["adapter"] <= OVERHEAD * quick["direct"], quick
