"""Small random models of transformers' real code, and how to run them and their experts."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import sonicmoe.integrations.transformers as adapter

NAME = adapter.NAME

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROUTED = {"moe_intermediate_size": 24, "num_experts_per_tok": 3}
GROUPED = {**ROUTED, "intermediate_size": 40, "n_routed_experts": 8}


class Model(NamedTuple):
    activation: str
    config: dict[str, Any]


MODELS = {
    "mixtral": Model("swiglu", {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2}),
    "olmoe": Model("swiglu", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}),
    "qwen3_moe": Model("swiglu", {**ROUTED, "intermediate_size": 40, "num_experts": 8, "norm_topk_prob": True}),
    "qwen3_next": Model(
        "swiglu",
        {
            **ROUTED,
            "num_experts": 8,
            "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "deepseek_v3": Model(
        "swiglu",
        {
            **GROUPED,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
    "glm4_moe": Model("swiglu", {**GROUPED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    "gpt_oss": Model(
        "swiglu(alpha=1.702,limit=7.0,up_offset=1.0)",
        {
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    "nemotron_h": Model(
        "relu2",
        {
            **GROUPED,
            "n_group": 1,
            "topk_group": 1,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
            "moe_shared_expert_intermediate_size": 24,
        },
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name: str, **overrides: Any) -> Any:
    """A model whose experts matter: their weights are at the scale that keeps activations at unit scale."""
    config = AutoConfig.for_model(name, **{**SMALL, **MODELS[name].config, **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()
    for experts in experts_of(model):
        scale_up(experts)
    return model


def experts_of(model: nn.Module) -> list[Any]:
    found = [m for m in model.modules() if hasattr(m, "has_gate") and hasattr(m, "is_transposed")]
    assert found
    return found


def scale_up(experts: Any) -> None:
    for parameter in experts.parameters():
        fan_in = parameter.shape[1 if experts.is_transposed else -1] if parameter.dim() == 3 else 1
        nn.init.normal_(parameter, std=fan_in**-0.5)


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, SMALL["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def error(got: Tensor, want: Tensor) -> float:
    difference, scale = (got.double() - want.double()).norm(), want.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def train_step(model: Any, implementation: str, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def with_ids_of_the_first_run(model: Any) -> Any:
    """Every later run takes the first one's experts: near a tie, rounding chooses others, and that hides all else."""
    for experts in experts_of(model):
        first: list[Tensor] = []

        def replay(_: Any, args: tuple[Tensor, Tensor, Tensor], first: list[Tensor] = first) -> tuple[Tensor, ...]:
            if not first:
                first.append(args[1])
            return args[0], first[0], args[2]

        experts.register_forward_pre_hook(replay)
    return model


def check_half_precision(name: str, device: str) -> None:
    """Logits and gradients in bf16 are not further from fp32 than eager's."""
    ids = tokens().to(device)
    model = with_ids_of_the_first_run(adapter.lay_out_for_kernels(build(name)).to(device).bfloat16().float())
    truth, truth_grads = train_step(model, "eager", ids)
    model.bfloat16()
    (eager, eager_grads), (got, got_grads) = [train_step(model, which, ids) for which in ("eager", NAME)]
    assert error(got, truth) <= 1.5 * error(eager, truth) < 0.1
    assert got_grads.keys() == eager_grads.keys() == truth_grads.keys()
    # Where ids were replayed, a router's gradient goes to the expert that it chose itself.
    names = [n for n, g in truth_grads.items() if g.norm() > 1e-6 and ".gate." not in n and ".router." not in n]
    errors = [(error(got_grads[n], truth_grads[n]), error(eager_grads[n], truth_grads[n])) for n in names]
    # Of one small gradient either may be the lucky one; of all together neither is.
    assert all(ours <= 2.5 * theirs + 0.01 for ours, theirs in errors)
    assert sum(ours for ours, _ in errors) <= 1.2 * sum(theirs for _, theirs in errors)


def experts_module(name: str, *, std: float | None = None, **overrides: Any) -> Any:
    """The first experts module of a small model, in fp32, with its backend set."""
    experts = experts_of(build(name, **overrides))[0]
    if std is not None:
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=std)
    return experts


class Inputs(NamedTuple):
    x: Tensor
    ids: Tensor
    weights: Tensor


def inputs(
    experts: Any, num_tokens: int, k: int = 2, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Inputs:
    generator = torch.Generator().manual_seed(2)
    w2 = experts.down_proj
    hidden, num_experts = w2.shape[2 if experts.is_transposed else 1], w2.shape[0]
    x = torch.randn(num_tokens, hidden, generator=generator)
    ids = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :k]
    weights = torch.rand(num_tokens, k, generator=generator) + 0.1
    return Inputs(
        x.to(device, dtype).requires_grad_(), ids.to(device), weights.to(device).requires_grad_(num_tokens > 0)
    )


def run(experts: Any, implementation: str, given: Inputs) -> list[Tensor]:
    """Output and gradients of the input, the weights of the routing, and every parameter."""
    experts.config._experts_implementation = implementation
    leaves = [given.x, given.weights, *experts.parameters()]
    for leaf in leaves:
        leaf.grad = None
    o = experts(given.x, given.ids, given.weights)
    pattern = torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).to(o)
    (o * pattern).sum().backward()
    return [o.detach()] + [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
