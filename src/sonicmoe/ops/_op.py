"""How a step becomes a custom op: the only place that talks to torch.library.

Low-level definitions rather than `torch.library.custom_op`, whose Python wrapper costs tens of microseconds per call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sonicmoe.errors import InvalidArgument

# The bodies of the ops, by name: called as the ops are, without torch's dispatcher.
bodies = SimpleNamespace()
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
_library = torch.library.Library("sonicmoe", "DEF")


def define(
    schema: str,
    *,
    fake: Callable[..., Any],
    reference: Callable[..., Any],
    cute: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define the op sonicmoe::<schema> and return it, ready to be called.

    schema      its first argument is a tensor, its last `str backend`, which chooses the body: "torch" or "cute".
    fake        shapes and dtypes of the results; takes every argument of the schema, also the backend.
    reference   body of "torch"; takes every argument but the backend.
    cute        body of "cute", likewise: it launches the CuTe kernel on the current device and stream, those of the
                first argument. Without one, "cute" raises InvalidArgument.

    Arguments that the schema marks as mutated, `Tensor(a!)`, get a new version, so that autograd notices.
    """
    name = schema[: schema.index("(")]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.sonicmoe, name).default
    if op._schema.arguments[-1].name != "backend":
        raise ValueError(f"the last argument of {schema} must be 'str backend'")
    mutated = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def body(*arguments: Any) -> Any:
        backend, first = arguments[-1], arguments[0]
        if backend == "cute":
            if cute is None:
                raise InvalidArgument("backend", "'cute'", f"'torch': {name} has no CuTe kernel")
            if first.is_cuda and first.get_device() != torch._C._cuda_getDevice():
                with torch.cuda.device(first.device):
                    result = cute(*arguments[:-1])
            else:
                result = cute(*arguments[:-1])
        elif backend == "torch":
            result = _without_autocast(reference, arguments[:-1])
        else:
            raise InvalidArgument("backend", repr(backend), "'torch' or 'cute'")
        for i in mutated:
            torch.autograd.graph.increment_version(arguments[i])
        return result

    setattr(bodies, name, body)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sonicmoe::{name}", fake, lib=_library)
    return op


def is_watched(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the dispatcher would do more for ops on these tensors than to call their bodies.

    As when something is traced, transformed or profiled, under a mode, or for a subclass such as DTensor, which has no
    memory of its own for a kernel to read. Only for calls that record no gradient.
    """
    return is_traced(tensors) or torch.autograd._profiler_enabled()


def is_traced(tensors: tuple[Tensor | None, ...]) -> bool:
    """The same, but a profiler alone does not count."""
    return (
        torch.compiler.is_compiling()
        or not _PLAIN.issuperset(map(type, tensors))
        or any(t.is_meta for t in tensors[:1] if t is not None)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def has_tangents(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether one of these is a dual number, of forward-mode differentiation."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _without_autocast(reference: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Run the reference in the precision that it says, also when called under autocast."""
    device = arguments[0].device.type
    if not torch.is_autocast_enabled(device):
        return reference(*arguments)
    with torch.autocast(device, enabled=False):
        return reference(*arguments)
