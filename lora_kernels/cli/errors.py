"""The errors that a command reports in one line, without a traceback."""

from __future__ import annotations

import errno

TRACEBACK = "LORA_KERNELS_TRACEBACK"  # set: unexpected errors are raised
DISK = ("No space left", "PytorchStreamWriter failed writing", "inline_container", "File too large")
MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class UsageError(ValueError):
    """The user's input cannot work; the message says what is wrong and what was expected."""


def one_line(error: BaseException, most: int = 300) -> str:
    """An error's message as one line of at most `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def plain_words(error: Exception) -> str:
    """A message with what happened and what can be done, for an error of another package."""
    text = one_line(error)
    # safetensors and torch report a full disk as errors of their own.
    if getattr(error, "errno", None) == errno.ENOSPC or any(sign in text for sign in DISK):
        return f"the disk is full, or a file cannot be written there ({text}); free some space"
    if isinstance(error, MemoryError) or any(sign in text for sign in MEMORY):
        return f"out of memory ({text}); try a smaller --batch-size, --max-length or --batch"
    if isinstance(error, OSError):
        return text
    return f"{type(error).__name__}: {text} (unexpected; {TRACEBACK}=1 shows where it comes from)"


class Failed(RuntimeError):
    """The run failed after it began; the message says how, what is left, and what to try."""
