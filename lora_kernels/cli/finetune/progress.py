"""Around the training loop: progress bar, log, and a clean stop on Ctrl-C."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from lora_kernels.cli.finetune.meter import MIB, resident_bytes
from lora_kernels.cli.finetune.rundir import RunDir


class Stopped(Exception):
    """Training was asked to stop during an evaluation, between two steps."""


class Interrupted(Exception):
    """Training stopped on a signal; `checkpoint` is where it can continue."""

    def __init__(self, checkpoint: Path | None, signal_number: int) -> None:
        self.checkpoint = checkpoint
        self.signal_number = signal_number


class StopOnSignal(TrainerCallback):
    """The first SIGINT or SIGTERM ends training after the current step, with a checkpoint.

    A second one stops at once; the last checkpoint remains. Use it as a context manager around
    `train()`. Outside the main thread it changes no handler.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, console: Console) -> None:
        self.console = console
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self.console.print(
            "Stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once.",
            style="yellow",
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.received is not None:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
        return control

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            raise Stopped


class Reporter(TrainerCallback):
    """A progress bar (plain lines if the output is not a terminal) and a JSON line for each step.

    Throughput counts tokens of prompts and answers without padding, over the time of the training
    steps; evaluation and checkpoints are left out.
    """

    def __init__(self, run: RunDir, console: Console, every: int = 10) -> None:
        self.run = run
        self.console = console
        self.every = every
        self.step_seconds = 0.0
        self.tokens = 0
        self._start = 0.0
        self._seen = 0
        self._last: dict[str, Any] = {}
        self._bar: Progress | None = None
        self._task: Any = None

    @property
    def tokens_per_second(self) -> float:
        """Mean over the steps of this process."""
        return self.tokens / self.step_seconds if self.step_seconds else 0.0

    def write(self, **record: Any) -> None:
        """Append a record to the log."""
        with open(self.run.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._seen = state.num_input_tokens_seen
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=state.max_steps, completed=state.global_step, note=""
            )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self._start
        tokens = state.num_input_tokens_seen - self._seen
        self._seen = state.num_input_tokens_seen
        self.step_seconds += seconds
        self.tokens += tokens
        self._last = {
            "tokens_per_second": round(tokens / seconds, 1),
            "rss_mib": round(resident_bytes() / MIB, 1),
            "seconds": round(self.step_seconds, 3),
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.write(
            step=state.global_step,
            epoch=state.epoch,
            loss=logs["loss"],
            grad_norm=logs.get("grad_norm"),
            lr=logs["learning_rate"],
            tokens=state.num_input_tokens_seen,
            **self._last,
        )
        note = (
            f"loss {logs['loss']:.3f}  {self.tokens_per_second:.0f} tokens/s  "
            f"{self._last['rss_mib']:.0f} MiB"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, note=note)
        elif state.global_step % self.every == 0 or state.global_step in (1, state.max_steps):
            self.console.print(f"step {state.global_step}/{state.max_steps}  {note}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        loss = (metrics or {}).get("eval_token_loss")
        if loss is not None:
            self.write(step=state.global_step, held_out_loss=loss)
            self.console.print(f"step {state.global_step}: held-out loss {loss:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def stderr_console() -> Console:
    """The console for messages: standard error, so that they do not mix with results."""
    return plain_console(sys.stderr)


def plain_console(file: TextIO | None = None) -> Console:
    """A console without markup, so that a [tag] or a :name: in a path is printed as it is.

    Args:
        file: None for the standard output at the time of each print.
    """
    return Console(file=file, highlight=False, markup=False, emoji=False, soft_wrap=True)
