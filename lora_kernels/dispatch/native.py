"""Loads the compiled extension, once."""

from __future__ import annotations


def why_unavailable() -> str | None:
    return "it is not built"


def available() -> bool:
    return why_unavailable() is None
