"""What every step is told, and how it answers."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from tools.gpu import files

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Context:
    """Where a step runs.

    Attributes:
        step: its name.
        device: "cuda", "cuda:1", ...; in a dry run "cpu".
        work: the folder of all that is written; only the names in `files.FILES` come out of it.
        processes: how many may run at a time.
        sample: the share of the parity grid.
        seconds: what the step may take.
        dry: every line, on tiny shapes, on the CPU.
    """

    step: str
    device: str
    work: Path
    processes: int
    sample: float
    seconds: float
    dry: bool

    @staticmethod
    def parse(step: str, argv: list[str] | None = None) -> Context:
        parser = argparse.ArgumentParser(f"python -m tools.gpu.steps.{step}")
        parser.add_argument("--device", required=True)
        parser.add_argument("--work", type=Path, required=True)
        parser.add_argument("--processes", type=int, default=1)
        parser.add_argument("--sample", type=float, default=1.0)
        parser.add_argument("--seconds", type=float, default=600.0)
        parser.add_argument("--dry", action="store_true")
        return Context(step, **vars(parser.parse_args(argv)))

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        values = [(k, v) for k, v in asdict(self).items() if k not in ("step", "dry")]
        return [w for k, v in values for w in (f"--{k}", str(v))] + ["--dry"] * self.dry

    @property
    def correctness(self) -> Path:
        return self.work / files.CORRECTNESS

    def row(self, what: str, status: str, note: str = "", **more: Any) -> None:
        """Write a line of correctness.csv, and to the log where it is bad."""
        values = {"step": self.step, "what": what, "status": status, "note": note, **more}
        files.append(self.correctness, [values])
        if status in files.BAD:
            print(f"{status}: {what} {more.get('backend', '')}: {note}", flush=True)

    def answer(self, ok: bool, words: str, *, stop: bool = False, **facts: Any) -> NoReturn:
        """End the step. What it says goes to summary.json; `stop` ends all phases."""
        found = {"ok": ok, "words": words, "stop": stop, "facts": facts}
        files.write_json(answer_file(self.work, self.step), found)
        print(f"-- {words}", flush=True)
        sys.stdout.flush()
        # Not sys.exit: a broken device may hang what Python does at its end.
        os._exit(0 if ok else 1)


def answer_file(work: Path, step: str) -> Path:
    return work / "answers" / f"{step}.json"


def environment(dry: bool) -> dict[str, str]:
    """The variables of a step's process."""
    env = dict(os.environ)
    env |= {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}
    # One of two that make cuBLAS the same from run to run; Triton warns where the next is unset.
    env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    env.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    env.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "triton-cache"))
    env.setdefault("OMP_NUM_THREADS", "1" if dry else "2")
    env.pop("TRITON_INTERPRET", None)
    if dry:
        env["TRITON_INTERPRET"] = "1"
    return env


def find_tool(name: str) -> str | None:
    """On PATH, or where CUDA is usually installed."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(name, path=os.pathsep.join(places))
