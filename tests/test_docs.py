"""Every block of Python in the README and in docs/ runs as it stands; the pages are complete."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

import lora_kernels as lk
from tests.cli.conftest import make_model, make_tokenizer
from tools import import_graph

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
_VARIABLE = re.compile(r"\bLORA_KERNELS_[A-Z][A-Z_]*[A-Z]\b")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path) -> str:
    """The blocks of a file as one program, each line where it is in the file."""
    text = read(path)
    lines = [""] * (text.count("\n") + 1)
    for found in _BLOCK.finditer(text):
        first = text.count("\n", 0, found.start(1))
        for i, line in enumerate(found[1].splitlines()):
            lines[first + i] = line
    return "\n".join(lines)


def run(path: Path) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(blocks(path), str(path), "exec"), names)
    return names


@pytest.mark.parametrize("path", [p for p in DOCS if _BLOCK.search(read(p))], ids=lambda p: p.name)
def test_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_readme_runs(tmp_path, monkeypatch):
    """From top to bottom, with a tiny model in a folder of the name that stands there."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    monkeypatch.chdir(tmp_path)
    name = re.search(r'^name = "(.+)"$', read(README), re.MULTILINE)[1]
    make_model().save_pretrained(name)
    make_tokenizer().save_pretrained(name)
    names = run(README)
    assert any("lora_A" in key for key, _ in names["peft_model"].named_parameters())
    assert {len(losses) for losses in names["losses"].values()} == {10}
    assert sorted(p.name for p in Path("adapters").iterdir()) == ["french", "german"]
    assert len(names["made"].texts) == 2 and names["pool"].names() == ("french",)


def test_readme_leads_with_install_and_a_first_run():
    """What a reader needs comes before any table."""
    text = read(README)
    first = [text.index(part) for part in ("## Install", "## Quick start", "```python", "\n|")]
    assert first == sorted(first)
    quick = _BLOCK.search(text)[1].splitlines()
    imports = [line for line in quick if line.startswith(("import", "from"))]
    assert len([line for line in quick if line]) - len(imports) <= 12


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for target, _ in _LINK.findall(read(path)):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def sources() -> list[Path]:
    """What may read a variable of the package."""
    found = [ROOT / name for name in ("setup.py", "CMakeLists.txt", "Makefile")]
    for folder in ("lora_kernels", "bench", "tools", "tests", "examples", "csrc"):
        found += (ROOT / folder).rglob("*")
    kinds = {".py", ".txt", ".cmake", ".cpp", ".h", ".cu", ".cuh", ""}
    return [p for p in found if p.is_file() and p.suffix in kinds and p.name != Path(__file__).name]


def test_every_environment_variable_is_documented():
    page = set(_VARIABLE.findall(read(ROOT / "docs" / "environment.md")))
    used: set[str] = set()
    for path in sources():
        used.update(_VARIABLE.findall(read(path)))
    assert used, "found no variable: the search is broken"
    assert used - page == set(), "docs/environment.md lacks these"
    assert page - used == set(), "docs/environment.md names these, which nothing reads"


def test_changelog_has_the_version():
    assert f"## {lk.__version__}" in read(ROOT / "CHANGELOG.md")


def messages(path: Path) -> list[str]:
    """Every string of a Python file, with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "…" for v in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_troubleshooting_quotes_what_the_code_says():
    said = [m for folder in ("lora_kernels", "setup.py") for m in _python(ROOT / folder)]
    quoted = []
    for line in read(ROOT / "docs" / "troubleshooting.md").splitlines():
        cell = line.removeprefix("| ").partition(" |")[0]
        # A name in code, and what is marked as another package's, are no message of ours.
        if line.startswith("| `") and "(torch's)" not in cell:
            quoted += [q for q in re.findall(r"`([^`]+)`", cell) if " " in q]
    assert len(quoted) > 30
    for message in quoted:
        parts = [part for part in (p.strip() for p in message.split("…")) if len(part) > 2]
        assert any(all(part in one for part in parts) for one in said), f"nothing says: {message}"


def _python(path: Path) -> list[str]:
    files = path.rglob("*.py") if path.is_dir() else [path]
    return [message for file in files for message in messages(file)]


def test_imports_run_downwards_and_the_picture_shows_them():
    edges = import_graph.edges()
    assert ("nn", "functional") in edges, "found no import: the search is broken"
    assert import_graph.upward(edges) == []
    assert import_graph.upward({("ops", "nn"), ("nn", "ops")}) == [("ops", "nn")]
    drawn = read(import_graph.PICTURE)
    assert drawn == import_graph.picture(), "python -m tools.import_graph draws it again"
