"""What keeps the package in order: no circle of imports, nothing of a family in what the families
share, and kernels with arguments in groups."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Parameters of a Triton kernel, or of a piece of one. Groups: `ops/common/triton/arguments.py`.
MOST_PARAMETERS = 25


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its name."""
    found = {}
    for path in (root / "lora_kernels").rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, those within a function too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def graph(root: Path, under: str) -> dict[str, set[str]]:
    """module -> what it imports, of the modules below `under`."""
    known = modules(root)
    return {m: set(imports(p, known)) - {m} for m, p in known.items() if m.startswith(under)}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or []."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_circle_of_imports():
    edges = graph(ROOT, "lora_kernels.ops.")
    assert len(edges) > 50
    # A package's __init__ gathers what its files define.
    packages = {m for m, path in modules(ROOT).items() if path.name == "__init__.py"}
    assert circle({m: targets - packages for m, targets in edges.items()}) == []


def test_common_imports_no_family():
    for module, targets in graph(ROOT, "lora_kernels.ops.common").items():
        families = [t for t in targets if t.startswith("lora_kernels.ops.")]
        assert all(t.startswith("lora_kernels.ops.common") for t in families), module


@pytest.mark.parametrize("where", ["", "def f():\n    "])
def test_circles_are_found(tmp_path: Path, where: str):
    package = tmp_path / "lora_kernels"
    package.mkdir()
    (package / "a.py").write_text("from lora_kernels import b\n")
    (package / "b.py").write_text(f"{where}from lora_kernels.c import x\n")
    (package / "c.py").write_text("import lora_kernels.a\n")
    (package / "__init__.py").write_text("")
    edges = graph(tmp_path, "lora_kernels.")
    assert sorted(set(circle(edges))) == [f"lora_kernels.{name}" for name in "abc"]
    edges["lora_kernels.c"] = set()
    assert circle(edges) == []


def test_kernels_take_few_parameters():
    counts = {}
    for path in (ROOT / "lora_kernels" / "ops").glob("*/triton/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and "jit" in map(_attribute, node.decorator_list):
                counts[f"{path.parent.parent.name} {node.name}"] = len(node.args.args)
    assert len(counts) > 50
    assert {name: n for name, n in counts.items() if n > MOST_PARAMETERS} == {}


def _attribute(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ""
