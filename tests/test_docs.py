"""Every block of Python in docs/, and the README's on serving, runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lora_kernels as lk
from tests.cli.conftest import make_model, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path, text: str) -> str:
    """The blocks of a part of a file as one program, each line where it is in the file."""
    whole = path.read_text(encoding="utf-8")
    lines = [""] * (whole.count("\n") + 1)
    start = whole.index(text)
    for found in _BLOCK.finditer(whole, start, start + len(text)):
        first = whole.count("\n", 0, found.start(1))
        for i, line in enumerate(found[1].splitlines()):
            lines[first + i] = line
    return "\n".join(lines)


def test_there_are_docs_with_blocks():
    assert DOCS and all(_BLOCK.search(path.read_text(encoding="utf-8")) for path in DOCS)


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_blocks_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": path.stem}
    exec(compile(blocks(path, path.read_text(encoding="utf-8")), str(path), "exec"), names)
    assert not list(tmp_path.iterdir())


def test_readme_on_serving_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.chdir(tmp_path)
    trained = make_model().eval()
    lk.apply_lora(trained, r=4)
    for name, p in trained.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    lk.save_adapter(trained, "adapters/french")
    path = ROOT / "README.md"
    section = path.read_text(encoding="utf-8").partition("## Serving many adapters\n")[2]
    names: dict[str, Any] = {
        "lk": lk,
        "model": make_model().eval(),
        "tokenizer": make_tokenizer(),
        "prompts": ["to be", "to be"],
    }
    exec(compile(blocks(path, section.partition("\n## ")[0]), str(path), "exec"), names)
    with_adapter, without = names["texts"]
    assert with_adapter != without
    assert names["pool"].names() == ("french",)
