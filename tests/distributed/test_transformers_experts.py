"""transformers' own expert parallelism with our backend inside: equal to eager in one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="5.8", reason="needs the extra `transformers`")
pytest.importorskip(
    "transformers.distributed.expert_parallel", reason=f"transformers {transformers.__version__} has another one"
)


def step(model: transformers.PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def build() -> transformers.PreTrainedModel:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()


def check(rank: int, world: int, implementation: str, shared: bool) -> None:
    """shared: all ranks hold the same batch, otherwise each its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    import sonicmoe.integrations.transformers as adapter

    batches = torch.randint(0, 64, (world, 2, 7), generator=torch.Generator().manual_seed(1))
    ids = batches[0 if shared else rank]
    plain = build()
    want_logits, _ = step(plain, ids)
    plain.zero_grad()
    for other in batches[:1] if shared else batches:
        _, want = step(plain, other)

    model = build()
    model.set_experts_implementation(adapter.NAME)
    experts = "model.layers.0.mlp.experts"
    plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    plan[experts] = "ep_dispatch_experts"
    shape = (1, world) if shared else (world, 1)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    apply_expert_parallelism(model, mesh["tp" if shared else "dp"], mesh["tp"], plan, implementation)
    logits, got = step(model, ids)
    torch.testing.assert_close(logits, want_logits, rtol=1e-4, atol=1e-5)
    for name, gradient in want.items():
        mine = got[name]
        if isinstance(mine, DTensor):
            mine = mine.full_tensor()
        elif not shared:
            dist.all_reduce(mine)
        torch.testing.assert_close(mine, gradient, rtol=1e-3, atol=1e-5, msg=name)
        assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(("implementation", "shared"), [("all_to_all", False), ("all_reduce", True)])
def test_expert_parallelism_of_transformers(implementation: str, shared: bool) -> None:
    in_processes(2, check, implementation, shared)
