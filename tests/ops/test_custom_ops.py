"""The ops as torch sees them: schemas, fakes with symbolic sizes, and what happens to a wrong backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import build_routing, build_weights, ragged_assigned, top_k_assigned
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from sonicmoe import InvalidArgument, ops, reference
from sonicmoe.ops._op import define

T, E, K, H, I = 5, 4, 2, 6, 3  # noqa: E741


def _calls(ragged: bool = False, dtype: torch.dtype = torch.float32, bias: bool = True) -> dict[str, tuple[Any, ...]]:
    """For each op the arguments of one call, without the backend."""
    assigned = ragged_assigned(T, E) if ragged else top_k_assigned(T, E, K)
    scores, cu_rows, row_token, row_slot, slot_row, cu_slots, _ = build_routing(assigned, E, padding=4 * ragged)
    weights = build_weights(T, E, H, I, "swiglu", bias=bias, dtype=dtype)
    x, w1, w2, b1, b2 = (None if t is None else t.detach() for t in weights)
    h, a = reference.up_proj(x, w1, b1, cu_rows, row_token, "swiglu", "concat", True)
    y = reference.down_proj(a, w2, b2, cu_rows)
    do = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    dh, a_s, parts = reference.down_dgrad(do, w2, b2, h, scores, cu_rows, row_token, row_slot, "swiglu")
    logits, draws = 3 * do[:, :E], torch.rand(E, generator=torch.Generator().manual_seed(2)).to(scores.dtype)
    rounded = reference.token_rounding(logits, None, K, 2, "up", T * E)
    return {
        "up_proj": (x, w1, b1, cu_rows, row_token, "swiglu", "interleaved", True),
        "up_proj without h": (x, w1, b1, cu_rows, row_token, "swiglu", "concat", False),
        "up_proj plain": (x, w1, b1, cu_rows, row_token, "relu2", "concat", True),
        "down_proj": (a, w2, b2, cu_rows),
        "aggregate": (y, scores, None, slot_row, cu_slots, T),
        "aggregate with parts": (y, None, parts, slot_row, cu_slots, T),
        "down_dgrad": (do, w2, b2, h, scores, cu_rows, row_token, row_slot, "swiglu"),
        "down_dgrad_": (do, w2, b2, h.clone(), scores, cu_rows, row_token, row_slot, "swiglu"),
        "down_wgrad": (do, a_s, cu_rows, row_token),
        "down_wgrad_add_": (torch.ones_like(w2, dtype=torch.float32), do, a_s, cu_rows, row_token),
        "down_wgrad_aggregate_": (
            torch.ones_like(w2),
            False,
            do,
            a_s,
            cu_rows,
            row_token,
            y,
            parts,
            slot_row,
            cu_slots,
        ),
        "down_wgrad_aggregate_ add_": (
            *(torch.ones_like(w2, dtype=torch.float32), True, do, a_s, cu_rows, row_token),
            *(y, None, slot_row, cu_slots),
        ),
        "up_dgrad": (dh, w1, cu_rows, "concat"),
        "up_wgrad": (x, dh, cu_rows, row_token, "interleaved"),
        "up_wgrad_add_": (torch.ones_like(w1, dtype=torch.float32), x, dh, cu_rows, row_token, "concat"),
        "bias_grad": (dh, cu_rows, None, None, None),
        "bias_grad weighted": (do, cu_rows, row_token, scores, row_slot),
        "plan": (torch.tensor([[2, 0], [1, E], [-1, 2]]), None, E),
        "plan with tokens": (torch.tensor([2, 0, 1, E, 3], dtype=torch.int32), torch.arange(5, dtype=torch.int32), E),
        "token_rounding": (logits, None, K, 2, "nearest", T * E),
        "token_rounding stochastic": (logits, draws, K, 2, "stochastic_mass", T * E),
        "token_rounding_backward": (torch.ones_like(rounded.scores), logits, *rounded[-3:]),
        "token_rounding_backward_add_": (2 * logits, torch.ones_like(rounded.scores), logits, *rounded[-3:]),
    }


CALLS = list(_calls())


def _op(call: str) -> Callable[..., Any]:
    return getattr(ops, call.split()[0])


@pytest.mark.unpoisoned
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck(call: str, ragged: bool) -> None:
    torch.library.opcheck(_op(call), (*_calls(ragged)[call], "torch"))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
def test_fakes_give_the_shapes_and_dtypes_of_the_reference(call: str, dtype: torch.dtype, bias: bool) -> None:
    arguments = (*_calls(True, dtype, bias)[call], "torch")
    real = _op(call)(*arguments)
    with FakeTensorMode() as mode:
        faked = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = _op(call)(*faked)
    as_tuple = (lambda r: r) if isinstance(real, tuple) else (lambda r: () if r is None else (r,))
    assert len(as_tuple(real)) == len(as_tuple(fake))
    for a, b in zip(as_tuple(real), as_tuple(fake), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("call", CALLS)
def test_rows_of_no_expert_are_zero_and_nothing_is_left_unwritten(call: str) -> None:
    """With poisoned torch.empty; what the padding of an input holds is not read."""
    arguments = list(_calls(ragged=True)[call])
    num_rows = int(_calls(ragged=True)["down_proj"][3][-1])
    expected = _op(call)(*(a.clone() if isinstance(a, torch.Tensor) else a for a in arguments), "torch")
    buffer_rows = _calls(ragged=True)["down_proj"][0].shape[0]
    for i, a in enumerate(arguments):
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.dim() == 2 and a.shape[0] == buffer_rows:
            arguments[i] = torch.cat((a[:num_rows], torch.full_like(a[num_rows:], float("nan"))))
    actual = _op(call)(*arguments, "torch")
    for a, b in zip(_tensors(actual), _tensors(expected), strict=True):
        assert torch.equal(a, b) and torch.isfinite(a).all()
        if a.dim() == 2 and a.shape[0] == buffer_rows:
            assert not a[num_rows:].any()


def _tensors(result: Any) -> list[torch.Tensor]:
    return [] if result is None else list(result) if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_backend_raises(call: str) -> None:
    with pytest.raises(InvalidArgument, match="backend: got 'triton'"):
        _op(call)(*_calls()[call], "triton")


def test_an_op_without_a_kernel_says_so_and_one_with_it_runs_it() -> None:
    without = define("probe_without(Tensor x, str backend) -> Tensor", fake=lambda x, _: x, reference=torch.neg)
    both = define(
        "probe_both(Tensor x, str backend) -> Tensor", fake=lambda x, _: x, reference=torch.neg, cute=torch.exp
    )
    x = torch.ones(3)
    with pytest.raises(
        InvalidArgument, match="backend: got 'cute', accepted 'torch': probe_without has no CuTe kernel"
    ):
        without(x, "cute")
    assert torch.equal(without(x, "torch"), -x) and torch.equal(both(x, "torch"), -x)
    assert torch.equal(both(x, "cute"), x.exp())


def test_the_dispatcher_is_left_out_only_where_it_has_nothing_to_do() -> None:
    x = torch.ones(3)
    watched: list[bool] = []

    def look(t: torch.Tensor) -> torch.Tensor:
        watched.append(ops.steps(t) is ops)
        return t

    look(x)
    look(torch.nn.Parameter(x))
    assert watched == [False, False]
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
        look(x)
    look(x.to("meta"))
    torch.vmap(look)(x)
    torch.func.grad(lambda t: look(t).sum())(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        look(x)
    look(TwoTensor(x, x))
    assert watched[2:] == [True] * 7
    assert ops.steps(x, None, TwoTensor(x, x)) is ops, "also where only a weight is more than a tensor"
    assert ops.steps(x, None, x) is ops.bodies
    look(x)
    assert watched[-1] is False


@pytest.mark.parametrize("call", CALLS)
def test_bodies_give_what_the_ops_give(call: str) -> None:
    arguments = _calls(ragged=True)[call]
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    op, body = _op(call), getattr(ops.bodies, call.split()[0])
    before = [a._version if isinstance(a, torch.Tensor) else 0 for a in copies]
    for a, b in zip(_tensors(op(*arguments, "torch")), _tensors(body(*copies, "torch")), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True) if isinstance(a, torch.Tensor))
    mutated = [a._version > v for a, v in zip(copies, before, strict=True) if isinstance(a, torch.Tensor)]
    assert mutated.count(True) == call.endswith("_")
    with pytest.raises(InvalidArgument, match="backend: got 'triton'"):
        body(*copies, "triton")


def test_the_backend_must_come_last() -> None:
    with pytest.raises(ValueError, match="must be 'str backend'"):
        define("probe_order(str backend, Tensor x) -> Tensor", fake=lambda _, x: x, reference=torch.neg)


@pytest.mark.parametrize("op", ["down_wgrad", "up_wgrad"])
def test_adding_adds_what_the_other_op_returns(op: str) -> None:
    buffer, *arguments = _calls(ragged=True)[f"{op}_add_"]
    added = getattr(ops, op)(*arguments, "torch")
    version = buffer._version
    assert getattr(ops, f"{op}_add_")(buffer, *arguments, "torch") is None
    torch.testing.assert_close(buffer, added + 1)
    assert added.abs().max() > 0.1
    assert buffer._version > version


def test_empty_experts_have_zero_gradients() -> None:
    calls = _calls(ragged=True)
    counts = calls["down_proj"][3].diff()
    empty = (counts == 0).nonzero().squeeze(1)
    assert empty.numel() > 0
    for call in ("down_wgrad", "up_wgrad", "bias_grad", "bias_grad weighted"):
        gradient = _op(call)(*calls[call], "torch")
        assert not gradient[empty].any() and gradient[counts > 0].abs().amax() > 0.1
