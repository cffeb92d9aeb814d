"""Rules about the package's files that no linter knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
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


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path) for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of everything that a file imports from the package, for types only too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(PACKAGE.name):
            yield from ((str(node.module), alias.name) for alias in node.names)


def test_no_circle_between_files():
    graph = {
        module_name(path): {
            full if (full := f"{module}.{name}") in MODULES else module
            for module, name in imports(path)
        }
        for path in FILES
    }
    assert sum(map(len, graph.values())) > 300, "found few imports: the search is broken"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"these files import each other: {' -> '.join(error.args[1])}")


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
