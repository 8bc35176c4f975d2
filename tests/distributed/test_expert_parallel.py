"""FSDP2, expert parallelism and both, by processes on the CPU: outputs and gradients are those of one process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from expert_parallel_cases import HIDDEN, INTER, PER_TOK, build, check_against_one_process, full, inputs, tokens_of
from processes import in_processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from sonicmoe import InvalidArgument, Routing
from sonicmoe.integrations.between import sum_rows
from sonicmoe.integrations.distributed import ExpertParallel, ExpertParallelMoE, Received, _Exchange, shard_moe


def fsdp(rank: int, world: int, num_experts: int) -> None:
    moe = fully_shard(build(num_experts), mesh=init_device_mesh("cpu", (world,)))
    check_against_one_process(moe, rank, world, num_experts, ())


def expert_parallel(rank: int, world: int, num_experts: int, routing: str) -> None:
    mesh, options = init_device_mesh("cpu", (world,)), {"routing": routing, "tile_m": 4}
    moe = parallelize_module(build(num_experts, **options), mesh, ExpertParallel())
    per_rank = -(-num_experts // world)
    local = max(0, min(per_rank, num_experts - rank * per_rank))
    assert isinstance(moe.w1, DTensor) and moe.w1.to_local().shape[0] == local
    check_against_one_process(moe, rank, world, num_experts, ("w1", "w2", "b1", "b2"), **options)


def made_on_meta(rank: int, world: int, num_experts: int) -> None:
    """Parameters that are allocated and drawn only after they are sharded."""
    mesh = init_device_mesh("cpu", (world,))
    moe = parallelize_module(build(num_experts, device="meta"), mesh, ExpertParallel())
    moe.to_empty(device="cpu")
    torch.manual_seed(7)
    moe.reset_parameters()
    whole = full(moe.w1)
    assert 0.2 < whole.std() < 0.3 and not torch.equal(whole[0], whole[-1])
    o, _ = moe(inputs(world)[rank])
    assert o.isfinite().all()


def both(rank: int, world: int, num_experts: int) -> None:
    check_against_one_process(two_dimensional(num_experts), rank, world, num_experts, ())


def two_dimensional(num_experts: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    moe = parallelize_module(build(num_experts), mesh["ep"], ExpertParallel())
    return shard_moe(moe, mesh["dp"], init_device_mesh("cpu", (4,)))  # type: ignore[return-value]


@pytest.mark.parametrize("world", [2, 4])
def test_fsdp(world: int) -> None:
    in_processes(world, fsdp, 6)


@pytest.mark.parametrize(
    ("world", "num_experts", "routing"),
    [(2, 6, "topk"), (4, 5, "topk"), (4, 8, "token_rounding")],
    ids=["even", "uneven_and_empty", "token_rounding"],
)
def test_expert_parallel(world: int, num_experts: int, routing: str) -> None:
    in_processes(world, expert_parallel, num_experts, routing)


def test_sharded_before_allocated() -> None:
    in_processes(2, made_on_meta, 6)


class Local:
    """A transport for one rank: a row for each token and expert, without a journey."""

    calls = 0

    def dispatch(self, x: Tensor, routing: Routing, backend: str) -> Received:
        self.calls += 1
        expert = torch.repeat_interleave(routing.cu_rows.diff()).unsqueeze(1)
        return Received(x[routing.row_token], expert, routing.scores[routing.row_slot].unsqueeze(1), routing)

    def combine(self, results: Tensor, handle: Routing) -> Tensor:
        self.calls += 1
        return sum_rows(results, handle, "torch")


def custom_transport(rank: int, world: int) -> None:
    local = Local()
    moe = parallelize_module(build(5), init_device_mesh("cpu", (world,)), ExpertParallel(local))
    check_against_one_process(moe, rank, world, 5, ())
    assert local.calls == 2
    x, kept = inputs(1)[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        moe(x)
    rows = tokens_of(0) * PER_TOK
    # The received rows and h; no result, and nothing else of rows' size.
    wide = [tuple(t.shape) for t in kept if t.is_floating_point() and t.dim() == 2 and t.shape[0] == rows]
    assert sorted(wide) == [(rows, HIDDEN), (rows, 2 * INTER)]


def test_another_transport_and_what_is_kept() -> None:
    in_processes(1, custom_transport)


def test_both_on_a_two_dimensional_mesh() -> None:
    in_processes(4, both, 6)


def save(rank: int, world: int, num_experts: int, path: Path) -> None:
    moe = two_dimensional(num_experts)
    with torch.no_grad():
        for i, p in enumerate(moe.parameters()):
            p.add_(0.5 + i)
    dcp.save(get_model_state_dict(moe), checkpoint_id=path)


def load(rank: int, world: int, num_experts: int, path: Path) -> None:
    mesh: DeviceMesh = init_device_mesh("cpu", (world,))
    moe = parallelize_module(build(num_experts), mesh, ExpertParallel())
    state = get_model_state_dict(moe)
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(moe, state)
    check_loaded(moe, num_experts)


def check_loaded(moe: nn.Module, num_experts: int) -> None:
    original = dict(build(num_experts).named_parameters())
    for i, (name, p) in enumerate(moe.named_parameters()):
        assert torch.equal(full(p).detach(), original[name].detach() + (0.5 + i)), name


def test_checkpoint_of_four_ranks_in_two_and_in_one(tmp_path: Path) -> None:
    in_processes(4, save, 6, tmp_path)
    in_processes(2, load, 6, tmp_path)
    moe = build(6)
    state = moe.state_dict()
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    moe.load_state_dict(state)
    check_loaded(moe, 6)


def dies(rank: int, world: int) -> None:
    moe = parallelize_module(build(4), init_device_mesh("cpu", (world,)), ExpertParallel())
    x = inputs(world)[0]
    moe(x)
    if rank == 1:
        # As if all were well, so that nobody ends rank 0 but rank 0 itself.
        os._exit(0)
    while True:
        moe(x)


def test_a_rank_that_dies_ends_the_run() -> None:
    start = time.monotonic()
    with pytest.raises(mp.ProcessRaisedException, match="Process 0"):
        in_processes(2, dies)
    assert time.monotonic() - start < 60


def by_kernels(rank: int, world: int, sharded: str, num_experts: int) -> None:
    """In bf16: about as far from fp64 as the torch backend is. All experts for all tokens, so that no tie decides."""
    options = {"dtype": torch.bfloat16, "device": "cuda", "per_tok": num_experts}
    mesh = init_device_mesh("cuda", (world,))
    moe = build(num_experts, **options)
    moe = fully_shard(moe, mesh=mesh) if sharded == "fsdp" else parallelize_module(moe, mesh, ExpertParallel())
    plain, exact = build(num_experts, backend="torch", **options), build(num_experts, **options).cpu().double()
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(200 + 100 * rank, HIDDEN, generator=generator).bfloat16()
    results = []
    for layer, device in ((moe, "cuda"), (plain, "cuda"), (exact, "cpu")):
        given = x.to(device, torch.float64 if layer is exact else torch.bfloat16).detach().requires_grad_()
        o, _ = layer(given)
        (o * torch.linspace(-1, 1, HIDDEN, dtype=o.dtype, device=device)).sum().backward()
        w1 = full(layer.w1.grad).double().cuda()
        if layer is not moe:
            dist.all_reduce(w1)
        elif sharded == "fsdp":
            w1 *= world
        results.append([t.detach().cpu().double() for t in (o, given.grad, w1)])
    for ours, theirs, true in zip(*results, strict=True):
        assert (ours - true).norm() <= 2 * (theirs - true).norm() < 0.1 * true.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("sharded", "num_experts"), [("experts", 2), ("experts", 1), ("fsdp", 2)])
def test_by_kernels(sharded: str, num_experts: int) -> None:
    """One expert: the other rank has none."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    in_processes(2, by_kernels, sharded, num_experts, backend="nccl")


def exchanged_twice(rank: int, world: int) -> None:
    sends, receives = [1, 2 + rank], [1, 1] if rank == 0 else [2, 3]
    x = torch.randn(sum(sends), 3, dtype=torch.float64, requires_grad=True)
    y = _Exchange.apply(x, sends, receives, dist.group.WORLD)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x)
    torch.testing.assert_close(second, 6 * x)


def test_the_exchange_can_be_differentiated_twice() -> None:
    in_processes(2, exchanged_twice)


def test_x_without_hidden_raises() -> None:
    for x in (torch.tensor(1.0), torch.zeros(3, HIDDEN + 1)):
        with pytest.raises(InvalidArgument, match=r"x.shape: got \(.*\), accepted \(\.\.\., 16\)"):
            ExpertParallelMoE.forward(build(2), x)  # type: ignore[arg-type]


def test_only_a_moe_can_be_sharded() -> None:
    with pytest.raises(InvalidArgument, match="a sonicmoe.MoE"):
        ExpertParallel()._apply(nn.Linear(2, 2), None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="after ExpertParallel"):
        shard_moe(build(2), None, None)  # type: ignore[arg-type]
