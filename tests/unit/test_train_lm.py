"""examples/train_lm.py: configuration, resuming, and two ranks against one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import in_processes
from torch.distributed.device_mesh import init_device_mesh

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIG = EXAMPLES / "train_lm.toml"
SMALL = [
    "model.blocks=2",
    "model.hidden=16",
    "model.heads=2",
    "model.experts=4",
    "model.per_token=2",
    "model.intermediate=8",
    "model.context=16",
    "model.tile_m=8",
    "training.batch=4",
    "training.steps=6",
    "training.warm_up=2",
    "run.held_out_every=3",
    "run.held_out_windows=8",
    "run.checkpoint_every=3",
]
# Of the vectors 0, 1, .. of three, four and five elements.
NORM = (5 + 14 + 30) ** 0.5
TOPK = 'model.routing="topk"'
Log = list[dict[str, float]]
# Without a GPU in sight: the ranks of torchrun are processes of this machine's CPU.
ENVIRONMENT = {
    **os.environ,
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH")])),
}


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_lm", EXAMPLES / "train_lm.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules["train_lm"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load()


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def _changes(out: Path, changes: Sequence[str]) -> list[str]:
    return [*SMALL, *changes, f"run.out='{out}'"]


def _log(out: Path) -> Log:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def _train(example: ModuleType, out: Path, *changes: str) -> Log:
    """By one rank, this process."""
    example.main([str(CONFIG), "--set", *_changes(out, changes)])
    return _log(out)


def _rank(rank: int, world: int, out: Path, changes: Sequence[str]) -> None:
    example = load()
    example.run(example.read_config(CONFIG, _changes(out, changes)), init_device_mesh("cpu", (world,)))


def _torchrun(ranks: int, out: Path, *changes: str) -> Log:
    """As on the command line."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, str(EXAMPLES / "train_lm.py"), str(CONFIG), "--set", *_changes(out, changes)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return _log(out)


def _put_aside_the_last_checkpoint(out: Path) -> None:
    (newest,) = out.glob("step-*6")
    newest.rename(out / "put-aside")
    (out / "log.jsonl").unlink()


def _held_out(log: Log) -> dict[float, float]:
    return {line["step"]: line["held_out"] for line in log if "held_out" in line}


def test_config_is_complete_and_documented(example: ModuleType) -> None:
    config = example.read_config(CONFIG)
    assert config.model.routing == "token_rounding" and config.training.batch == 64
    rows = config.training.batch * config.model.context * config.model.per_token / config.model.experts
    assert rows >= 2 * config.model.tile_m
    assert example.read_config(CONFIG, ["training.steps=7", TOPK]).model.routing == "topk"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("hidden = 512", "hiden = 512", r"\[model\] lacks or has too much: hidden, hiden"),
        ("[training]", "[trainin]", "sections"),
        ("seed = 0", "", "seed"),
    ],
)
def test_wrong_config(example: ModuleType, tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG.read_text().replace(old, new))
    with pytest.raises(ValueError, match=said):
        example.read_config(path)


def test_wrong_change(example: ModuleType) -> None:
    with pytest.raises(ValueError, match="has no training.step"):
        example.read_config(CONFIG, ["training.step=7"])


def test_tensorboard(example: ModuleType, tmp_path: Path) -> None:
    """Written where it is installed, and asked for in time where it is not."""
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ValueError, match="pip install tensorboard"):
            example.read_config(CONFIG, ["run.tensorboard=true"])
    else:
        _train(example, tmp_path, "training.steps=3", "run.tensorboard=true")
        assert list((tmp_path / "tensorboard").iterdir())


def test_own_text(example: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(3000)))
    changes = (f"run.text=['{path}']", "training.steps=30", "training.learning_rate=1e-2")
    log = _train(example, tmp_path / "out", *changes)
    assert _held_out(log)[30] < 4.5, "log(256) = 5.55 for a model that knows nothing"


def test_a_stopped_run_computes_the_same(example: ModuleType, tmp_path: Path) -> None:
    """Six steps at once, and the last three again after a stop: equal to the last bit, stochastic rule and all."""
    out, options = tmp_path / "out", ['model.rule="stochastic"']
    whole = _train(example, out, *options)
    assert [line["step"] for line in whole if "held_out" in line] == [3, 6]
    _put_aside_the_last_checkpoint(out)
    resumed = _train(example, out, *options)
    assert [line["step"] for line in resumed if "held_out" in line] == [6]
    assert _held_out(resumed)[6] == _held_out(whole)[6]
    assert sorted(p.name for p in out.glob("step-*")) == ["step-00000003", "step-00000006"]


def test_two_ranks_compute_what_one_does(example: ModuleType, tmp_path: Path) -> None:
    """By FSDP2 from the start, and by torchrun from a checkpoint that one rank wrote, then sharing the experts."""
    one = _held_out(_train(example, tmp_path / "one", TOPK))
    in_processes(2, _rank, tmp_path / "two", [TOPK])
    two = _held_out(_log(tmp_path / "two"))
    _put_aside_the_last_checkpoint(tmp_path / "one")
    resumed = _held_out(_torchrun(2, tmp_path / "one", TOPK, "training.expert_parallel=2"))
    assert list(one) == list(two) == [3, 6] and list(resumed) == [6]
    assert one[6] < one[3]
    for step, loss in two.items():
        assert loss == pytest.approx(one[step], rel=2e-4)
    assert resumed[6] == pytest.approx(one[6], rel=2e-4)


def test_four_ranks_on_a_two_dimensional_mesh_compute_what_one_does(example: ModuleType, tmp_path: Path) -> None:
    """And one rank goes on from their checkpoint. The gradient's norm shows what Adam does not: how gradients scale."""
    # The load balancing loss is of each rank's own tokens, and so another one.
    changes = [TOPK, "training.aux_weight=0.0"]
    one = _train(example, tmp_path / "one", *changes)
    in_processes(4, _rank, tmp_path / "four", [*changes, "training.expert_parallel=2"])
    four = _log(tmp_path / "four")
    assert _held_out(four) == pytest.approx(_held_out(one), rel=2e-4)
    (norm,) = [line["norm"] for line in one if "norm" in line]
    assert [line["norm"] for line in four if "norm" in line] == [pytest.approx(norm, rel=1e-3)]
    _put_aside_the_last_checkpoint(tmp_path / "four")
    resumed = _train(example, tmp_path / "four", *changes)
    assert _held_out(resumed)[6] == pytest.approx(_held_out(one)[6], rel=2e-4)


def test_the_clip_is_that_of_all_gradients_together(example: ModuleType) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4, 5)]
    for largest in (0.5, 100.0):
        for p in parameters:
            p.grad = torch.arange(float(len(p)))
        want = [p.grad * min(1.0, largest / NORM) for p in parameters if p.grad is not None]
        assert float(example.clip([parameters[:1], parameters[1:]], largest)) == pytest.approx(NORM)
        for p, gradient in zip(parameters, want, strict=True):
            torch.testing.assert_close(p.grad, gradient)


def test_ranks_that_cannot_share_the_experts(example: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expert_parallel: got 2, accepted divisors of 1 ranks"):
        _train(example, tmp_path, "training.expert_parallel=2")
