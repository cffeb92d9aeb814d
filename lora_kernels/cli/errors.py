"""The errors that a command reports in one line, without a traceback."""

from __future__ import annotations


class UsageError(ValueError):
    """The user gave something that cannot work; the message says what, and what was expected."""


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of another package says, as one line of at most so many characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


class Failed(RuntimeError):
    """The run went wrong after it began; the message says how, what is left, and what to try."""
