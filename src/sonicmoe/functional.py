"""The layer as a checked function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sonicmoe import ops
from sonicmoe.activations import Activation
from sonicmoe.autograd import Form, MoEExperts, forward_steps
from sonicmoe.errors import InvalidArgument
from sonicmoe.jit import target
from sonicmoe.routing import Routing

LAYOUTS = ("concat", "interleaved")
BACKENDS = ("auto", "cute", "torch")
# TMA moves rows whose pitch is a multiple of 16 bytes.
_MULTIPLE = 8
_CUTE_DTYPES = (torch.bfloat16, torch.float16)
_DTYPES = (*_CUTE_DTYPES, torch.float32, torch.float64)


def moe_experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    routing: Routing,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str | Activation = "swiglu",
    w1_layout: str = "concat",
    backend: str = "auto",
    w1_grad: Tensor | None = None,
    w2_grad: Tensor | None = None,
) -> Tensor:
    """The experts of a MoE layer: o[t] = sum over the rows r of token t of score[r] * (act(x w1[e]^T) w2[e]^T).

    Args:
        x: (..., H), flattened to (T, H). One that is not contiguous, or does not begin at a multiple of 16 bytes, is
            copied.
        w1: (E, 2*I, H) for a gated activation, (E, I, H) for a plain one; contiguous, in x's dtype and on its device.
        w2: (E, H, I), likewise.
        routing: of T tokens to E experts, from one of the `route_*` functions; differentiable in `routing.scores`.
        b1, b2: biases (E, 2*I or I) and (E, H), in x's dtype; b1 in the layout of w1.
        activation: a name such as "swiglu", "geglu_tanh", "swiglu(limit=7.0)", or an `Activation` such as `GPT_OSS`.
        w1_layout: "concat": an expert's gate rows, then its up rows; "interleaved": gate and up rows alternate (gated
            activations only).
        backend: "cute": kernels for Hopper (compute capability 9.0), x in bf16 or fp16, H and I multiples of 8;
            "torch": the reference, on any device, also fp32 and fp64; "auto": "cute" on Hopper, "torch" elsewhere.
        w1_grad, w2_grad: fp32 buffers of the shapes of w1 and w2. The backward adds the weight's gradient to its
            buffer, without a temporary, instead of returning it: the weight's own `.grad` stays as it is (Megatron's
            `main_grad`). A buffer is left alone if its weight requires no gradient.

    Returns:
        o, with x's shape and dtype: sums in fp32, rounded once per stored tensor (docs/numerics.md).

    Under torch.autocast x, weights and biases are cast to its dtype, as torch.nn.Linear does. Never synchronises with
    the device (backend "torch" on a GPU does). One backward only: differentiating it again raises, and so does
    forward-mode differentiation.

    Raises:
        InvalidArgument: before anything is launched; the message says what came and what is accepted.

    Source: SonicMoE (arXiv 2512.14080), algorithms 2 and 3.
    """
    act = Activation.parse(activation)
    gated = act.gated
    _check_are_tensors(x=x, w1=w1, w2=w2, b1=b1, b2=b2, w1_grad=w1_grad, w2_grad=w2_grad)
    x, w1, w2, b1, b2 = as_autocast(x, w1, w2, b1, b2)
    check_layout(w1_layout, gated)
    check_tensors(x, w1, w2, b1, b2, gated)
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    check_routing(routing, tokens, w1.shape[0])
    if ops.has_tangents((x, w1, w2, b1, b2, routing.scores)):
        raise RuntimeError("sonicmoe.moe_experts has no forward-mode derivative (torch.func.jvp, dual numbers)")
    _check_grad_buffers(w1, w2, w1_grad, w2_grad)
    backend = resolve_backend(backend, x, w2)
    if backend == "cute":
        check_alignment(w1=w1, w2=w2, b1=b1, b2=b2, w1_grad=w1_grad, w2_grad=w2_grad)
    tokens = ops.as_read(tokens)
    if routing.row_token.shape[0] == 0:
        # Nothing to multiply: the reference fills the zeros, and does not synchronise for that.
        backend = "torch"
    form = Form(str(act), w1_layout, backend)
    scores, cu_rows, row_token, row_slot, slot_row, cu_slots, _ = routing
    plan = (cu_rows, row_token, row_slot, slot_row, cu_slots)
    training = needs_gradient(tokens, w1, w2, b1, b2, scores)
    if backend == "cute" and not torch.compiler.is_compiling():
        sizes, biases = (w2.shape[0], w2.shape[1], w2.shape[2]), (b1 is not None, b2 is not None)
        per_token = slot_row.shape[0] // tokens.shape[0] if cu_slots is None else None
        experts = ops.Experts(sizes, x.dtype, form.activation, w1_layout, biases, per_token, training)
        ops.compile_layer(tokens.device.index, experts)
    if training:
        o = MoEExperts.apply(tokens, w1, w2, b1, b2, scores, *plan, w1_grad, w2_grad, form)
    else:
        run = ops.steps(tokens, w1, w2, b1, b2, scores, *plan)
        o, _ = forward_steps(run, tokens, (w1, w2, b1, b2), scores, plan, form, keep_h=False)
    return o if x.dim() == 2 else o.view(x.shape)


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks for on t's device; None without it."""
    device = t.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def as_autocast(first: Tensor, *others: Tensor | None) -> list[Any]:
    """Tensors in torch.autocast's dtype, unless the first is in fp64."""
    dtype = autocast_dtype(first)
    if dtype is None or not first.is_floating_point() or first.dtype is torch.float64:
        return [first, *others]
    return [t if t is None else t.to(dtype) for t in (first, *others)]


def scores_for(x: Tensor, scores: Tensor) -> Tensor:
    """Scores of any floating dtype in fp32, which they are used in; fp64 ones stay so for an x in fp64."""
    if not scores.is_floating_point():
        raise InvalidArgument("scores.dtype", scores.dtype, "a floating dtype")
    both = scores.dtype is x.dtype is torch.float64
    return scores.to(torch.float64 if both else torch.float32)


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record what is done with these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_layout(w1_layout: str, gated: bool) -> None:
    """Raise InvalidArgument unless w1 can be laid out so."""
    if w1_layout not in LAYOUTS:
        raise InvalidArgument("w1_layout", repr(w1_layout), f"one of {', '.join(LAYOUTS)}")
    if w1_layout == "interleaved" and not gated:
        raise InvalidArgument("w1_layout", "'interleaved'", "'concat': a plain activation has no gate and up rows")


def _check_are_tensors(x: Tensor, w1: Tensor, w2: Tensor, **others: Tensor | None) -> None:
    for name, t in (("x", x), ("w1", w1), ("w2", w2), *((n, t) for n, t in others.items() if t is not None)):
        if not isinstance(t, Tensor):
            raise InvalidArgument(name, type(t).__name__, "a tensor")


def check_tensors(x: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None, gated: bool) -> None:
    """Dtypes, devices, shapes and contiguity of everything but the routing."""
    if x.dim() == 0 or x.shape[-1] == 0:
        raise InvalidArgument("x.shape", tuple(x.shape), "(..., H) with H >= 1")
    dtype, device, hidden = x.dtype, x.device, x.shape[-1]
    if dtype not in _DTYPES:
        raise InvalidArgument("x.dtype", dtype, "bfloat16, float16, or with backend 'torch' float32 or float64")
    if w2.dim() != 3 or w2.shape[1] != hidden or w2.shape[0] == 0 or w2.shape[2] == 0:
        accepted = f"(E, H, I) with H = {hidden}, as x.shape[-1], and E and I >= 1"
        raise InvalidArgument("w2.shape", tuple(w2.shape), accepted)
    experts, inter = w2.shape[0], w2.shape[2]
    width = 2 * inter if gated else inter
    check_operand("w1", w1, (experts, width, hidden), dtype, device)
    check_operand("w2", w2, (experts, hidden, inter), dtype, device)
    if b1 is not None:
        check_operand("b1", b1, (experts, width), dtype, device)
    if b2 is not None:
        check_operand("b2", b2, (experts, hidden), dtype, device)


def check_operand(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """A weight, a bias or a buffer: shape, x's dtype and device, contiguity."""
    if t.shape != shape:
        of = "(E, 2*I or I, H), from w2 and the activation" if name == "w1" else "from x and w2"
        raise InvalidArgument(f"{name}.shape", tuple(t.shape), f"{shape}: {of}")
    if t.dtype != dtype:
        raise InvalidArgument(f"{name}.dtype", t.dtype, f"{dtype}, as x")
    if t.device != device:
        raise InvalidArgument(f"{name}.device", t.device, f"{device}, as x")
    if not t.is_contiguous():
        raise InvalidArgument(f"{name}.stride()", t.stride(), "contiguous: a copy of it per call would be silent")


def check_routing(routing: Routing, tokens: Tensor, experts: int) -> None:
    """Of these tokens to so many experts."""
    if not isinstance(routing, Routing):
        raise InvalidArgument(
            "routing", type(routing).__name__, "a sonicmoe.Routing, from one of the route_* functions"
        )
    scores, cu_rows, row_token, row_slot, slot_row, cu_slots, num_tokens = routing
    if num_tokens != tokens.shape[0]:
        raise InvalidArgument("routing.num_tokens", num_tokens, f"{tokens.shape[0]}, the tokens of x")
    if cu_rows.shape[0] != experts + 1:
        raise InvalidArgument("routing.num_experts", cu_rows.shape[0] - 1, f"{experts}, the experts of w1 and w2")
    if scores.dtype != torch.float32 and not scores.dtype == tokens.dtype == torch.float64:
        raise InvalidArgument("routing.scores.dtype", scores.dtype, "torch.float32")
    _check_vector("scores", scores, slot_row.shape[0], scores.dtype, tokens.device)
    _check_vector("cu_rows", cu_rows, experts + 1, torch.int32, tokens.device)
    _check_vector("row_token", row_token, row_token.shape[0], torch.int32, tokens.device)
    _check_vector("row_slot", row_slot, row_token.shape[0], torch.int32, tokens.device)
    _check_vector("slot_row", slot_row, slot_row.shape[0], torch.int32, tokens.device)
    if cu_slots is not None:
        _check_vector("cu_slots", cu_slots, num_tokens + 1, torch.int32, tokens.device)
    elif slot_row.shape[0] % max(num_tokens, 1):
        got = tuple(slot_row.shape)
        raise InvalidArgument("routing.slot_row.shape", got, f"a multiple of T = {num_tokens} where cu_slots is None")


def _check_vector(name: str, t: Tensor, length: int, dtype: torch.dtype, device: torch.device) -> None:
    if t.dim() != 1 or t.shape[0] != length:
        raise InvalidArgument(f"routing.{name}.shape", tuple(t.shape), f"({length},)")
    if t.dtype != dtype:
        raise InvalidArgument(f"routing.{name}.dtype", t.dtype, str(dtype))
    if t.device != device:
        raise InvalidArgument(f"routing.{name}.device", t.device, f"{device}, as x")
    if not t.is_contiguous():
        raise InvalidArgument(f"routing.{name}.stride()", t.stride(), "contiguous")


def _check_grad_buffers(w1: Tensor, w2: Tensor, w1_grad: Tensor | None, w2_grad: Tensor | None) -> None:
    for name, buffer, weight in (("w1_grad", w1_grad, w1), ("w2_grad", w2_grad, w2)):
        if buffer is not None:
            check_operand(name, buffer, tuple(weight.shape), torch.float32, weight.device)
            if buffer.requires_grad:
                raise InvalidArgument(
                    f"{name}.requires_grad", True, "False: it is added to in place, unseen by autograd"
                )


def check_alignment(**tensors: Tensor | None) -> None:
    """The kernels read weights and biases in place, 16 bytes at a time; a view may begin in between.

    Traced tensors have no address.
    """
    if ops.is_traced(tuple(tensors.values())):
        return
    for name, t in tensors.items():
        if t is not None and t.data_ptr() % ops.ALIGNMENT:
            got = f"{t.data_ptr() % ops.ALIGNMENT} past a multiple of {ops.ALIGNMENT} bytes"
            raise InvalidArgument(f"{name}.data_ptr()", got, f"a multiple of {ops.ALIGNMENT}, or backend='torch'")


def resolve_backend(backend: str, x: Tensor, w2: Tensor) -> str:
    """Return "cute" or "torch"; raise where the backend asked for cannot run, rather than take a slow one instead."""
    if backend == "torch":
        return backend
    if backend not in BACKENDS:
        raise InvalidArgument("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    if not target.is_hopper(x.device):
        if backend == "auto":
            return "torch"
        capability = target.capability(x.device)
        where = str(x.device) if capability is None else "compute capability {}.{}".format(*capability)
        raise InvalidArgument("backend", f"'cute' with x on {where}", "'cute' on compute capability 9.0 only")
    if x.dtype not in _CUTE_DTYPES:
        raise InvalidArgument("x.dtype", x.dtype, "bfloat16 or float16 for the kernels; cast it, or backend='torch'")
    hidden, (experts, _, inter) = x.shape[-1], w2.shape
    if hidden % _MULTIPLE or inter % _MULTIPLE:
        got = f"H = {hidden}, I = {inter}"
        raise InvalidArgument("x.shape, w2.shape", got, "H and I multiples of 8 for the kernels; or backend='torch'")
    if hidden > ops.MAX_WIDTH or experts > ops.MAX_GROUPS:
        accepted = f"H up to {ops.MAX_WIDTH}, E up to {ops.MAX_GROUPS} for the kernels; or backend='torch'"
        raise InvalidArgument("x.shape, w2.shape", f"H = {hidden}, E = {experts}", accepted)
    # A traced number of tokens is left alone: a bound on it would be a guard.
    if not ops.is_traced((x,)) and x.numel() > ops.MAX_GATHERED:
        accepted = f"up to {ops.MAX_GATHERED} elements, 64 GiB, for the kernels; or backend='torch'"
        raise InvalidArgument("x.shape", tuple(x.shape), accepted)
    return "cute"
