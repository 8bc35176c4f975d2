"""The package as a whole: what importing costs and touches, what it offers, and that the texts agree with the tree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import sonicmoe

ROOT = Path(__file__).parents[2]
IGNORED = {"out", "build", "dist", "__pycache__"}
IMPORT_SECONDS = 1.0
PUBLIC = (
    "GPT_OSS Activation InvalidArgument MoE Routing load_balancing_loss moe_experts route_assigned route_pairs "
    "route_rows route_token_rounding route_topk"
).split()


def _tree(*suffixes: str) -> list[Path]:
    """The repository's files with these suffixes."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in IGNORED and (f == ".ci" or not f.startswith("."))]
        found += [Path(folder, f) for f in files if Path(f).suffix in suffixes]
    return sorted(found)


def _imported(code: str) -> dict[str, object]:
    """What a fresh interpreter says after running code, which leaves a dict in `said`."""
    program = f"import json, sys, time\n{code}\nprint(json.dumps(said))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT / "src")
    said = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(said, dict)
    return said


def test_import_touches_no_gpu_and_no_dsl() -> None:
    said = _imported(
        "import sonicmoe, torch\n"
        "said = dict(cuda=torch.cuda.is_initialized(), loaded=[m for m in sys.modules if m.split('.')[0] in"
        " ('cutlass', 'cuda', 'tvm_ffi', 'triton', 'transformers', 'matplotlib', 'tqdm')])"
    )
    before = _imported(
        "import torch\n"
        "said = dict(loaded=[m for m in sys.modules if m.split('.')[0] in"
        " ('cutlass', 'cuda', 'tvm_ffi', 'triton', 'transformers', 'matplotlib', 'tqdm')])"
    )
    assert said["cuda"] is False
    assert set(said["loaded"]) <= set(before["loaded"]), "beyond what torch itself imports"


def test_import_is_quick() -> None:
    """In CPU seconds: other processes on the machine do not count."""
    times = []
    for _ in range(2):
        said = _imported(
            "import torch\nt = time.process_time()\nimport sonicmoe\nsaid = dict(seconds=time.process_time() - t)"
        )
        times.append(float(str(said["seconds"])))
    assert min(times) < IMPORT_SECONDS


def test_version() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", sonicmoe.__version__)
    try:
        installed = metadata.version("sonicmoe")
    except metadata.PackageNotFoundError:
        pytest.skip("sonicmoe is on the path, not installed")
    assert installed == sonicmoe.__version__


def test_public_names() -> None:
    assert set(PUBLIC) <= set(sonicmoe.__all__)
    for name in sonicmoe.__all__:
        documented = getattr(sonicmoe, name)
        assert name in ("__version__", "GPT_OSS") or documented.__doc__, f"{name} has no docstring"
    assert (Path(sonicmoe.__file__).parent / "py.typed").exists()


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("text", ["README.md", "AGENTS.md", "docs/README.md", "CHANGELOG.md", ".ci/run"])
def test_commands_exist(text: str) -> None:
    """Every `make X` in code, and every `python -m X` of ours."""
    content = (ROOT / text).read_text()
    named = set(re.findall(r"(?:^ *|`)make(?: [A-Z]+=\S*| [A-Z]+='[^']*')* ([a-z][a-z-]*)", content, re.MULTILINE))
    assert named <= _targets()
    if text == "README.md":
        assert {"demo", "test", "check", "gpu-test", "compile", "perf"} <= named
    for module in re.findall(r"python -m ((?:sonicmoe|perf)[\w.]*)", content):
        path = ROOT / ("src" if module.startswith("sonicmoe") else "") / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_readme_starts_with_the_two_commands() -> None:
    lines = [line for line in (ROOT / "README.md").read_text().splitlines() if line.strip()]
    assert lines[0] == "# sonicmoe"
    assert [line.split()[:2] for line in lines[1:3]] == [["make", "demo"], ["make", "test"]]


def test_make_names_every_target_once() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == _targets()


def _prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@pytest.mark.parametrize("path", [p.relative_to(ROOT).as_posix() for p in _tree(".md")])
def test_links_resolve(path: str) -> None:
    """Relative links of every page; and every file and test that a page names in backquotes by its whole path."""
    page = ROOT / path
    text = _prose(page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target) and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), f"{path} links to {target}"
    for named in re.findall(r"`((?:src|tests|perf|docs|examples)/[\w./-]+\.(?:py|md|toml|json))`", text):
        assert (ROOT / named).exists(), f"{path} names {named}"
    for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{path} names {file}::{test}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


# Taken apart, so that this file does not match itself.
ABSOLUTE = re.compile(r"(?<![\w.])/(work|root|home|Users|mnt)/" + r"[\w.]")


@pytest.mark.parametrize("suffixes", [(".py", ".pyi"), (".md", ".toml", ".txt", ".cfg"), (".json", ".csv", ".yml", "")])
def test_no_path_of_one_machine(suffixes: tuple[str, ...]) -> None:
    found = []
    for path in _tree(*suffixes):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if ABSOLUTE.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


def test_absolute_paths_are_recognised() -> None:
    assert ABSOLUTE.search("see /" + "home/someone/x")
    assert not ABSOLUTE.search("https://example.org/a/b, docs/work/a.md and /tmp/x")


def test_examples_of_the_readme_run() -> None:
    """In small, on the CPU."""
    x, logits = torch.randn(3, 5, 16), torch.randn(15, 8)
    names = {"x": x.bfloat16(), "logits": logits, "w1": torch.randn(8, 16, 16), "w2": torch.randn(8, 16, 8)}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        for size, small in (("128", "8"), ("1536", "16"), ("256", "8"), ("cuda", "cpu")):
            block = block.replace(size, small)
        exec(compile(block, "README.md", "exec"), names)
        names["x"] = x.reshape(15, 16)
    assert names["o"].shape == (15, 16)


def test_what_is_sanitized_launches_every_kernel() -> None:
    pytest.importorskip("cutlass")
    text = (ROOT / "Makefile").read_text().replace("\\\n", "")
    chosen = re.search(r"^SANITIZE \?= (.*)$", text, re.MULTILINE)
    assert chosen
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-q", "-k", chosen[1]]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300).stdout
    for variant in ("up_proj", "down_proj", "down_dgrad", "up_dgrad", "down_wgrad", "up_wgrad", "down_wgrad_add"):
        assert f"test_one_k_step_and_one_chunk_of_columns[{variant}]" in found
    gemms = ("layer.py::test_dtypes_and_biases", "grouped_gemm.py::test_few_rows_at_one_pace")
    for of in ("aggregate", "balance", "plan", "topk", "token_rounding", *gemms):
        assert f"tests/gpu/test_{of}" in found
    assert 30 < found.count("::") < 60, "few enough for three tools in minutes"
