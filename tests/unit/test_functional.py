"""What moe_experts refuses: each with one InvalidArgument, before any op runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from strategies import build_routing, build_weights, top_k_assigned
from torch import Tensor

import sonicmoe.functional
from sonicmoe import GPT_OSS, InvalidArgument, moe_experts
from sonicmoe.jit import target

T, E, K, H, I = 6, 4, 2, 16, 8  # noqa: E741
Arguments = dict[str, Any]


def _arguments() -> Arguments:
    x, w1, w2, b1, b2 = build_weights(T, E, H, I, "swiglu", bias=True, dtype=torch.float32)
    routing = build_routing(top_k_assigned(T, E, K), E)
    return {"x": x, "w1": w1, "w2": w2, "routing": routing, "b1": b1, "b2": b2}


def _with(**changes: Any) -> Callable[[Arguments], Arguments]:
    return lambda arguments: arguments | changes


def _on(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: arguments | {name: change(arguments[name])}


def _routing(**changes: Callable[[Any], Any]) -> Callable[[Arguments], Arguments]:
    def change(arguments: Arguments) -> Arguments:
        routing = arguments["routing"]
        return arguments | {"routing": routing._replace(**{k: f(getattr(routing, k)) for k, f in changes.items()})}

    return change


def _transposed(t: Tensor) -> Tensor:
    return t.detach().transpose(-1, -2).contiguous().transpose(-1, -2)


def _to_meta(t: Tensor) -> Tensor:
    return t.to("meta")


REFUSED = [
    ("a scalar x", _with(x=torch.tensor(1.0)), "x.shape: got ()"),
    ("no tensor x", _with(x=[1.0]), "x: got list, accepted a tensor"),
    ("an activation in b1's place", _with(b1="swiglu"), "b1: got str, accepted a tensor"),
    ("a buffer that is none", _with(w1_grad=1), "w1_grad: got int, accepted a tensor"),
    ("H = 0", _with(x=torch.ones(2, 3, 0), w2=torch.ones(E, 0, I)), "x.shape: got (2, 3, 0), accepted (..., H)"),
    ("I = 0", _with(w2=torch.ones(E, H, 0)), "w2.shape: got (4, 16, 0)"),
    ("E = 0", _with(w2=torch.ones(0, H, I)), "w2.shape: got (0, 16, 8)"),
    ("integer x", _with(x=torch.ones(T, H, dtype=torch.int32)), "x.dtype: got torch.int32"),
    ("complex x", _with(x=torch.ones(T, H, dtype=torch.complex64)), "x.dtype: got torch.complex64"),
    ("fp8 x", _with(x=torch.ones(T, H).to(torch.float8_e4m3fn)), "x.dtype: got torch.float8_e4m3fn"),
    ("x of another H", _on("x", lambda t: t[:, 1:]), "w2.shape: got (4, 16, 8), accepted (E, H, I) with H = 15"),
    ("w2 of two dimensions", _on("w2", lambda t: t[0]), "w2.shape: got (16, 8)"),
    ("w2 transposed", _on("w2", lambda t: t.mT), "w2.shape: got (4, 8, 16)"),
    ("w2 strided", _on("w2", _transposed), "w2.stride()"),
    ("w2 in bf16", _on("w2", Tensor.bfloat16), "w2.dtype: got torch.bfloat16, accepted torch.float32"),
    ("w2 elsewhere", _on("w2", _to_meta), "w2.device: got meta, accepted cpu"),
    ("w1 without up rows", _on("w1", lambda t: t[:, :I]), "w1.shape: got (4, 8, 16), accepted (4, 16, 16)"),
    ("w1 with up rows, plain", _with(activation="gelu"), "w1.shape: got (4, 16, 16), accepted (4, 8, 16)"),
    ("w1 of fewer experts", _on("w1", lambda t: t[:3]), "w1.shape: got (3, 16, 16)"),
    ("w1 strided", _on("w1", _transposed), "w1.stride()"),
    ("w1 in fp64", _on("w1", Tensor.double), "w1.dtype: got torch.float64, accepted torch.float32"),
    ("w1 elsewhere", _on("w1", _to_meta), "w1.device: got meta"),
    ("b1 of H", _on("b1", lambda t: t[:, :3]), "b1.shape: got (4, 3), accepted (4, 16)"),
    ("b1 in fp16", _on("b1", Tensor.half), "b1.dtype: got torch.float16"),
    ("b1 elsewhere", _on("b1", _to_meta), "b1.device: got meta"),
    ("b1 strided", _on("b1", _transposed), "b1.stride()"),
    ("b2 of I", _on("b2", lambda t: t[:, :I]), "b2.shape: got (4, 8), accepted (4, 16)"),
    ("b2 in fp16", _on("b2", Tensor.half), "b2.dtype: got torch.float16"),
    ("routing is a tuple", _with(routing=(1, 2)), "routing: got tuple"),
    ("routing of other tokens", _on("x", lambda t: t[:-1]), "routing.num_tokens: got 6, accepted 5"),
    ("routing of other experts", _routing(cu_rows=lambda t: t[:-1]), "routing.num_experts: got 3, accepted 4"),
    ("scores in bf16", _routing(scores=Tensor.bfloat16), "routing.scores.dtype: got torch.bfloat16"),
    ("scores in fp64", _routing(scores=Tensor.double), "routing.scores.dtype: got torch.float64"),
    ("scores elsewhere", _routing(scores=_to_meta), "routing.scores.device: got meta, accepted cpu"),
    ("row_token elsewhere", _routing(row_token=_to_meta), "routing.row_token.device: got meta, accepted cpu"),
    ("row_token in int64", _routing(row_token=Tensor.long), "routing.row_token.dtype: got torch.int64"),
    ("cu_rows in int64", _routing(cu_rows=Tensor.long), "routing.cu_rows.dtype: got torch.int64"),
    ("slot_row strided", _routing(slot_row=lambda t: t.repeat(2)[::2]), "routing.slot_row.stride(): got (2,)"),
    ("fewer scores than slots", _routing(scores=lambda t: t[1:]), "routing.scores.shape: got (11,), accepted (12,)"),
    ("row_slot of other rows", _routing(row_slot=lambda t: t[1:]), "routing.row_slot.shape: got (11,), accepted (12,)"),
    ("slots not K per token",
     _routing(scores=lambda t: t[1:], slot_row=lambda t: t[1:]), "routing.slot_row.shape: got (11,)"),
    ("cu_slots of other tokens",
     _routing(cu_slots=lambda _: torch.zeros(3, dtype=torch.int32)), "routing.cu_slots.shape: got (3,), accepted (7,)"),
    ("unknown activation", _with(activation="mish"), "activation: got 'mish', accepted one of swiglu"),
    ("unknown layout", _with(w1_layout="blocked"), "w1_layout: got 'blocked', accepted one of concat, interleaved"),
    ("plain, interleaved", _with(activation="relu", w1_layout="interleaved"), "w1_layout: got 'interleaved'"),
    ("unknown backend", _with(backend="triton"), "backend: got 'triton', accepted one of auto, cute, torch"),
    ("cute without a Hopper", _with(backend="cute"), "backend: got 'cute' with x on cpu"),
    ("w1_grad in bf16", _with(w1_grad=torch.zeros(E, 2 * I, H).bfloat16()), "w1_grad.dtype: got torch.bfloat16"),
    ("w1_grad of another shape", _with(w1_grad=torch.zeros(E, I, H)), "w1_grad.shape: got (4, 8, 16)"),
    ("w1_grad in a graph", _with(w1_grad=torch.zeros(E, 2 * I, H).requires_grad_()), "w1_grad.requires_grad: got True"),
    ("w2_grad strided", _with(w2_grad=torch.zeros(E, I, H).mT), "w2_grad.stride()"),
    ("w2_grad elsewhere", _with(w2_grad=torch.zeros(E, H, I, device="meta")), "w2_grad.device: got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_before_any_op(
    change: Callable[[Arguments], Arguments], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_op(*_: Any, **__: Any) -> None:
        raise AssertionError("an op ran")

    monkeypatch.setattr(sonicmoe.functional, "forward_steps", no_op)
    monkeypatch.setattr(sonicmoe.functional.MoEExperts, "apply", no_op)
    with pytest.raises(InvalidArgument) as error:
        moe_experts(**change(_arguments()))
    assert message in str(error.value)


def test_what_they_change_is_accepted_unchanged() -> None:
    assert moe_experts(**_arguments()).shape == (T, H)
    assert moe_experts(**_arguments(), activation=GPT_OSS, w1_layout="interleaved", backend="torch").shape == (T, H)


def _on_hopper(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Callable[..., str]:
    """`resolve_backend` for tensors that are as on a GPU of this capability."""
    monkeypatch.setattr(target, "capability", lambda device: capability)

    def resolve(
        backend: str, dtype: torch.dtype = torch.bfloat16, hidden: int = H, inter: int = I, experts: int = E, tokens=T
    ) -> str:
        x = torch.empty((), dtype=dtype).expand(tokens, hidden)
        return sonicmoe.functional.resolve_backend(
            backend, x, torch.empty(experts, hidden, inter, dtype=dtype, device="meta")
        )

    return resolve


def test_auto_takes_the_kernels_on_hopper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = _on_hopper(monkeypatch)
    assert [resolve("auto"), resolve("cute"), resolve("torch")] == ["cute", "cute", "torch"]
    assert resolve("auto", torch.float16) == "cute"
    monkeypatch.setattr(target, "capability", lambda device: (10, 0))
    assert resolve("auto") == "torch"


@pytest.mark.parametrize("backend", ["auto", "cute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_slow_path_for_wide_dtypes_on_hopper(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = _on_hopper(monkeypatch)
    with pytest.raises(InvalidArgument, match="x.dtype.*cast.*backend='torch'"):
        resolve(backend, dtype)
    assert resolve("torch", dtype) == "torch"


@pytest.mark.parametrize(("hidden", "inter"), [(12, 8), (16, 4), (16, 7)])
def test_multiples_of_8_on_hopper(hidden: int, inter: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = _on_hopper(monkeypatch)
    with pytest.raises(InvalidArgument, match=f"H = {hidden}, I = {inter}.*multiples of 8"):
        resolve("cute", hidden=hidden, inter=inter)
    assert resolve("torch", hidden=hidden, inter=inter) == "torch"


@pytest.mark.parametrize(
    "sizes", [{"hidden": 65544}, {"experts": 1025}, {"hidden": 65536, "tokens": (1 << 19) + 1}], ids=str
)
def test_most_on_hopper(sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = _on_hopper(monkeypatch)
    with pytest.raises(InvalidArgument, match=r"x.shape.* up to .*backend='torch'"):
        resolve("auto", **sizes)
    assert resolve("torch", **sizes) == "torch"
    assert resolve("auto", hidden=65536, experts=1024, tokens=1 << 19) == "cute"


def test_weights_begin_where_16_bytes_do() -> None:
    memory = torch.zeros(E * H * I + 8).bfloat16()
    for start in (0, 8):
        sonicmoe.functional.check_alignment(w2=memory[start : start + E * H * I].view(E, H, I), b1=None)
    with pytest.raises(InvalidArgument, match=r"w2.data_ptr\(\): got 6 past a multiple of 16 bytes"):
        sonicmoe.functional.check_alignment(b1=memory, w2=memory[3 : 3 + E * H * I].view(E, H, I))


def test_forward_mode_raises() -> None:
    arguments = _arguments()
    x = arguments.pop("x")
    for differentiate in (torch.func.jvp, _dual, lambda f, primals, _: torch.func.jacfwd(f)(*primals)):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"), torch.no_grad():
            differentiate(lambda t: moe_experts(t, **arguments), (x,), (x,))


def test_another_tensor_may_be_dual() -> None:
    arguments = _arguments()
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        torch.autograd.forward_ad.make_dual(arguments["x"].clone(), arguments["x"])
        assert torch.equal(moe_experts(**arguments), moe_experts(**_arguments()))


def _dual(function: Callable[[Tensor], Tensor], primals: tuple[Tensor], tangents: tuple[Tensor]) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(primals[0], tangents[0]))


def test_on_meta_tensors() -> None:
    arguments = {name: _to_meta(t) for name, t in _arguments().items() if isinstance(t, Tensor)}
    routing = sonicmoe.route_topk(torch.empty(T, E, device="meta"), K)
    o = moe_experts(**arguments, routing=routing)
    assert o.shape == (T, H) and o.device.type == "meta"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_cute_needs_capability_9_0(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = _on_hopper(monkeypatch, capability)
    with pytest.raises(InvalidArgument, match="compute capability {}.{}".format(*capability)):
        resolve("cute")
