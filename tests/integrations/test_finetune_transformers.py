"""examples/finetune_transformers.py: the Trainer trains by our experts as by eager ones, stops, resumes, and saves."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", minversion="5.8", reason="needs the extra `examples`")
pytest.importorskip("accelerate", reason="needs the extra `examples`")

PROGRAM = Path(__file__).parents[2] / "examples" / "finetune_transformers.py"
SMALL = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
}
STEPS = 12
# Trainer allocates what it then fills, through torch's own functions.
pytestmark = pytest.mark.unpoisoned


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune_transformers", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SMALL.update(SMALL)
    return module


def train(example: ModuleType, out: Path, *more: str) -> dict[str, float]:
    common = f"--steps {STEPS} --every 6 --batch 4 --length 32 --held-out 8 --learning-rate 1e-2 --out".split()
    return example.run(example.parser().parse_args([*common, str(out), *more]))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trained(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("finetune") / "out"
    return out, train(example, out)


def test_it_learns_and_saves(example: ModuleType, trained: tuple[Path, dict[str, float]]) -> None:
    out, losses = trained
    # log(384) = 5.95 for a model that knows nothing.
    assert losses["after"] < 4.5 < 5.5 < losses["before"]
    assert sorted(p.name for p in out.glob("checkpoint-*")) == [f"checkpoint-{STEPS}", "checkpoint-6"]
    assert list(out.glob("runs/*/events*"))
    name = example.sonicmoe_experts.NAME
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out / "final", experts_implementation=name)
    assert loaded.config._experts_implementation == name


def test_eager_experts_learn_the_same(
    example: ModuleType, trained: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_in = tmp_path / "elsewhere"
    started_in.mkdir()
    monkeypatch.chdir(started_in)
    losses = train(example, tmp_path / "out", "--experts", "eager")
    assert not list(started_in.iterdir()), "all of a run is in its folder"
    for when, loss in trained[1].items():
        assert losses[when] == pytest.approx(loss, rel=2e-3), when


def test_a_stopped_run_goes_on(example: ModuleType, trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    whole, losses = trained
    stopped = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-6", stopped / "checkpoint-6")
    assert train(example, stopped)["after"] == pytest.approx(losses["after"], rel=1e-5)


def test_a_model_with_a_tokenizer_and_text_of_ones_own(
    example: ModuleType, trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    model: Any = trained[0] / "final"
    shutil.copytree(model, tmp_path / "model")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The square of {i} is {i * i}." for i in range(2000)))
    losses = train(example, tmp_path / "out", "--model", str(tmp_path / "model"), "--text", str(text))
    assert losses["after"] < 0.8 * losses["before"]
    assert (tmp_path / "out" / "final" / "tokenizer_config.json").exists()
