"""The example runs as it stands, on a tiny model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import make_model, make_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "multi_lora.py"


@pytest.mark.slow
def test_multi_lora(tmp_path, monkeypatch, capsys):
    make_model().save_pretrained(tmp_path / "tiny")
    make_tokenizer().save_pretrained(tmp_path / "tiny")
    out = tmp_path / "out"
    options = ["--model", str(tmp_path / "tiny"), "--steps", "2", "--output", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    shown = capsys.readouterr().out
    for name in ("statistics", "pathlib", "collections", "threading"):
        assert f"{name}: loss " in shown
        assert (out / name / "adapter_model.safetensors").is_file()
