"""transformers (5.x): importing this module registers the experts implementation `NAME`.

    import sonicmoe.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(..., experts_implementation="sonicmoe_experts")

or `model.set_experts_implementation("sonicmoe_experts")`. Nothing is patched: the experts module, its weights and its
router stay transformers' own, and only the forward of the experts is ours. The name "sonicmoe" is transformers' own
for another implementation.

What the experts compute is decided by their own code: their `_apply_gate`, or `act_fn` without a gate, is run once on
a grid of values (see `recognise`). If it is one of `sonicmoe.activations`, the fused kernels run; if not, or if the
experts norm their outputs, the module's own functions run between the two grouped matrix products.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from sonicmoe.activations import Activation
from sonicmoe.autograd import Form, MoEExperts
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import as_autocast, moe_experts, resolve_backend, scores_for
from sonicmoe.integrations.between import experts_with
from sonicmoe.integrations.recognise import recognise, remembered
from sonicmoe.routing import Routing, route_assigned

NAME = "sonicmoe_experts"

# What experts modules call their limits and alphas.
_CONSTANTS = ("limit", "swiglu_limit", "alpha", "swiglu_alpha")


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module, as `ExpertsInterface` calls it.

    Args:
        self: a module decorated with `use_experts_implementation`.
        hidden_states: (T, H).
        top_k_index: (T, K) integers; ids >= num_experts, expert parallelism's mark of experts elsewhere, are skipped.
        top_k_weights: (T, K), any floating dtype; used in fp32 (fp64 where the weights of the experts are).

    Returns:
        (T, H) in the dtype of hidden_states.

    Raises:
        InvalidArgument: on Hopper, for weights that are stored (E, in, out): see `lay_out_for_kernels`.
    """
    w1, w2, b1, b2 = _weights(self)
    w1, w2, x, b1, b2 = as_autocast(w1, w2, hidden_states, b1, b2)
    # Norms may leave fp32 behind where the weights are in bf16.
    x = x.to(w1.dtype)
    routing = route_assigned(top_k_index, scores_for(x, top_k_weights), num_experts=w1.shape[0])
    activation = None if _has_post_norm(self) else _activation(self)
    if activation is None:
        function = self._apply_gate if self.has_gate else self.act_fn
        after_down = self.post_expert_norm if _has_post_norm(self) else None
        o = experts_with(function, x, w1, w2, routing, b1, b2, after_down=after_down, backend=_backend(x, w1, w2))
    else:
        interleaved = self.has_gate and not self.is_concatenated
        layout = "interleaved" if interleaved else "concat"
        if w1.is_contiguous() and w2.is_contiguous():
            o = moe_experts(x, w1, w2, routing, b1, b2, activation=activation, w1_layout=layout)
        else:
            o = _strided(x, w1, w2, routing, b1, b2, Form(activation, layout, _backend(x, w1, w2)))
    return o.to(hidden_states.dtype)


def lay_out_for_kernels(model: nn.Module) -> nn.Module:
    """Store the weights of a model's transposed experts, such as gpt-oss', the way the kernels read them; once.

    Shapes, values, names and checkpoints stay the same: a weight (E, in, out) keeps its shape and gets the strides of a
    contiguous (E, out, in). Call it after loading and before an optimizer or a wrapper takes the parameters. Needs the
    memory of one weight more while it runs. Returns the model.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "is_transposed", False) and hasattr(module, "has_gate"):
            for weight in (module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj):
                weight.data = weight.data.transpose(1, 2).contiguous().transpose(1, 2)
    return model


def _weights(self: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """w1 (E, G*I, H), w2 (E, H, I), b1 (E, G*I), b2 (E, H): views of the module's parameters."""
    up = "gate_up_proj" if self.has_gate else "up_proj"
    w1, w2 = getattr(self, up), self.down_proj
    if self.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    if not self.has_bias:
        return w1, w2, None, None
    return w1, w2, getattr(self, f"{up}_bias"), self.down_proj_bias


def _has_post_norm(self: Any) -> bool:
    """Whether an expert's output is normed; only newer versions of transformers have such experts."""
    return getattr(self, "has_post_expert_norm", False)


def _activation(self: Any) -> str | None:
    """What the module's own function is; remembered as long as function, constants and training are the same."""
    function = type(self)._apply_gate if self.has_gate else None
    constants = [self.__dict__.get(name) for name in _CONSTANTS]
    return remembered(self, _recognised, self.training, function, getattr(self, "act_fn", None), *constants)


def _recognised(self: Any) -> Activation | None:
    act_fn = getattr(self, "act_fn", None)
    if isinstance(act_fn, nn.Module) and any(True for _ in act_fn.parameters()):
        return None
    numbers = [v for name in _CONSTANTS if isinstance(v := self.__dict__.get(name), int | float)]
    function = self._apply_gate if self.has_gate else self.act_fn
    return recognise(function, self.has_gate, self.has_gate and not self.is_concatenated, numbers)


def _backend(x: Tensor, w1: Tensor, w2: Tensor) -> str:
    backend = resolve_backend("auto", x, w2)
    if backend == "cute" and not (w1.is_contiguous() and w2.is_contiguous()):
        raise InvalidArgument(
            "experts' weights",
            f"stored (E, in, out), strides {w1.stride()} and {w2.stride()} seen as (E, out, in)",
            "stored (E, out, in): call sonicmoe.integrations.transformers.lay_out_for_kernels(model) once",
        )
    return backend


def _strided(
    x: Tensor, w1: Tensor, w2: Tensor, routing: Routing, b1: Tensor | None, b2: Tensor | None, form: Form
) -> Tensor:
    """`moe_experts` for views of transposed weights, which the torch backend reads as they are."""
    scores, cu_rows, row_token, row_slot, slot_row, cu_slots, _ = routing
    plan = (cu_rows, row_token, row_slot, slot_row, cu_slots)
    return MoEExperts.apply(x.contiguous(), w1, w2, b1, b2, scores, *plan, None, None, form)


ExpertsInterface.register(NAME, experts_forward)
