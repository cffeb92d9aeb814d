"""Copies to the device that nobody waits for but those who read them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Marks = dict[int, Any]  # the last event of each stream


class Transfer:
    """A stream of its own for what a pool writes, on CUDA; elsewhere plain copies, and no events.

    Memory may be written once the work that read it is over: `marks` says when that is, `after`
    makes the copies to come wait for it, on the device. `written` is the event that readers
    `wait` for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:  # the pages were made, and the ranks zeroed, on this one
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def marks(self) -> Marks:
        """Everything that the current stream was given so far."""
        if self.stream is None:
            return {}
        stream = torch.cuda.current_stream(self.device)
        return {stream.cuda_stream: stream.record_event()}

    def after(self, readers: Iterable[Any]) -> None:
        for event in readers:
            assert self.stream is not None
            self.stream.wait_event(event)

    def copying(self) -> AbstractContextManager[Any]:
        """Where copies are to be asked for."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def written(self) -> Any:
        """The event after all copies so far; None where copies are plain."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, written: Any) -> bool:
        """Let the current stream go on after a `written`; whether there is nothing to wait for."""
        if written is None or written.query():
            return True
        torch.cuda.current_stream(self.device).wait_event(written)
        return False
