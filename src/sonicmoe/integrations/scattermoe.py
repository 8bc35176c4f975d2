"""ScatterMoE: `MLP` and `GLUMLP` with its constructors, its call and its checkpoints; needs no ScatterMoE.

    from sonicmoe.integrations.scattermoe import GLUMLP        # instead of scattermoe.mlp
    layer.mlp = convert(layer.mlp)                             # or one that exists, before the optimizer is made

ScatterMoE's `GLUMLP` stores an expert's up rows before its gate rows, the kernels read them the other way round. So
here `experts.weight` and `experts.bias` of a `GLUMLP` hold gate rows, then up rows; `state_dict` and `load_state_dict`
exchange the halves, and files stay what they were. An optimizer's state that comes from ScatterMoE needs `exchanged`
once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sonicmoe.activations import Activation
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import as_autocast, moe_experts, resolve_backend, scores_for
from sonicmoe.integrations.between import experts_with
from sonicmoe.integrations.recognise import recognise, remembered
from sonicmoe.routing import route_assigned

# What `convert` reads of a layer.
_READ = ("experts", "output_experts", "input_size", "hidden_size", "num_experts", "top_k", "activation")


def exchanged(t: Tensor) -> Tensor:
    """A copy of t (E, 2*I, ...) with its halves along dim 1 exchanged: from ScatterMoE's order to ours, or back."""
    first, second = t.detach().chunk(2, dim=1)
    return torch.cat((second, first), dim=1)


class ParallelExperts(nn.Module):
    """One product's weight (E, out, in) and, if asked for, bias (E, out); its forward is the layer's."""

    def __init__(self, num_experts: int, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ScatterMoE does."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _GateAndUp(ParallelExperts):
    """Gate rows, then up rows; in checkpoints up rows, then gate rows."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._exchange(destination, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        self._exchange(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _exchange(self, state_dict: dict[str, Any], prefix: str) -> None:
        for name in ("weight", "bias"):
            if f"{prefix}{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = exchanged(state_dict[f"{prefix}{name}"])


class MLP(nn.Module):
    """y = sum over a token's experts of p * (activation(x w1^T) w2^T).

    Args:
        input_size, hidden_size: H and I.
        num_experts, top_k: E and K.
        bias: of both products.
        activation: of torch tensors, element by element. One that `sonicmoe.activations` has runs fused; any other
            runs as it is between the two products.
    """

    gated = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not callable(activation):
            raise InvalidArgument("activation", repr(activation), "a function of tensors, such as torch.nn.GELU()")
        self.num_experts, self.top_k = num_experts, min(top_k, num_experts)
        self.input_size, self.hidden_size = input_size, hidden_size
        up, width = (_GateAndUp, 2 * hidden_size) if self.gated else (ParallelExperts, hidden_size)
        self.experts = up(num_experts, input_size, width, bias)
        self.output_experts = ParallelExperts(num_experts, hidden_size, input_size, bias)
        self.activation = activation

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        """x (..., H), weights and ids of its experts (T, K) -> (..., H). Ids that are no expert's are skipped."""
        if expert_idxs.shape[-1] != self.top_k:
            raise InvalidArgument("expert_idxs.shape", tuple(expert_idxs.shape), f"(T, {self.top_k}), top_k last")
        tokens, ids = x.reshape(-1, x.shape[-1]), expert_idxs.reshape(-1, self.top_k)
        w1: Tensor = self.experts.weight
        w2: Tensor = self.output_experts.weight
        b1: Tensor | None = self.experts.bias
        b2: Tensor | None = self.output_experts.bias
        tokens, w1, w2, b1, b2 = as_autocast(tokens, w1, w2, b1, b2)
        p = scores_for(tokens, expert_p.reshape(-1, self.top_k))
        routing = route_assigned(ids, p, num_experts=self.num_experts)
        fused = self._fused()
        if fused is not None:
            return moe_experts(tokens, w1, w2, routing, b1, b2, activation=fused).view(x.shape)
        backend = resolve_backend("auto", tokens, w2)
        return experts_with(self._between, tokens, w1, w2, routing, b1, b2, backend=backend).view(x.shape)

    def _between(self, h: Tensor) -> Tensor:
        """What happens between the products, in our order of h."""
        if not self.gated:
            return self.activation(h)
        gate, up = h.chunk(2, dim=-1)
        return self.activation(gate) * up

    def _fused(self) -> str | None:
        """The activation of ours that the layer has."""
        return remembered(self, _recognised, self.activation)

    def extra_repr(self) -> str:
        return f"k={self.top_k}"


class GLUMLP(MLP):
    """y = sum over a token's experts of p * ((activation(x w_gate^T) * x w_up^T) w2^T); arguments as of `MLP`.

    What `state_dict` returns of `experts` is a copy, its halves exchanged: to change parameters in place, or for
    `torch.func.functional_call`, take `named_parameters`.
    """

    gated = True

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        bias: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, num_experts, top_k, bias, activation or nn.SiLU())


def _recognised(layer: MLP) -> Activation | None:
    activation = layer.activation
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None
    return recognise(layer._between, layer.gated)


def convert(module: Any) -> MLP:
    """The same layer as a `scattermoe.mlp.MLP` or `GLUMLP`, with its parameters; of a `GLUMLP` the first is copied."""
    kind = None
    if all(hasattr(module, name) for name in _READ):
        kind = {module.hidden_size: MLP, 2 * module.hidden_size: GLUMLP}.get(module.experts.weight.shape[1])
    if kind is None:
        raise InvalidArgument("module", type(module).__name__, "an MLP or a GLUMLP of ScatterMoE")
    bias = getattr(module.experts, "bias", None) is not None
    with torch.device("meta"):
        made = kind(module.input_size, module.hidden_size, module.num_experts, module.top_k, bias, module.activation)
    for ours, theirs in zip(made.parameters(), module.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    made.load_state_dict(module.state_dict(), assign=True)
    return made.train(module.training)
