"""What apply_lora shows while it works."""

from __future__ import annotations

import io
import sys

import pytest

from lora_kernels.adapters import apply_lora
from tests.adapters.models import mlp


def test_progress():
    calls = []
    apply_lora(mlp(), r=2, progress=lambda *call: calls.append(call))
    assert calls == [(0, 3, "up"), (1, 3, "down"), (2, 3, "head"), (3, 3, "head")]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("progress", "stream", "after", "shown"),
    [
        (None, _Terminal, 0.0, True),
        (None, _Terminal, 3600.0, False),  # done sooner
        (None, io.StringIO, 0.0, False),
        (False, _Terminal, 0.0, False),
        (True, io.StringIO, 3600.0, True),
    ],
)
def test_a_bar(progress, stream, after, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr("lora_kernels.adapters.progress.BAR_AFTER", after)
    apply_lora(mlp(), r=2, progress=progress)
    assert ("adapters: 100%" in sys.stderr.getvalue()) == shown


def test_a_bar_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(apply_lora(mlp(), r=2).modules) == 3
