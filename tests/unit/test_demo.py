"""The demo: its text, its model, what it measures, and the command itself on a tiny setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sonicmoe.__main__ import main, parser
from sonicmoe.demo import layer, report
from sonicmoe.demo.data import Corpus, load_corpus, random_windows, spread_windows
from sonicmoe.demo.model import SIZES, LanguageModel, Size, rotated
from sonicmoe.demo.train import Pairs, Plan, Point, Run, count_pairs, kept_bytes, train

# 96 tokens a step, 48 rows per expert.
TINY = Size(2, 16, 2, 4, 2, 8, 24, 4, 8, 12, 1e-2)
TINY_OPTIONS = (
    "--blocks 2 --hidden 16 --heads 2 --experts 4 --per-token 2 --intermediate 8 --context 24 --batch 4 --tile-m 8 "
    "--steps 6 --every 3 --device cpu --quiet"
).split()


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return load_corpus()


def test_corpus_is_real_text_without_common_paragraphs(corpus: Corpus) -> None:
    train_text, held_text = (bytes(stream.tolist()).decode() for stream in corpus)
    assert len(train_text) > 250_000 and 25_000 < len(held_text) < 60_000
    assert "statement" in train_text and "statement" in held_text
    assert not set(train_text.split("\n\n")) & set(held_text.split("\n\n"))
    assert load_corpus().train.equal(corpus.train)


def test_corpus_of_given_texts() -> None:
    texts = ["one\n\ntwo", "two\n\nthree\n\nthree", "one\n\nfour\n\nfive"]
    train_bytes, held_out = load_corpus(texts, every=2, block=2)
    assert bytes(train_bytes.tolist()) == b"one\n\ntwo\n\nfive"
    assert bytes(held_out.tolist()) == b"three\n\nfour"


def test_windows() -> None:
    stream = torch.arange(101, dtype=torch.uint8)
    windows = spread_windows(stream, 4, 25)
    assert windows.shape == (4, 26) and windows.dtype == torch.int64
    assert windows[:, 1:].flatten().tolist() == list(range(1, 101))
    assert len(spread_windows(stream, 50, 25)) == 4
    drawn = random_windows(stream, 200, 99, torch.Generator().manual_seed(0))
    assert (drawn.diff(dim=1) == 1).all()
    assert drawn[:, 0].unique().tolist() == [0, 1], "every start that fits, and no other"


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_sizes_suit_the_kernels_and_token_rounding(size: Size) -> None:
    assert size.hidden % 8 == 0 and size.intermediate % 8 == 0 and size.hidden % (2 * size.heads) == 0
    assert size.rows_per_expert >= 2 * size.tile_m


def test_model_sees_no_later_byte() -> None:
    torch.manual_seed(0)
    model = LanguageModel(TINY).eval()
    windows = torch.randint(256, (2, 24))
    changed = windows.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 256
    before, after = model(windows)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def test_attention_sees_distances_and_not_places() -> None:
    """Scores of rotated queries and keys depend on how far apart they are alone."""
    torch.manual_seed(0)
    q, k = (rotated(torch.randn(1, 8, dtype=torch.float64).expand(20, 8)) for _ in range(2))
    scores = q @ k.T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert scores[0].std() > 0.01


def test_pairs_are_counted() -> None:
    """Up only pads, down only drops, as much as the last tiles leave; top-K does neither."""
    torch.manual_seed(0)
    windows = torch.randint(256, (4, 25))
    counted = {}
    for rule in ("up", "down"):
        model = LanguageModel(TINY, "token_rounding", rule)
        counted[rule] = count_pairs(model, windows)
    chosen = 2 * 96 * TINY.per_token
    assert count_pairs(LanguageModel(TINY), windows) == Pairs(chosen, 0, 0)
    assert counted["up"].dropped == counted["down"].padded == 0
    assert (chosen + counted["up"].padded) % TINY.tile_m == (chosen - counted["down"].dropped) % TINY.tile_m == 0
    assert 0 < counted["up"].padded <= 2 * TINY.experts * (TINY.tile_m - 1)
    assert 0 < counted["down"].dropped <= 2 * TINY.experts * (TINY.tile_m - 1)


def test_kept_bytes_of_a_layer_are_those_of_the_paper() -> None:
    """2TH + 4RI bytes in bf16 are TH + 2RI elements; on top of them come the routing, the router and the loss."""
    torch.manual_seed(0)
    size = Size(1, 64, 4, 8, 2, 64, 64, 4, 8, 1, 1e-3)
    tokens = torch.randint(256, (size.batch, size.context))
    whole, in_moe = kept_bytes(LanguageModel(size), tokens)
    rows = size.tokens * size.per_token
    paper = 4 * (size.tokens * size.hidden + 2 * rows * size.intermediate)
    small = 4 * (8 * size.tokens * size.experts + 8 * rows)
    assert paper <= in_moe <= paper + small
    assert whole > in_moe


@pytest.mark.parametrize("routing", ["topk", "token_rounding"])
def test_training_learns(corpus: Corpus, routing: str) -> None:
    points: list[tuple[int, Point | None]] = []
    plan = Plan(routing, every=6, held_out_windows=8)
    run = train(TINY, plan, corpus, lambda step, point: points.append((step, point)))
    assert [step for step, _ in points] == list(range(1, 13))
    assert [p for _, p in points if p is not None] == run.history
    assert [p.step for p in run.history] == [6, 12]
    assert run.history[-1].held_out < run.history[0].held_out < 5.6, "log(256) = 5.55 for one that knows nothing"
    assert run.tokens_per_second > 0 and run.kept_bytes > run.kept_bytes_moe > 0
    assert run.pairs.chosen == 2 * 2 * 96 * TINY.per_token
    assert (run.pairs.dropped + run.pairs.padded > 0) == (routing == "token_rounding")


def test_training_is_the_same_again(corpus: Corpus) -> None:
    plan = Plan("token_rounding", seed=3, every=4, held_out_windows=4)
    first, second = (train(TINY, plan, corpus, lambda step, point: None) for _ in range(2))
    assert first.history == second.history


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY_OPTIONS, "--seeds", "0", "1", "--out", str(tmp_path / "new" / "folder")]) == 0
    said = capsys.readouterr().out
    folder = tmp_path / "new" / "folder"
    results = json.loads((folder / "results.json").read_text())
    assert [(r["routing"], r["seed"]) for r in results["runs"]] == [
        ("topk", 0),
        ("token_rounding", 0),
        ("topk", 1),
        ("token_rounding", 1),
    ]
    assert [p["step"] for p in results["runs"][0]["history"]] == [3, 6]
    assert results["setting"]["size"]["hidden"] == 16 and results["layer"] == []
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    table = (folder / "table.txt").read_text()
    runs, spread = table.strip().split("\n\n")
    assert table.strip() in said and "dropped" in runs and len(runs.splitlines()) == 6
    assert [line.split()[:2] for line in spread.splitlines()[2:]] == [["topk", "2"], ["token_rounding", "2"]]
    assert "held out" in said and "topk, seed 0: step     3" in said


def test_a_training_for_each_rule(tmp_path: Path) -> None:
    assert main([*TINY_OPTIONS, "--rule", "nearest", "down", "--out", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [r["routing"] for r in runs] == ["topk", "token_rounding", "token_rounding (down)"]
    assert runs[2]["pairs"]["padded"] == 0 < runs[2]["pairs"]["dropped"]


def test_own_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xff" + b"\n\n".join(b"paragraph %d" % i for i in range(400)))
    assert main([*TINY_OPTIONS, "--routing", "topk", "--text", str(file), "--out", str(tmp_path)]) == 0
    corpus = load_corpus([file.read_text(errors="replace")])
    assert f"{len(corpus.train)} bytes to train on, {len(corpus.held_out)} held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "text: got [Errno"),
        ("", "text: got 0 bytes to train on and 0 held out"),
        ("too little to hold anything out", "text: got 31 bytes to train on and 0 held out"),
        (
            "\n\n".join(f"paragraph {i}" for i in range(181)),
            "context: got 24, accepted less than 13, the held-out text",
        ),
        ("\n\n".join(map(str, (*range(180), 10**2000))), "context: got 900, accepted less than 788, the training text"),
    ],
    ids=["missing", "empty", "none held out", "short", "short to train on"],
)
def test_text_that_does_not_do(text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.txt"
    if text is not None:
        file.write_text(text)
    context = ["--context", "900"] if "900" in said else []
    with pytest.raises(SystemExit) as stopped:
        main([*TINY_OPTIONS, *context, "--text", str(file), "--out", str(tmp_path)])
    assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_spread_over_seeds() -> None:
    runs = [Run("topk", seed, [Point(1, 9.0, 9.0), Point(2, 1.0, loss)]) for seed, loss in enumerate((2.0, 3.0))]
    (line,) = report.spread_table(runs).splitlines()[2:]
    assert line.split() == ["topk", "2", "2.5000", "2.0000", "3.0000"]


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_on_a_terminal(
    terminal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    options = [o for o in TINY_OPTIONS if o != "--quiet"]
    assert main([*options, "--routing", "topk", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert ("6/6" in said.err) == terminal
    assert "step     6" in said.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--heads", "3"], "heads: got 3, accepted a divisor of hidden / 2 = 8"),
        (["--experts", "1"], "num_experts_per_tok: got 2"),
        (["--tile-m", "0"], "tile_m: got 0"),
        (["--every", "0"], "every: got 0"),
        (["--backend", "cute"], "backend: got 'cute'"),
        (["--routing", "expert_choice"], "invalid choice: 'expert_choice'"),
        (["--context", "10000000"], "context: got 10000000"),
        (["--device", "abacus"], "device: got 'abacus'"),
        (["--device", "meta"], "device: got 'meta'"),
        (["--learning-rate", "nan"], "learning_rate: got nan"),
        (["--learning-rate", "inf"], "learning_rate: got inf"),
        (["--seeds", "0", "99999999999999999999999"], "seeds: got 99999999999999999999999"),
    ],
)
def test_bad_options(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*TINY_OPTIONS, "--out", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/proc/xx", __file__])
def test_a_folder_that_cannot_be_is_told_before_training(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sonicmoe.__main__.train", lambda *a: pytest.fail("it trains"))
    with pytest.raises(SystemExit) as stopped:
        main([*TINY_OPTIONS, "--out", folder])
    assert stopped.value.code == 2 and "out: got [Errno" in capsys.readouterr().err.splitlines()[-1]


def test_help_names_every_size_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name in Size.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in said
    assert parser().prog == "python -m sonicmoe"


def test_few_rows_per_expert_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY_OPTIONS, "--tile-m", "32", "--steps", "1", "--out", str(tmp_path)]) == 0
    assert "warning: token rounding wants 2 tiles" in capsys.readouterr().out


def test_speed_of_a_layer() -> None:
    rows = layer.TOKENS * layer.PER_TOKEN
    speed = layer.Speed("topk", rows, forward_ms=1.0, both_ms=4.0)
    flops = 2 * rows * 3 * layer.INTERMEDIATE * layer.HIDDEN
    assert speed.forward_tflops == pytest.approx(flops / 1e-3 / 1e12)
    assert speed.both_tflops == pytest.approx(3 * flops / 4e-3 / 1e12)
    assert "1.000 ms" in report.speeds_table([speed])


def test_table_of_runs() -> None:
    run = Run("topk", 7, [Point(1, 2.0, 3.0), Point(2, 1.5, 2.5)], 123.4, 3 * 2**20, 2**20, Pairs(200, 3, 5))
    lines = report.runs_table([run]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == "topk 7 1.5000 2.5000 123 3.0 MiB 1.0 MiB 3 (1.5%) 5 (2.5%)".split()
