"""What AGENTS.md asks of the code and can be counted: direction of imports, sizes, words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "sonicmoe"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HOST = [p for p in [*SOURCES, *(ROOT / "perf").rglob("*.py"), *(ROOT / "examples").glob("*.py")] if p.suffix == ".py"]

# A module imports its own layer and those before it.
LAYERS = (
    ("errors", "activations"),
    ("configs",),
    ("cute_kernels",),
    ("jit",),
    ("reference",),
    ("ops",),
    ("routing",),
    ("autograd",),
    ("functional",),
    ("layer",),
    ("moe",),
    ("demo", "compat", "integrations", "__init__"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILE_LINES, FUNCTION_LINES, DEVICE_METHOD_LINES = 500, 60, 90


def _part(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def _imports(path: Path) -> set[str]:
    """Whole names of all modules that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = ["sonicmoe", *path.relative_to(PACKAGE).parts[:-1]]
            base = ".".join(folder[: len(folder) + 1 - node.level]) + "." if node.level else ""
            found |= {f"{base}{node.module + '.' if node.module else ''}{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_layer() -> None:
    assert {_part(p) for p in SOURCES} <= set(RANK)


@pytest.mark.parametrize("part", sorted({_part(p) for p in SOURCES}))
def test_imports_point_down(part: str) -> None:
    for path in (p for p in SOURCES if _part(p) == part):
        for name in _imports(path):
            if name.startswith("sonicmoe.") and (other := name.split(".")[1]) in RANK:
                assert RANK[other] < RANK[part] or other == part or RANK[part] == 0, f"{path.name} imports {name}"


@pytest.mark.parametrize(
    ("part", "forbidden"), [("cute_kernels", "torch"), ("reference", "cutlass"), ("routing", "cutlass")]
)
def test_worlds_apart(part: str, forbidden: str) -> None:
    for path in (p for p in SOURCES if _part(p) == part):
        assert not any(name.split(".")[0] == forbidden for name in _imports(path)), path


def test_cutlass_is_never_imported_at_the_top_of_a_host_file() -> None:
    for path in (p for p in SOURCES if _part(p) not in ("cute_kernels",)):
        top = [n for n in ast.parse(path.read_text()).body if isinstance(n, (ast.Import, ast.ImportFrom))]
        names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module) for n in top if isinstance(n, ast.ImportFrom)}
        assert not any(name.split(".")[0] in ("cutlass", "tvm_ffi") for name in names), path


def test_sizes() -> None:
    large = []
    for path in HOST:
        text = path.read_text()
        if text.count("\n") > FILE_LINES:
            large.append(f"{path.name}: {text.count(chr(10))} lines")
        limit = DEVICE_METHOD_LINES if "cute_kernels" in path.parts else FUNCTION_LINES
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                lines = (node.end_lineno or node.lineno) - node.lineno + 1 - len(docstring.splitlines())
                if lines > limit:
                    large.append(f"{path.name}: {node.name} has {lines} lines")
    assert not large


def test_no_drawers_for_odds_and_ends() -> None:
    for path in HOST:
        assert not re.search(r"util|helper|manager|misc", path.stem), path


def test_nothing_is_left_to_do() -> None:
    # Taken apart, so that this file does not match itself.
    left = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
    for path in [*HOST, *(ROOT / "tests").rglob("*.py"), *(ROOT / "docs").rglob("*.md")]:
        assert not left.search(path.read_text()), path
