"""What has been done, on disk: a second run of the same sources on the same device goes on where
the first one stopped."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.gpu import files
from tools.gpu.context import ROOT
from tools.records import commit

# A step's status. The first two are its own word, and final; the others are tried again.
OK, WRONG = "ok", "wrong"
DIED, CUT, WAITING, RUNNING = "died", "cut", "not run", "running"
FINAL = (OK, WRONG)
SOURCES = ("lora_kernels", "csrc", "bench", "tests", "tools")
KINDS = (".py", ".cpp", ".h", ".cu", ".cuh", ".cmake")


def identity(device: str, dry: bool) -> dict[str, Any]:
    """What a run is of: where any of it differs, what is on disk is another run's."""
    found: dict[str, Any] = {"device": device, "dry": dry, "sources": _sources()}
    found["python"] = platform.python_version()
    for name in ("torch", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _sources() -> str:
    """A hash over every source file: git may not be there, and knows nothing of what is not
    committed."""
    digest = hashlib.sha256()
    for path in sorted(_files()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _files() -> Iterator[Path]:
    for folder in SOURCES:
        yield from (p for p in (ROOT / folder).rglob("*") if p.suffix in KINDS and p.is_file())


class State:
    """summary.json: what the run is of, and each step's status, words and facts."""

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path = path
        self.doc: dict[str, Any] = {"format": 1, "of": of, "commit": commit(), "steps": {}}
        self.doc["begun"] = _now()

    @staticmethod
    def load(path: Path, of: dict[str, Any]) -> State | None:
        """What is on disk, or None where it is not of this run."""
        doc = files.read_json(path)
        if doc is None or doc.get("of") != of:
            return None
        state = State(path, of)
        state.doc = doc
        return state

    def status(self, step: str) -> str:
        return str(self.doc["steps"].get(step, {}).get("status", WAITING))

    def set(self, step: str, status: str, words: str, seconds: float = 0.0, **more: Any) -> None:
        """Keep a step's status, at once on disk too."""
        entry = {"status": status, "words": words, "seconds": round(seconds, 1), "at": _now()}
        self.doc["steps"][step] = entry | more
        self.save()

    def save(self) -> None:
        files.write_json(self.path, self.doc)


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
