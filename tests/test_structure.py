"""Rules about the package's files that no linter knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Set
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_kernels"
FILES = sorted(PACKAGE.rglob("*.py"))
KINDS = PACKAGE / "adapters" / "layer_kinds.py"
# Classes that only the table of layer kinds may test for, above the floor that defines them.
LAYERS = {"LoRALinear", "QLoRALinear", "NF4Linear", "LoRAMixin", "TokenRows", "Embedding"}
LAYERS |= {"MultiLoRALinear", "MultiLoRAEmbedding", "TrainableMultiLoRALinear"}
# Parameters of a Triton kernel, or of a function that kernels call. Kernels take more arguments in
# groups: `ops/common/triton/arguments.py`.
MOST_PARAMETERS = 25


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path, root: Path = ROOT) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports from the package, for types only too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            yield from ((str(node.module), alias.name) for alias in node.names)


def modules_imported(path: Path, known: Set[str]) -> Iterator[str]:
    """Which of the known modules a file imports, also inside a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield from {inner if inner in known else str(node.module)} & known
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)


def import_graph(root: Path, parts: Iterable[str]) -> dict[str, set[str]]:
    """module -> the modules it imports, for the files below these folders."""
    known = {module_name(p, root): p for part in parts for p in (root / part).rglob("*.py")}
    return {m: set(modules_imported(p, known.keys())) - {m} for m, p in known.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("parts", [("lora_kernels",), ("lora_kernels", "bench", "tools")])
def test_no_circle_between_files(parts):
    graph = import_graph(ROOT, parts)
    assert sum(map(len, graph.values())) > 300, "found few imports: the search is broken"
    assert circle(graph) == []


@pytest.mark.parametrize("where", ["", "def f():\n    "])
def test_circles_are_found(tmp_path, where):
    package = tmp_path / "lora_kernels"
    package.mkdir()
    (package / "a.py").write_text("from lora_kernels import b\n")
    (package / "b.py").write_text(f"{where}from lora_kernels.c import x\n")
    (package / "c.py").write_text("import lora_kernels.a\n")
    (package / "__init__.py").write_text("")
    graph = import_graph(tmp_path, ["lora_kernels"])
    assert sorted(set(circle(graph))) == [f"lora_kernels.{name}" for name in "abc"]
    graph["lora_kernels.c"] = set()
    assert circle(graph) == []


def test_what_families_share_imports_no_family():
    graph = import_graph(ROOT, ["lora_kernels"])
    common = {m: v for m, v in graph.items() if m.startswith("lora_kernels.ops.common")}
    assert len(common) > 20
    for module, imported in common.items():
        ops = {m for m in imported if m.startswith("lora_kernels.ops.")}
        assert all(m.startswith("lora_kernels.ops.common") for m in ops), module


def test_kernels_take_few_parameters():
    counts = {}
    for path in (PACKAGE / "ops").glob("*/triton/*.py"):
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef) and "jit" in map(attribute, node.decorator_list):
                counts[f"{path.parent.parent.name} {node.name}"] = len(node.args.args)
    assert len(counts) > 50
    assert {name: n for name, n in counts.items() if n > MOST_PARAMETERS} == {}


def attribute(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ""


def part(module: str) -> str:
    """The top-level part that a module belongs to, such as "nn"."""
    return ".".join(module.split(".")[:2])


def test_no_private_name_is_imported_from_another_part():
    found = [
        f"{path.relative_to(ROOT)}: {module}.{name}"
        for path in FILES
        for module, name in imports(path)
        if name.startswith("_") and part(module) != part(module_name(path))
    ]
    assert found == []


def classes_tested(path: Path) -> Iterator[str]:
    """The names in the second argument of every isinstance."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "isinstance":
            yield from re.findall(r"\w+", ast.unparse(node.args[1]))


def test_only_the_table_tests_for_classes_of_layers():
    names = {node.id for node in ast.walk(tree(KINDS)) if isinstance(node, ast.Name)}
    assert names >= LAYERS - {"Embedding"}, "the table lacks these, or the search is broken"
    above = [p for p in FILES if part(module_name(p)).split(".")[-1] in ("adapters", "serving")]
    above += (PACKAGE / "training").glob("*.py")
    found = {
        str(path.relative_to(ROOT)): sorted(tested)
        for path in above
        if path != KINDS and (tested := LAYERS & set(classes_tested(path)))
    }
    assert len(above) > 30 and found == {}
