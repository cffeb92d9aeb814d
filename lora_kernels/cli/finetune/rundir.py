"""The files in a run's folder. An interruption while writing leaves them readable."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kernels.cli.errors import UsageError

CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# Files without which a checkpoint cannot be resumed from.
CHECKPOINT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
)


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@dataclass
class Start:
    """Results from the beginning of a run, for `--resume` and the final table."""

    settings: dict[str, Any]
    data: str
    held_out_before: float | None = None
    answers_before: list[str] = field(default_factory=list)


class RunDir:
    """Paths of one run's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.run = root / "run.json"
        self.log = root / "log.jsonl"
        self.plot = root / "loss.png"
        self.generations = root / "generations.json"
        self.summary = root / "summary.json"
        self.adapter = root / "adapter"
        self.merged = root / "merged"

    def check(self, overwrite: bool) -> None:
        """Raise unless a new run can use the folder.

        Raises:
            UsageError: it holds a run and `overwrite` is off, is not a folder, or cannot be
                written to.
        """
        if os.path.lexists(self.root) and not self.root.is_dir():
            raise UsageError(f"--output: {str(self.root)!r} is not a folder")
        self.try_writing()
        if (self.run.exists() or self.checkpoints()) and not overwrite:
            raise UsageError(
                f"--output: {str(self.root)!r} holds a run; --resume continues it, "
                "--overwrite replaces it"
            )

    def try_writing(self) -> None:
        """Create the folder and a file in it, and remove what was created."""
        made = [p for p in (self.root, *self.root.parents) if not os.path.exists(p)]
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root) as file:
                file.write(b"x")
        except OSError as error:
            raise UsageError(
                f"--output: cannot write into {str(self.root)!r}: {error.strerror}"
            ) from None
        finally:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def prepare(self, overwrite: bool) -> None:
        """Create the folder for a new run, removing an older run. Raises as `check`."""
        self.check(overwrite)
        self._clear()
        self.root.mkdir(parents=True, exist_ok=True)

    def _clear(self) -> None:
        for path in (self.run, self.log, self.plot, self.generations, self.summary):
            path.unlink(missing_ok=True)
        for folder in (self.adapter, self.merged, *self.checkpoints(), *self.leftovers()):
            shutil.rmtree(folder, ignore_errors=True)

    def take_merged(self, folder: Path) -> None:
        """Move a merged model, written elsewhere in this folder, to its place."""
        shutil.rmtree(self.merged, ignore_errors=True)
        os.replace(folder, self.merged)

    def checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        found = [p for p in self.root.iterdir() if p.is_dir() and CHECKPOINT.match(p.name)]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))

    def leftovers(self) -> list[Path]:
        """Folders of incomplete checkpoints, whose writing was interrupted."""
        return [p for p in self.root.glob(".saving-*") if p.is_dir()]

    def checkpoint(self, name: str) -> Path:
        """The checkpoint that `--resume NAME` means; "last" is the newest.

        Raises:
            UsageError: there is none, or a file of it is missing.
        """
        if name == "last":
            found = self.checkpoints()
            if not found:
                raise UsageError(f"--resume: {str(self.root)!r} holds no checkpoint")
            path = found[-1]
        else:
            path = Path(name) if Path(name).is_dir() else self.root / name
            if not path.is_dir():
                raise UsageError(f"--resume: no checkpoint {name!r}")
        missing = [f for f in CHECKPOINT_FILES if not (path / f).is_file()]
        if missing:
            raise UsageError(f"--resume: {str(path)!r} lacks {', '.join(missing)}")
        return path

    def read_run(self) -> dict[str, Any] | None:
        """The settings that the run was started with; None without a run.

        Raises:
            UsageError: run.json is not readable.
        """
        if not self.run.is_file():
            return None
        try:
            run = json.loads(self.run.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise UsageError(f"{self.run}: not readable ({error})") from None
        if not isinstance(run, dict) or not isinstance(run.get("settings"), dict):
            raise UsageError(f"{self.run}: not the run.json of a run")
        return run

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file atomically."""
        write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """The log's records, without an incomplete last line."""
        records = []
        if self.log.is_file():
            for line in self.log.read_text(encoding="utf-8").splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    break
        return records

    def cut_log(self, step: int) -> None:
        """Drop the records after `step`, which a resumed run writes again."""
        kept = [r for r in self.read_log() if r.get("step", 0) <= step]
        write_text(self.log, "".join(json.dumps(r) + "\n" for r in kept))
