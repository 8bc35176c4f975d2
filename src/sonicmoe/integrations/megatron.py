"""Megatron-Core: an experts module in the place of `TEGroupedMLP` or `SequentialMLP`.

The router's probabilities multiply inside the activation, as in Megatron. With `gradient_accumulation_fusion` the
weight gradients are added by the kernels themselves to the fp32 `main_grad` of DistributedDataParallel.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sonicmoe.activations import Activation
from sonicmoe.errors import InvalidArgument
from sonicmoe.integrations.recognise import recognise
from sonicmoe.integrations.rows import experts_of_rows
from sonicmoe.ops._once import once

# What would change the mathematics or the layout and is not done here: the value that each must have.
_REQUIRED = {
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "fp8": None,
    "fp4": None,
    "add_bias_linear": False,
}


class GroupedExperts(MegatronModule):
    """Experts of one rank: weight1 (E, 2*I or I, H), weight2 (E, H, I).

    Args:
        num_local_experts: E.
        config: without biases, latent projection, fp8, fp4 or probabilities on the input; gated or not, with any
            activation that `sonicmoe.activations` has, also clamped and offset.
        submodules: ignored; there are none.
        pg_collection: its `ep`, `expt_tp`, which must have one rank, and `expt_dp`.

    Raises:
        InvalidArgument: for a configuration whose mathematics is another.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        for name, value in _REQUIRED.items():
            got = getattr(config, name, value)
            if got != value:
                raise InvalidArgument(f"config.{name}", got, str(value))
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        if groups.expt_tp.size() != 1:
            raise InvalidArgument("expert tensor parallel size", groups.expt_tp.size(), "1")
        self.ep_group, self.dp_group = groups.ep, groups.expt_dp
        self.num_local_experts = num_local_experts
        self.activation = _activation(config)
        inter = config.moe_ffn_hidden_size
        width = 2 * inter if config.gated_linear_unit else inter
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()

        def parameter(*shape: int) -> nn.Parameter:
            weight = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=device))
            # Megatron's mark of a gradient that is reduced over the experts' own data-parallel group.
            setattr(weight, "allreduce", self.ep_group.size() == 1)  # noqa: B010
            return weight

        self.weight1 = parameter(num_local_experts, width, config.hidden_size)
        self.weight2 = parameter(num_local_experts, config.hidden_size, inter)
        if config.perform_initialization:
            for weight, init in ((self.weight1, config.init_method), (self.weight2, config.output_layer_init_method)):
                for expert in weight.data:
                    init(expert)

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows (R, H) sorted by expert, counts (E,), probabilities (R,) -> rows (R, H), and no bias."""
        x = permuted_local_hidden_states
        w1, w1_grad = self._with_main_grad(self.weight1)
        w2, w2_grad = self._with_main_grad(self.weight2)
        o = experts_of_rows(
            x,
            w1,
            w2,
            tokens_per_expert.to(x.device),
            permuted_probs,
            "before",
            activation=self.activation,
            w1_grad=w1_grad,
            w2_grad=w2_grad,
        )
        return o, None

    def _with_main_grad(self, weight: nn.Parameter) -> tuple[Tensor, Tensor | None]:
        """The weight, and the buffer that its gradient is to be added to, if there is one in fp32."""
        buffer = getattr(weight, "main_grad", None)
        fused = self.config.gradient_accumulation_fusion and weight.requires_grad and torch.is_grad_enabled()
        if buffer is None or not fused or buffer.dtype != torch.float32:
            return weight, None
        return _Announce.apply(weight, weight), buffer.view(weight.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Stacked weights, sharded on dim 0 over the expert-parallel group."""
        before = len(sharded_offsets)
        shard = (before, self.ep_group.rank(), self.ep_group.size())
        return {
            f"{prefix}{name}": ShardedTensor.from_rank_offsets(
                f"{prefix}{name}",
                parameter.data,
                *sharded_offsets,
                shard,
                replica_id=(0, 0, self.dp_group.rank()),
                prepend_axis_num=before,
            )
            for name, parameter in self.named_parameters()
        }


def _activation(config: TransformerConfig) -> Activation:
    """What Megatron's unfused forward computes from this configuration."""
    limit, offset = config.activation_func_clamp_value, config.glu_linear_offset

    def glu(h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return config.activation_func(gate) * (up + offset)

    gated = config.gated_linear_unit
    constants = [] if limit is None else [limit]
    found = recognise(glu if gated else config.activation_func, gated, constants=constants)
    if found is None:
        raise InvalidArgument("config.activation_func", config.activation_func, "one that sonicmoe.activations has")
    return found


class _Announce(torch.autograd.Function):
    """The weight itself; once the layer's backward has added to main_grad, tells Megatron's hooks that it is there."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, parameter: nn.Parameter) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.parameter = parameter
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return once("integrations.megatron.GroupedExperts", _Announce._gradients, ctx)

    @staticmethod
    def _gradients(ctx: Any, _: list[Tensor]) -> tuple[Tensor | None, None]:
        # As Megatron's own linear layers do. Its hooks want a gradient, and drop it where the mark is set, so it may
        # hold anything; but they add it to main_grad where zeros are asked for.
        parameter = ctx.parameter
        if not hasattr(parameter, "grad_added_to_main_grad"):
            return None, None
        parameter.grad_added_to_main_grad = True
        zeros = getattr(parameter, "zero_out_wgrad", False)
        return torch.zeros_like(parameter) if zeros else torch.empty_like(parameter), None
