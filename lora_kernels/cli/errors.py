"""The errors that a command reports in one line, without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """The user gave something that cannot work; the message says what, and what was expected."""


class Failed(RuntimeError):
    """The run went wrong after it began; the message says how, what is left, and what to try."""
