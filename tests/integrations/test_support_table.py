"""What a layer can be put into: each test is a cell of README's table "Works with"."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sonicmoe import MoE

ROOT = Path(__file__).parents[2]
H, I, E, K, T = 32, 24, 6, 2, 40  # noqa: E741
CPU = pytest.param("cpu", id="cpu")
GPU = pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)
everywhere = pytest.mark.parametrize("device", [CPU, GPU])


def layer(device: str, routing: str = "topk", k: int = K, **options: Any) -> tuple[MoE, Tensor]:
    """A layer and its input: in fp64 on the CPU, by the kernels in bf16 on a GPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float64
    torch.manual_seed(0)
    options = {"add_bias": True, "std": 0.3, "device": device, "dtype": dtype, **options}
    moe = MoE(E, k, H, I, routing=routing, tile_m=8, **options)
    return moe, torch.randn(T, H, device=device, dtype=options["dtype"], requires_grad=True)


def step(call: Callable[[Tensor], Any], moe: MoE, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x.grad = None
    moe.zero_grad()
    o, aux = call(x)
    (o.float().square().mean() + 0.1 * aux).backward()
    gradients = [x.grad, *(p.grad for p in moe.parameters())]
    assert all(g is not None and g.any() for g in gradients)
    return [o.detach().clone(), *(g.clone() for g in gradients if g is not None)]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


class Calls(TorchDispatchMode):
    """How often each of sonicmoe's ops runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sonicmoe":
            self.count[func._opname] = self.count.get(func._opname, 0) + 1
        return func(*args, **(kwargs or {}))


def by_steps(moe: MoE, x: Tensor) -> list[Tensor]:
    """`step` as a mode sees it: by the kernels eager calls add some sums of gradients before they are rounded."""
    with Calls():
        return step(moe, moe, x)


@pytest.mark.unpoisoned
@everywhere
@pytest.mark.parametrize("routing", ["topk", "token_rounding"])
def test_compile_without_a_graph_break(device: str, routing: str) -> None:
    """Forward and backward; what the first number of tokens was compiled for serves all others."""
    torch._dynamo.reset()
    moe, x = layer(device, routing)
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(moe, fullgraph=True, backend=counter, dynamic=True)
    for length in (T, 17, 9, 23):
        part = x.detach()[:length].clone().requires_grad_()  # not a view: guards look at its base
        for ours, theirs in zip(step(compiled, moe, part), by_steps(moe, part), strict=True):
            torch.testing.assert_close(ours, theirs)
        counts.append(counter.frame_count)
    assert counts[0] > 0 and set(counts) == {counts[0]}


@pytest.mark.gpu
@pytest.mark.parametrize("routing", ["topk", "token_rounding"])
def test_cuda_graph(routing: str) -> None:
    """Forward and backward in one graph, replayed with another input and so another routing."""
    moe, x = layer("cuda", routing)
    other = torch.randn_like(x)
    want = [[t.clone() for t in step(moe, moe, given.detach().requires_grad_())] for given in (x, other)]
    static = x.detach().clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(moe, moe, static)
    torch.cuda.current_stream().wait_stream(side)
    static.grad = None
    moe.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, aux = moe(static)
        (o.float().square().mean() + 0.1 * aux).backward()
    for given, wanted in zip((x, other), want, strict=True):
        with torch.no_grad():
            static.copy_(given)
        graph.replay()
        same([o.detach(), static.grad, *(p.grad for p in moe.parameters())], wanted)  # type: ignore[list-item]


@everywhere
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device: str, reentrant: bool) -> None:
    moe, x = layer(device)
    same(step(lambda t: checkpoint(moe, t, use_reentrant=reentrant), moe, x), step(moe, moe, x))


@everywhere
def test_selective_checkpointing(device: str) -> None:
    """Keeping up_proj's result, which the backward reads, it is not computed again."""
    moe, x = layer(device)

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op is torch.ops.sonicmoe.up_proj.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    want = by_steps(moe, x)
    counts = []
    for options in ({}, {"context_fn": contexts}):
        run = functools.partial(checkpoint, moe, use_reentrant=False, **options)
        with Calls() as calls:
            same(step(run, moe, x), want)
        counts.append(calls.count["up_proj"])
    assert counts == [2, 1]


@everywhere
def test_autocast(device: str) -> None:
    # Every expert for every token: near a tie, rounding the logits would choose others.
    moe, x = layer(device, k=E, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        got = step(moe, moe, x)
    assert got[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in got[1:])
    for ours, exact in zip(got, step(MoE.forward.__get__(_on_torch(moe)), moe, x), strict=True):
        assert 1e-5 < (ours.float() - exact).norm() / exact.norm() < 0.05


def _on_torch(moe: MoE) -> MoE:
    """The same parameters, computed by the torch backend, which takes fp32."""
    twin = copy.copy(moe)
    twin.backend = "torch"
    return twin


@everywhere
def test_grad_scaler(device: str) -> None:
    moe, x = layer(device, dtype=torch.float32)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    optimizer = torch.optim.SGD(moe.parameters(), lr=0.1)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            o, _ = moe(x)
        scaler.scale(o.float().square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()

    before = moe.w1.detach().clone()
    scaled_step(1.0)
    after = moe.w1.detach().clone()
    assert after.isfinite().all() and not torch.equal(before, after)
    scaled_step(float("inf"))
    assert torch.equal(moe.w1, after) and scaler.get_scale() == 128.0


@everywhere
def test_functional_call(device: str) -> None:
    moe, x = layer(device)
    other, _ = layer(device)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    o, _ = torch.func.functional_call(moe, dict(other.named_parameters()), (x,))
    assert torch.equal(o, other(x)[0]) and not torch.equal(o, moe(x)[0])


def test_function_transforms_raise() -> None:
    moe, x = layer("cpu")
    with pytest.raises(RuntimeError, match="setup_context|functorch"):
        torch.func.grad(lambda t: moe(t)[0].sum())(x.detach())


@pytest.mark.unpoisoned
@everywhere
def test_export_of_inference(device: str) -> None:
    moe, x = layer(device)
    moe.eval()
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(moe, (x.detach(),), dynamic_shapes=({0: tokens},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (T, 7):
        assert torch.equal(loaded(x.detach()[:length])[0], moe(x.detach()[:length])[0])


@everywhere
def test_copying_and_pickling(device: str) -> None:
    moe, x = layer(device)
    want = step(moe, moe, x)
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        same(step(twin, twin, x), want)


@everywhere
def test_inference_mode(device: str) -> None:
    moe, x = layer(device)
    want = moe(x)[0].detach()
    with torch.inference_mode():
        assert torch.equal(moe(x)[0], want)


@everywhere
def test_a_layer_that_is_partly_frozen(device: str) -> None:
    moe, x = layer(device)
    want = step(moe, moe, x)
    for name, p in moe.named_parameters():
        p.requires_grad_(name in ("router.weight", "b1"))
    x.grad = None
    moe.zero_grad()
    o, aux = moe(x)
    (o.float().square().mean() + 0.1 * aux).backward()
    for (name, p), gradient in zip(moe.named_parameters(), want[2:], strict=True):
        assert (p.grad is None) == (name not in ("router.weight", "b1"))
        assert p.grad is None or torch.equal(p.grad, gradient)


def test_the_table_names_tests_that_exist() -> None:
    """Each row of README's table names one at least, and each test runs on the device of its column."""
    section = (ROOT / "README.md").read_text().partition("## Works with")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ") and "::" in line]
    assert len(rows) > 20 and len(rows) == section.count("\n| ") - 1
    for what, *columns in rows:
        for of_gpu, text in zip((False, True), columns, strict=True):
            for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
                found = re.search(rf"((?:^@.*\n)*)^def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
                assert found is not None, (what, name)
                only_gpu = file.startswith("tests/gpu/") or "@pytest.mark.gpu" in found[1]
                assert "@everywhere" in found[1] or only_gpu == of_gpu, (what, name)
