"""The layer as one Function: bit for bit, but for sums, what `MoE.forward` gives step by step; where nobody looks.

A CPU passes for a Hopper GPU here, and the reference for the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sonicmoe import InvalidArgument, MoE, Routing, layer, ops, route_topk
from sonicmoe.jit import target

E, K, H, I, T = 8, 2, 16, 24, 12  # noqa: E741
WEIGHT = 100.0  # of the loss, whose gradients are then as large as the scores'

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"add_bias": True},
    "interleaved": {"w1_layout": "interleaved", "add_bias": True},
    "no gate": {"activation_function": "relu2"},
    "sigmoid": {"scoring": "sigmoid", "renormalize": True},
    "rounding": {"routing": "token_rounding", "tile_m": 4},
    "stochastic rounding": {"routing": "token_rounding", "tile_m": 4, "rule": "stochastic"},
}


class Seen:
    """What was called: ops by their names, and whether a layer was run as one."""

    def __init__(self) -> None:
        self.ops: list[str] = []
        self.as_one = 0

    def take(self) -> tuple[list[str], int]:
        taken = self.ops, self.as_one
        self.ops, self.as_one = [], 0
        return taken


@pytest.fixture(autouse=True)
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Seen]:
    seen = Seen()

    def by_reference(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.ops.append(name)
            return op(*arguments[:-1], "torch")

        return call

    for name, body in vars(ops.bodies).copy().items():
        if hasattr(ops, name):
            monkeypatch.setattr(ops.bodies, name, by_reference(name, body))
            monkeypatch.setattr(ops, name, by_reference(name, getattr(ops, name)))
    run = layer.run

    def as_one(*arguments: Any) -> tuple[Tensor, Tensor]:
        seen.as_one += 1
        return run(*arguments)

    monkeypatch.setattr(layer, "run", as_one)
    monkeypatch.setattr(layer, "_kinds", {})
    monkeypatch.setattr(target, "capability", lambda device: target.HOPPER)
    monkeypatch.setattr(ops, "compile_layer", lambda *_: None)
    yield seen


def _layer(**settings: Any) -> MoE:
    torch.manual_seed(0)
    moe = MoE(E, K, H, I, std=0.3, dtype=torch.bfloat16, **settings)
    for bias in (moe.b1, moe.b2):
        if bias is not None:
            nn.init.normal_(bias)
    return moe


def _x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*(shape or (T,)), H, generator=generator).bfloat16().requires_grad_()


def _look(moe: MoE) -> Any:
    return moe.router.register_forward_hook(lambda *_: None)


def _dos(roots: list[Tensor]) -> list[Tensor]:
    return [
        r.new_full((), WEIGHT) if r.dim() == 0 else torch.linspace(-1, 1, r.numel()).to(r).view_as(r) for r in roots
    ]


def _results(moe: MoE, x: Tensor, of: Callable[[Tensor, Tensor], list[Tensor]]) -> list[Tensor | None]:
    """o, the loss, and the gradients of some outputs for x and all parameters."""
    torch.manual_seed(2)
    o, loss = moe(x)
    roots = of(o, loss)
    leaves = [t for t in (x, *moe.parameters()) if t.requires_grad]
    return [o, loss, *torch.autograd.grad(roots, leaves, _dos(roots), allow_unused=True)]


def _same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def _as_by_steps(one: list[Tensor | None], steps: list[Tensor | None], moe: MoE, x: Tensor) -> bool:
    """The same bits but in gradients of x and router: step by step, parts are rounded before they are added.

    Two or three parts and their sums, half a unit each.
    """
    outputs = len(one) - sum(t.requires_grad for t in (x, *moe.parameters()))
    leaves = [None] * outputs + [t for t in (x, *moe.parameters()) if t.requires_grad]
    summed = [leaf is x or leaf is moe.router.weight for leaf in leaves]
    for a, b in ((a, b) for a, b, s in zip(one, steps, summed, strict=True) if s and a is not None):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=0, atol=2 * torch.finfo(a.dtype).eps * float(a.abs().max()))
    exact = [(a, b) for a, b, s in zip(one, steps, summed, strict=True) if not s or a is None]
    return _same([a for a, _ in exact], [b for _, b in exact])


def _both(o: Tensor, loss: Tensor) -> list[Tensor]:
    return [o, loss]


def _compare(seen: Seen, moe: MoE, x: Tensor, of: Callable[[Tensor, Tensor], list[Tensor]] = _both) -> None:
    """As one and step by step: the same ops and results."""
    one = _results(moe, x, of)
    by_one, runs = seen.take()
    hook = _look(moe)
    steps = _results(moe, x, of)
    by_steps, none = seen.take()
    hook.remove()
    assert (runs, none) == (1, 0)
    # The scores' gradients are added to the loss's, where there are both.
    both = "load_balance_backward" in by_steps
    routing = ("topk_backward", "token_rounding_backward")
    assert by_one == [f"{name}_add_" if both and name in routing else name for name in by_steps]
    assert _as_by_steps(one, steps, moe, x)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(T,), (3, 4)])
def test_as_one_and_step_by_step_are_the_same(seen: Seen, settings: str, shape: tuple[int, ...]) -> None:
    _compare(seen, _layer(**SETTINGS[settings]), _x(*shape))


@pytest.mark.parametrize("of", [lambda o, loss: [o], lambda o, loss: [loss]])
@pytest.mark.parametrize("settings", ["biases", "rounding"])
def test_one_result_alone(seen: Seen, settings: str, of: Callable[[Tensor, Tensor], list[Tensor]]) -> None:
    _compare(seen, _layer(**SETTINGS[settings]), _x(), of)


FROZEN = ("x", "router.weight", "w1", "w2", "b1", "b2")


@pytest.mark.parametrize("frozen", [*((name,) for name in FROZEN), ("x", "router.weight"), FROZEN[:-1], FROZEN[1:]])
def test_what_is_frozen_costs_nothing(seen: Seen, frozen: tuple[str, ...]) -> None:
    moe, x = _layer(add_bias=True), _x().requires_grad_("x" not in frozen)
    for name in set(frozen) - {"x"}:
        moe.get_parameter(name).requires_grad_(False)
    routes = not {"x", "router.weight"} <= set(frozen)
    assert moe(x)[1].requires_grad == routes
    seen.take()
    _compare(seen, moe, x, _both if routes else lambda o, loss: [o])
    as_one, _ = _kept(moe, x), _look(moe)
    assert as_one <= _kept(moe, x)


def _kept(moe: MoE, x: Tensor) -> int:
    """Bytes that the backward keeps, each storage once."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        moe(x)
    return sum(storages.values())


def test_nothing_requires_a_gradient(seen: Seen) -> None:
    moe, x = _layer(), _x()
    trained = [t.detach() for t in moe(x)]
    with torch.no_grad():
        o, loss = moe(x)
    assert not o.requires_grad and not loss.requires_grad
    with torch.inference_mode():
        inferred = moe(x)
    assert seen.take()[1] == 3
    assert _same(trained, [o, loss]) and _same(trained, list(inferred))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(seen: Seen, reentrant: bool) -> None:
    moe, x = _layer(**SETTINGS["stochastic rounding"]), _x()
    expected = _results(moe, x, _both)
    again = nn.Module()
    again.forward = lambda x: checkpoint(moe, x, use_reentrant=reentrant)  # type: ignore[method-assign]
    torch.manual_seed(2)
    o, loss = again(x)
    for p in (x, *moe.parameters()):
        p.grad = None
    torch.autograd.backward([o, loss], _dos([o, loss]))
    assert _same(expected, [o, loss, x.grad, *(p.grad for p in moe.parameters())])
    assert seen.take()[1] == 3


def test_dh_takes_the_place_of_h_in_the_last_backward_alone(seen: Seen) -> None:
    moe, x = _layer(), _x()
    leaves, kept = [x, *moe.parameters()], []
    roots = list(moe(x))
    seen.take()
    first = torch.autograd.grad(roots, leaves, _dos(roots), retain_graph=True)
    assert "down_dgrad" in seen.take()[0]
    second = torch.autograd.grad(roots, leaves, _dos(roots))
    assert "down_dgrad_" in seen.take()[0]
    assert _same(list(first), list(second))

    def pack(t: Tensor) -> Tensor:
        kept.append((t, t.clone()))
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        roots = list(moe(x))
    assert _same(list(first), list(torch.autograd.grad(roots, leaves, _dos(roots))))
    assert len(kept) > 5 and all(torch.equal(t, before) for t, before in kept)


def test_a_profiler_sees_ops_and_changes_nothing(seen: Seen) -> None:
    moe, x = _layer(), _x()
    expected = _results(moe, x, _both)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        actual = _results(moe, x, _both)
    assert _same(expected, actual) and seen.take()[1] == 2
    names = {event.key for event in profiler.key_averages()}
    assert {"sonicmoe::topk", "sonicmoe::up_proj", "sonicmoe::up_wgrad"} <= names


def test_results_can_be_changed_in_place() -> None:
    moe, x = _layer(), _x(3, 4)
    o, loss = moe(x)
    o += x
    loss *= 2
    (o.sum() + loss).backward()


def test_there_is_no_second_derivative() -> None:
    moe, x = _layer(), _x()
    (dx,) = torch.autograd.grad(moe(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="sonicmoe.MoE has no second derivative"):
        dx.sum().backward()


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "mode",
    [_Functions, _Dispatched, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["function", "dispatch", "cast"],
)
def test_modes_see_every_step(seen: Seen, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    moe, x = _layer(), _x()
    expected = _results(moe, x, _both)
    with mode():
        actual = _results(moe, x, _both)
    assert _as_by_steps(expected, actual, moe, x) and seen.take()[1] == 1


def _hooked(moe: MoE, kind: str) -> None:
    getattr(moe.router, f"register_{kind}")(lambda *_: None)


def _global_hook(moe: MoE) -> AbstractContextManager[Any]:
    return nn.modules.module.register_module_forward_hook(lambda *_: None)


def _routed_elsewhere(moe: MoE) -> None:
    moe.route = lambda logits: route_topk(logits, K)  # type: ignore[method-assign]


class _Other(MoE):
    def route(self, logits: Tensor) -> Routing:
        return route_topk(logits, K)


class _Router(nn.Linear):
    pass


CHANGES: dict[str, Callable[[MoE], Any]] = {
    "forward hook": lambda moe: _hooked(moe, "forward_hook"),
    "forward pre-hook": lambda moe: _hooked(moe, "forward_pre_hook"),
    "backward hook": lambda moe: _hooked(moe, "full_backward_hook"),
    "backward pre-hook": lambda moe: _hooked(moe, "full_backward_pre_hook"),
    "global hook": _global_hook,
    "route of the instance": _routed_elsewhere,
    "route of a subclass": lambda moe: setattr(moe, "__class__", _Other),
    "router of a subclass": lambda moe: setattr(moe.router, "__class__", _Router),
    "router's own forward": lambda moe: setattr(moe.router, "forward", moe.router.forward),
    "parametrized w1": lambda moe: nn.utils.parametrize.register_parametrization(moe, "w1", nn.Identity()),
    "parametrized router": lambda moe: nn.utils.parametrize.register_parametrization(
        moe.router, "weight", nn.Identity()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_who_changes_a_step_gets_every_step(seen: Seen, change: str) -> None:
    moe, x = _layer(), _x()
    o, loss = moe(x)
    handle = CHANGES[change](moe)
    with handle if hasattr(handle, "__exit__") else nullcontext():
        assert _same([o, loss], list(moe(x)))
    assert seen.take()[1] == 1


def test_a_hook_may_replace_the_logits() -> None:
    moe, x = _layer(), _x()
    before = moe(x)[0]
    moe.router.register_forward_hook(lambda _m, _i, logits: -logits)
    assert not torch.equal(before, moe(x)[0])


def test_other_batches_are_taken_step_by_step(seen: Seen) -> None:
    moe = _layer()
    assert moe(_x(0))[0].shape == (0, H)
    crossed = _x(4, 3).transpose(0, 1)
    assert torch.equal(moe(crossed)[0], moe(crossed.contiguous())[0])
    assert seen.take()[1] == 1


def test_settings_and_weights_may_change_between_calls(seen: Seen) -> None:
    moe, x = _layer(**SETTINGS["rounding"]), _x()
    _compare(seen, moe, x)
    _compare(seen, moe.eval(), x)
    moe.train().rule = "up"
    _compare(seen, moe, x)
    moe.tile_m = 2
    _compare(seen, moe, x)
    _compare(seen, moe.half(), x.detach().half().requires_grad_())
    moe.backend = "torch"
    moe(x.half())
    assert seen.take()[1] == 0


def _shifted(t: Tensor) -> Tensor:
    """The same values, one element further in memory than a multiple of 16 bytes."""
    return t.detach().new_empty(t.numel() + 1)[1:].copy_(t.detach().flatten()).view_as(t)


def test_rows_may_begin_anywhere(seen: Seen) -> None:
    moe, x = _layer(), _x()
    expected = _results(moe, x, _both)
    given = _shifted(x).requires_grad_()
    assert given.is_contiguous() and given.data_ptr() % 16 == 2
    assert _same(_results(moe, given, _both), expected) and seen.take()[1] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda moe: moe.float(), "w1.dtype: got torch.float32, accepted torch.bfloat16, as x"),
        (lambda moe: setattr(moe, "w2", nn.Parameter(moe.w2[:, :, :8].contiguous())), "w1.shape: got"),
        (lambda moe: setattr(moe, "w1", nn.Parameter(moe.w1.mT.contiguous().mT)), "w1.stride"),
        (lambda moe: setattr(moe, "w2", nn.Parameter(_shifted(moe.w2))), "w2.data_ptr(): got 2 past"),
        (lambda moe: setattr(moe, "b2", nn.Parameter(moe.b2.float())), "b2.dtype: got torch.float32"),
    ],
)
def test_wrong_weights_are_named_before_a_launch(seen: Seen, change: Callable[[MoE], Any], message: str) -> None:
    moe, x = _layer(add_bias=True), _x()
    moe(x)
    seen.take()
    change(moe)
    for _ in range(2):
        with pytest.raises(InvalidArgument) as error:
            moe(x)
        assert message in str(error.value)
    assert seen.take()[0] == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_experts_per_tok", E + 1, "k: got 9, accepted 1 to E = 8"),
        ("routing", "top_k", "routing: got 'top_k', accepted one of topk, token_rounding"),
        ("scoring", "argmax", "scoring: got 'argmax'"),
        ("w1_layout", "blocked", "w1_layout: got 'blocked'"),
        ("backend", "triton", "backend: got 'triton'"),
        ("rule", "coin", "rule: got 'coin'"),
        ("tile_m", 0, "tile_m: got 0, accepted at least 1"),
    ],
)
def test_wrong_settings_are_named(name: str, value: Any, message: str) -> None:
    moe, x = _layer(**SETTINGS["rounding"] if name in ("rule", "tile_m") else {}), _x()
    moe(x)
    setattr(moe, name, value)
    with pytest.raises(InvalidArgument) as error:
        moe(x)
    assert message in str(error.value)
