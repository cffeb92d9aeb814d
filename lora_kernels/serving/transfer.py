"""Copies to the device that only their readers wait for."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Events = dict[int, Any]  # by stream, the event after its work so far


class Transfer:
    """On CUDA a stream of its own for what a pool writes; elsewhere plain copies without events.

    Memory may be written once the work that read it is done. `events` gives the events after that
    work, and `after` makes later copies wait for them, on the device. `written` gives the event
    after the copies, for which readers `wait`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self.stream is not None:  # the current stream made the pages and zeroed the ranks
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def events(self) -> Events:
        """The event after everything that the current stream was given so far."""
        if self.stream is None:
            return {}
        stream = torch.cuda.current_stream(self.device)
        return {stream.cuda_stream: stream.record_event()}

    def after(self, readers: Iterable[Any]) -> None:
        """Make later copies wait for these events."""
        for event in readers:
            assert self.stream is not None
            self.stream.wait_event(event)

    def copying(self) -> AbstractContextManager[Any]:
        """The context in which copies are issued."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def written(self) -> Any:
        """The event after all copies so far; None without a stream."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, written: Any) -> bool:
        """Make the current stream wait for a `written` event; True if the copies are done."""
        if written is None or written.query():
            return True
        torch.cuda.current_stream(self.device).wait_event(written)
        return False
