"""The bench's own suite for a GPU, in a process that may die: what it had is kept, and it goes on
with the next case."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from bench.suites import suite
from tools.gpu import child, files
from tools.gpu.context import Context

# What a GPU's user would take instead; torch.compile takes half a minute a case to build.
PROVIDERS = r"ours:(native|triton)$|dense|torch$|addmm|peft|bnb"
ON_CPU = r"ours:native|dense|addmm|peft$"  # Triton's interpreter takes seconds a call
SECONDS_OF_ALL = 0.45  # of the step, for the timing itself
PROVIDERS_A_CASE = 6
CASE_LIMIT = 45.0


def run(context: Context) -> None:
    name = "gpu-tiny" if context.dry else "gpu"
    cases, output = suite(name), context.work / "bench"
    if context.dry:
        cases = [c for c in cases if c.op in ("lora_linear", "glu", "gather_lora")][-3:]
    seconds = SECONDS_OF_ALL * context.seconds / (len(cases) * PROVIDERS_A_CASE)
    command = [
        sys.executable, "-m", "bench", "run", "--resume",
        "--suite", name,
        "--device", context.device,
        "--output", str(output),
        "--seconds", f"{0.001 if context.dry else max(0.05, seconds):.3f}",
        "--rounds", "1" if context.dry else "5",
        "--rotate-mib", "1" if context.dry else "256",
        "--providers", ON_CPU if context.dry else PROVIDERS,
    ]  # fmt: skip
    if context.dry:
        command += ["--only", "^(" + "|".join(c.name.replace("+", r"\+") for c in cases) + ")$"]
    print(" ".join(command), flush=True)
    status: int | None = None
    # A case is tried twice, so each death brings the run on by half a case at least.
    for _ in range(2 * len(cases)):
        ended = child.run(
            command,
            log=None,
            limit=context.seconds,
            watch=Stuck(output.with_suffix(".json")),
            own_group=False,
        )
        status = ended.status
        if status in (0, 1, 2):  # it came to its end
            break
        print(f"-- the bench's process ended with status {status}: again", flush=True)
    doc = files.read_json(output.with_suffix(".json")) or {"rows": [], "limits": None}
    done = {row["case"] for row in doc["rows"]}
    counts: dict[str, int] = {}
    for row in doc["rows"]:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    told = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))
    words = f"{len(done)} of {len(cases)} cases: {told}; the bench's status {status}"
    context.answer(status == 0, words, limits=doc["limits"])


class Stuck:
    """Whether the bench is at one case for too long: its file has not changed since."""

    def __init__(self, path: Path) -> None:
        self.path, self.since, self.seen = path, time.monotonic(), -1

    def __call__(self) -> bool:
        try:
            now = self.path.stat().st_mtime_ns
        except OSError:
            now = -1
        if now != self.seen:
            self.seen, self.since = now, time.monotonic()
        return time.monotonic() - self.since > CASE_LIMIT
