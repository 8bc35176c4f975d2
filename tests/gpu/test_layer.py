"""The whole layer on the CuTe kernels: output and every gradient, as good as torch in the same dtype.

Few static shapes (E, H, I), because each compiles its kernels anew; the routing and T change freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from closeness import assert_as_good
from strategies import Weights, build_routing, build_weights, ragged_assigned, top_k_assigned
from torch import Tensor

import sonicmoe
from sonicmoe import GPT_OSS, InvalidArgument, Routing, moe_experts
from sonicmoe.activations import NAMES
from sonicmoe.cute_kernels.variants import PACED_K

DEVICE = "cuda"
REGULAR = (8, 256, 128)
# Multiples of 8 and of nothing larger: ragged tiles in every dimension.
ODD = (8, 200, 72)
CLAMPED = "swiglu(alpha=1.702,limit=0.8,up_offset=1.0)"


class Layer:
    """A layer and a batch on the device: o and gradients by any backend, from the same values."""

    def __init__(
        self,
        assigned: Sequence[Sequence[int]],
        shape: tuple[int, int, int] = REGULAR,
        dtype: torch.dtype = torch.bfloat16,
        activation: str = "swiglu",
        bias: bool = False,
        w1_layout: str = "concat",
        padding: int = 0,
        seed: int = 0,
    ) -> None:
        experts, hidden, inter = shape
        self.dtype, self.options = dtype, {"activation": activation, "w1_layout": w1_layout}
        self.weights = build_weights(
            len(assigned), experts, hidden, inter, activation, bias=bias, seed=seed, dtype=dtype, device=DEVICE
        )
        self.routing = build_routing(assigned, experts, padding=padding, seed=seed, device=DEVICE)
        generator = torch.Generator().manual_seed(seed + 1)
        self.do = torch.randn(len(assigned), hidden, generator=generator).to(DEVICE, dtype)

    def begin(
        self, backend: str = "cute", dtype: torch.dtype | None = None, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """o, and the leaves of its graph: in another dtype than the layer's from the same, already rounded, values."""
        dtype = dtype or self.dtype
        weights = Weights(*(None if t is None else t.detach().to(dtype).requires_grad_() for t in self.weights))
        routing = self.routing._replace(scores=self.routing.scores.detach().clone().requires_grad_())
        x, w1, w2, b1, b2 = weights
        o = moe_experts(x, w1, w2, routing, b1, b2, backend=backend, **self.options, **options)
        return o, {n: t for n, t in (weights._asdict() | {"scores": routing.scores}).items() if t is not None}

    def finish(self, o: Tensor, leaves: dict[str, Tensor], retain: bool = False) -> dict[str, Tensor]:
        """o and the gradients; retain: of the last of two backward passes, once the first is shown to give the same."""
        wanted = (o, list(leaves.values()), self.do.to(o.dtype))
        before = torch.autograd.grad(*wanted, allow_unused=True, retain_graph=True) if retain else None
        gradients = torch.autograd.grad(*wanted, allow_unused=True)
        assert before is None or all(map(torch.equal, before, gradients))
        named = {f"d{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}
        return {"o": o.detach()} | named

    def results(
        self, backend: str = "cute", dtype: torch.dtype | None = None, retain: bool = False, **options: Any
    ) -> dict[str, Tensor]:
        return self.finish(*self.begin(backend, dtype, **options), retain)

    def check(self) -> dict[str, Tensor]:
        """The kernels' results, once they are shown to be as good as torch's."""
        truth, yardstick = self.results("torch", torch.float32), self.results("torch")
        actual = self.results("cute")
        assert actual.keys() == truth.keys()
        for name in truth:
            assert_as_good(name, actual[name], yardstick[name], truth[name], self.dtype)
        return actual


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs"


def test_memory_is_poisoned() -> None:
    assert torch.empty(4, device=DEVICE).isnan().all()
    assert torch.empty(4, device=DEVICE, dtype=torch.bfloat16).new_empty(3).isnan().all()


@pytest.mark.parametrize("activation", [*NAMES, str(GPT_OSS), CLAMPED])
def test_activations(activation: str) -> None:
    Layer(top_k_assigned(300, 8, 2), ODD, activation=activation, bias=True).check()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_dtypes_and_biases(dtype: torch.dtype, bias: bool) -> None:
    Layer(top_k_assigned(300, 8, 3), dtype=dtype, bias=bias).check()


@pytest.mark.parametrize(("activation", "shape"), [("swiglu", ODD), ("geglu", ODD), ("swiglu", REGULAR)])
def test_interleaved_w1(activation: str, shape: tuple[int, int, int]) -> None:
    Layer(top_k_assigned(300, 8, 2), shape, activation=activation, bias=shape == ODD, w1_layout="interleaved").check()


@pytest.mark.parametrize("k", range(1, 9))
def test_every_k(k: int) -> None:
    Layer(top_k_assigned(37, 8, k)).check()


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 37, 128, 129, 300, 1025])
def test_tokens(num_tokens: int) -> None:
    Layer(top_k_assigned(num_tokens, 8, 2)).check()


def _cases() -> dict[str, tuple[list[list[int]], int]]:
    """assigned, padding: routings over 8 experts that something can go wrong with."""
    return {
        "one expert takes all": ([[5]] * 300, 0),
        "the first and the last only": ([[7, 0]] * 130, 0),
        "experts of exactly one tile": ([[t // 128] for t in range(512)], 0),
        "experts of one row": ([[e] for e in range(8)], 0),
        "sentinel ids among them": ([[t % 10, (t + 3) % 10] for t in range(200)], 0),
        "sentinel ids only": ([[8, 9]] * 37, 0),
        "none to all experts": (ragged_assigned(300, 8), 0),
        "none to all experts, padded": (ragged_assigned(300, 8), 257),
        "every second token none": ([[t % 8, (t + 1) % 8] if t % 2 else [] for t in range(150)], 5),
        "every token every expert": ([list(range(8))] * 65, 0),
        "tokens without rows": ([[]] * 50, 0),
    }


@pytest.mark.parametrize("case", list(_cases()))
@pytest.mark.parametrize("shape", [REGULAR, ODD])
def test_routings(case: str, shape: tuple[int, int, int]) -> None:
    assigned, padding = _cases()[case]
    Layer(assigned, shape, padding=padding, bias=shape == ODD).check()


def _public_routings(num_tokens: int) -> dict[str, Callable[[], Routing]]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(num_tokens, 8, generator=generator).to(DEVICE)
    ids = torch.randint(0, 10, (num_tokens, 3), generator=generator).to(DEVICE)
    pairs = torch.randperm(num_tokens * 8, generator=generator)[: num_tokens * 2].to(DEVICE)
    scores = torch.rand(num_tokens * 3, generator=generator).to(DEVICE)
    return {
        "topk": lambda: sonicmoe.route_topk(logits, 3),
        "token_rounding": lambda: sonicmoe.route_token_rounding(logits, 2, tile_m=128),
        "pairs": lambda: sonicmoe.route_pairs(
            pairs // 8, pairs % 8, scores[: num_tokens * 2], num_tokens=num_tokens, num_experts=8
        ),
        "assigned": lambda: sonicmoe.route_assigned(ids, scores.view(-1, 3), num_experts=8),
        "rows": lambda: sonicmoe.route_rows(
            torch.full((8,), num_tokens // 8, device=DEVICE, dtype=torch.int32), num_rows=num_tokens
        ),
    }


@pytest.mark.parametrize("route", ["topk", "token_rounding", "pairs", "assigned", "rows"])
def test_public_routings(route: str) -> None:
    layer = Layer(top_k_assigned(600, 8, 2))
    layer.routing = _public_routings(600)[route]()
    layer.check()


def test_auto_is_cute_and_has_no_slow_path() -> None:
    layer = Layer(top_k_assigned(37, 8, 2))
    assert_same(layer.results("auto"), layer.results("cute"))
    with pytest.raises(InvalidArgument, match="x.dtype"):
        layer.results("auto", torch.float32)
    with pytest.raises(InvalidArgument, match="multiples of 8"):
        Layer(top_k_assigned(37, 8, 2), (8, 60, 72)).results("auto")


def test_two_runs_are_bitwise_equal() -> None:
    layer = Layer(ragged_assigned(300, 8), ODD, padding=100, bias=True)
    first = layer.results()
    assert_same(first, layer.results())
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(first, layer.results())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("activation", ["swiglu", CLAMPED, "gelu"])
@pytest.mark.parametrize("shape", [REGULAR, ODD])
def test_dh_takes_the_place_of_h_only_in_the_last_backward(activation: str, shape: tuple[int, int, int]) -> None:
    layer = Layer(ragged_assigned(700, 8), shape, activation=activation, padding=100, bias=True)
    assert_same(layer.results(), layer.results(retain=True))


@pytest.mark.parametrize("how", ["no_grad", "inference_mode"])
def test_inference_is_the_forward(how: str) -> None:
    layer = Layer(top_k_assigned(300, 8, 2))
    x, w1, w2, _, _ = layer.weights
    with getattr(torch, how)():
        o = moe_experts(x, w1, w2, layer.routing, backend="cute")
    assert torch.equal(o, layer.results()["o"])


def test_frozen_tensors_change_nothing_else() -> None:
    layer = Layer(top_k_assigned(300, 8, 2), ODD, bias=True)
    full = layer.results()
    x, w1, w2, b1, b2 = layer.weights
    for required in ("x", "w1", "w2", "b1", "b2"):
        leaves = {n: t.detach().requires_grad_(n == required) for n, t in layer.weights._asdict().items()}
        o = moe_experts(routing=layer.routing, backend="cute", **leaves)
        (gradient,) = torch.autograd.grad(o, leaves[required], layer.do)
        assert torch.equal(gradient, full[f"d{required}"]), required
    routing = layer.routing._replace(scores=layer.routing.scores.detach().clone().requires_grad_())
    frozen = (x.detach(), w1.detach(), w2.detach(), routing, b1.detach(), b2.detach())
    (dscores,) = torch.autograd.grad(moe_experts(*frozen, backend="cute"), routing.scores, layer.do)
    torch.testing.assert_close(dscores, full["dscores"], rtol=1e-5, atol=1e-5)


def test_non_contiguous_x_and_do() -> None:
    layer = Layer(top_k_assigned(130, 8, 2))
    expected = layer.results()
    x = torch.stack((layer.weights.x.detach(),) * 2, dim=2)[..., 0].requires_grad_()
    o = moe_experts(x, layer.weights.w1, layer.weights.w2, layer.routing, backend="cute")
    (dx,) = torch.autograd.grad(o, x, layer.do.T.contiguous().T)
    assert torch.equal(o, expected["o"]) and torch.equal(dx, expected["dx"])


@pytest.mark.parametrize("w1_layout", ["concat", "interleaved"])
def test_weight_gradients_add_into_fp32_buffers(w1_layout: str) -> None:
    layer = Layer(ragged_assigned(300, 8), w1_layout=w1_layout)
    truth, yardstick = layer.results("torch", torch.float32), layer.results("torch")
    _, w1, w2, _, _ = layer.weights
    buffers = {
        "dw1": torch.full_like(w1, 2.0, dtype=torch.float32),
        "dw2": torch.full_like(w2, 2.0, dtype=torch.float32),
    }
    buffers = {name: buffer.detach() for name, buffer in buffers.items()}
    for _ in range(2):
        rest = layer.results("cute", w1_grad=buffers["dw1"], w2_grad=buffers["dw2"])
        assert "dw1" not in rest and "dw2" not in rest
    for name, buffer in buffers.items():
        assert_as_good(name, (buffer - 2.0) / 2, yardstick[name], truth[name], layer.dtype)


def test_double_backward_raises() -> None:
    layer = Layer(top_k_assigned(37, 8, 2))
    x, w1, w2, _, _ = layer.weights
    o = moe_experts(x, w1, w2, layer.routing, backend="cute")
    (dx,) = torch.autograd.grad(o.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.float().square().sum().backward()


def test_layers_of_different_shapes_interleaved() -> None:
    """Both forwards before both backwards, and nothing waits in between."""
    layers = Layer(top_k_assigned(300, 8, 2)), Layer(ragged_assigned(200, 8), ODD, bias=True, padding=30)
    expected = [layer.results() for layer in layers]
    rounds = []
    for _ in range(3):
        begun = [layer.begin() for layer in layers]
        rounds.append([layer.finish(*of_layer) for layer, of_layer in zip(layers, begun, strict=True)])
    for results in rounds:
        for actual, wanted in zip(results, expected, strict=True):
            assert_same(actual, wanted)


@pytest.mark.parametrize("pin_memory", [False, True])
def test_what_is_kept_may_be_on_the_host(pin_memory: bool) -> None:
    layer = Layer(ragged_assigned(300, 8), ODD, bias=True, padding=50)
    expected = layer.results()
    with torch.autograd.graph.save_on_cpu(pin_memory=pin_memory):
        begun = layer.begin()
    assert_same(layer.finish(*begun), expected)


def test_streams() -> None:
    """On other streams than the default one at once: all begin together, behind a wait that lets the host issue them.

    One's GEMMs keep to a pace, whose CTAs then share the SMs with others.
    """
    layers = [Layer(top_k_assigned(1025, 8, 2)), Layer(ragged_assigned(700, 8), seed=3)]
    layers.append(Layer(top_k_assigned(1025, 8, 2), (8, PACED_K, 64)))
    expected = [layer.results() for layer in layers]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in layers]
    for _ in range(4):
        results = []
        torch.cuda._sleep(20_000_000)
        begin = torch.cuda.Event()
        begin.record()
        for layer, stream in zip(layers, streams, strict=True):
            stream.wait_event(begin)
            with torch.cuda.stream(stream):
                results.append(layer.results())
        torch.cuda.synchronize()
        for actual, wanted in zip(results, expected, strict=True):
            assert_same(actual, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_another_device_than_the_current_one() -> None:
    layer = Layer(top_k_assigned(130, 8, 2))
    expected = layer.results()
    layer.weights = Weights(*(None if t is None else t.detach().to("cuda:1") for t in layer.weights))
    layer.routing = Routing(*(t.to("cuda:1") if isinstance(t, Tensor) else t for t in layer.routing))
    layer.do = layer.do.to("cuda:1")
    actual = layer.results()
    torch.cuda.synchronize(1)
    assert_same({name: t.to("cuda:0") for name, t in actual.items()}, expected)


def _copy_routing(destination: Routing, source: Routing) -> None:
    for old, new in zip(destination, source, strict=True):
        if isinstance(old, Tensor):
            old.detach().copy_(new)


@pytest.mark.parametrize("padding", [0, 64])
def test_cuda_graph_replays_with_a_new_routing(padding: int) -> None:
    """Captured with one routing, replayed with others of the same number of tokens: the graph reads the plan anew."""

    def assigned(seed: int) -> list[list[int]]:
        chosen = top_k_assigned(300, 8, 2, seed)
        # With padding, 2 rows per token on average, 1 to 3 each.
        return [c + [(c[-1] + 1) % 8] if t % 2 else c[:1] for t, c in enumerate(chosen)] if padding else chosen

    layers = [Layer(assigned(seed), padding=padding, seed=seed) for seed in range(3)]
    expected = [layer.results() for layer in layers]
    static = Layer(assigned(7), padding=padding, seed=7)
    static.routing.scores.requires_grad_()
    x, w1, w2, _, _ = static.weights
    leaves = (x, w1, w2, static.routing.scores)

    def step() -> tuple[Tensor, ...]:
        o = moe_experts(x, w1, w2, static.routing, backend="cute")
        return (o.detach(), *torch.autograd.grad(o, leaves, static.do))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for layer, wanted in zip(layers, expected, strict=True):
        with torch.no_grad():
            for old, new in zip((x, w1, w2, static.do), (*layer.weights[:3], layer.do), strict=True):
                old.copy_(new)
            _copy_routing(static.routing, layer.routing)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(dict(zip(("o", "dx", "dw1", "dw2", "dscores"), captured, strict=True)), wanted)


@pytest.mark.unpoisoned
def test_nothing_waits_for_the_device() -> None:
    layer = Layer(ragged_assigned(300, 8), bias=True, padding=40)
    layer.results()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer.results()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.unpoisoned
def test_keeps_h_alone_beyond_its_inputs() -> None:
    experts, hidden, inter = REGULAR
    num_tokens, k = 4096, 4
    layer = Layer(top_k_assigned(num_tokens, experts, k))
    x, w1, w2, _, _ = layer.weights
    moe_experts(x, w1, w2, layer.routing, backend="cute").backward(layer.do)
    x.grad = w1.grad = w2.grad = None
    before = torch.cuda.memory_allocated()
    o = moe_experts(x, w1, w2, layer.routing, backend="cute")
    kept = torch.cuda.memory_allocated() - before - o.numel() * o.element_size()
    bytes_of_h = num_tokens * k * 2 * inter * 2
    assert bytes_of_h <= kept <= 1.02 * bytes_of_h
    torch.cuda.reset_peak_memory_stats()
    o.backward(layer.do)
    peak = torch.cuda.max_memory_allocated() - before
    # dh where h was, a_s of half its size, dx_rows; o and the gradients.
    most = 1.5 * bytes_of_h + (k + 2) * num_tokens * hidden * 2 + w1.nbytes + w2.nbytes
    assert peak <= 1.02 * most


@pytest.mark.unpoisoned
def test_torch_compile() -> None:
    layer = Layer(top_k_assigned(130, 8, 2))
    x, w1, w2, _, _ = layer.weights

    def function(x: Tensor, w1: Tensor, w2: Tensor, routing: Routing) -> Tensor:
        return moe_experts(x, w1, w2, routing)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (130, 37):
        routing = build_routing(top_k_assigned(num_tokens, 8, 2), 8, device=DEVICE)
        tokens = x[:num_tokens].detach().requires_grad_()
        results = []
        for f in (compiled, function):
            o = f(tokens, w1, w2, routing)
            results.append((o, *torch.autograd.grad(o, (tokens, w1, w2), layer.do[:num_tokens])))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("routing", ["topk", "token_rounding"])
def test_module_trains_as_on_the_reference(routing: str) -> None:
    """The gradient of every parameter, router included, as good as the reference's in the same dtype."""
    experts, hidden, inter = REGULAR

    def gradients(backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = sonicmoe.MoE(experts, 2, hidden, inter, std=0.06, routing=routing, backend=backend, device=DEVICE)
        module = module.to(torch.bfloat16).to(dtype)
        # In fp32, so that every backend and dtype routes alike.
        module.router.float()
        x = torch.randn(600, hidden, device=DEVICE).bfloat16().to(dtype)
        logits = module.router(x.float())
        o = moe_experts(x, module.w1, module.w2, module.route(logits), backend=backend)
        do = torch.randn(600, hidden, device=DEVICE).bfloat16().to(dtype)
        o.backward(do)
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    truth, yardstick = gradients("torch", torch.float32), gradients("torch", torch.bfloat16)
    actual = gradients("cute", torch.bfloat16)
    assert actual.keys() == truth.keys() == {"router.weight", "w1", "w2"}
    for name in truth:
        assert_as_good(name, actual[name], yardstick[name], truth[name], torch.bfloat16)


def test_module_in_the_storage_dtype() -> None:
    experts, hidden, inter = REGULAR
    module = sonicmoe.MoE(experts, 2, hidden, inter, add_bias=True, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(3, 50, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    o, aux_loss = module(x)
    assert o.shape == x.shape and o.dtype == x.dtype and aux_loss.dtype == torch.float32
    (o.float().square().mean() + aux_loss).backward()
    gradients = {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any(), name
