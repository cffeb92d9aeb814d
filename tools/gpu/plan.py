"""The steps of both phases, in the order of what they tell: a run that is cut has the first."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = {"A": 330.0, "B": 300.0}  # seconds


@dataclass(frozen=True)
class Step:
    """A process of its own.

    Attributes:
        limit: seconds, of a phase of the usual length; the phase ends it too.
        function: "module:name" under `tools.gpu.steps`, called with the `Context`.
        files: what it writes, of `files.FILES`.
        outside: whether its time is not the phase's.
    """

    name: str
    phase: str
    limit: float
    function: str
    says: str
    files: tuple[str, ...] = ()
    outside: bool = False


C = ("correctness.csv",)
STEPS = (
    Step("build", "A", 300, "build:run", "the compiled extension", outside=True),
    Step("environment", "A", 25, "environment:run", "device, versions, tools"),
    Step("smoke", "A", 60, "smoke:run", "every op on every backend, once", C),
    Step("compile", "A", 60, "compile:run", "Triton's kernels, many at a time", C),
    Step("canary", "A", 60, "canary:run", "masked and paired products, repeated", C),
    Step("tests", "A", 70, "parity:tests", "tests/device and others marked gpu", C),
    Step("parity", "A", 100, "parity:grid", "a sample of the parity grid", C),
    Step("memcheck", "A", 60, "sanitizer:memcheck", "accesses out of bounds", C),
    Step("racecheck", "A", 60, "sanitizer:racecheck", "races of the CUDA C++ kernels", C),
    Step("bench", "B", 170, "bench:run", "24 cases and their peers", ("bench.json", "bench.csv")),
    Step("host", "B", 60, "host:run", "microseconds of the host, CUDA graphs", ("host.csv",)),
    Step("ncu", "B", 60, "ncu:run", "four calls under Nsight Compute", ("ncu.csv",)),
    Step("tune", "B", 80, "tune:run", "tiles of two points", ("tuning.json",)),
)


def steps(phases: str, only: list[str] | None = None) -> list[Step]:
    """The steps of "A", "B" or "all", or those named.

    Raises:
        ValueError: a name is none of a step.
    """
    names = [s.name for s in STEPS]
    for name in only or []:
        if name not in names:
            raise ValueError(f"--only: got {name!r}, expected some of {', '.join(names)}")
    chosen = [s for s in STEPS if phases in ("all", s.phase)]
    # Nothing is built or known in B alone: the extension and the device come first there too.
    if phases == "B":
        chosen = [s for s in STEPS if s.name in ("build", "environment")] + chosen
    return [s for s in chosen if not only or s.name in only]
