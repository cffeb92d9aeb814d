"""Install, build and run the package with each release of torch and the Triton that it brings.

    python tools/version_matrix.py [--torch 2.11.0 2.15.0] [--python python3.12]

For each release, in a fresh virtual environment: pip installs torch with all that it asks for and
then this checkout; outside the checkout the package is imported, `lora-kernels doctor` runs, and
ops are called on tensors without data (meta, and fake CUDA tensors); then a sample of the tests
runs with the installed package, Triton's kernels interpreted and, from tests/compiled, compiled.
Written as it goes: FOLDER/matrix.json and FOLDER/matrix.md, the table. No GPU is needed, and no
CUDA kernel runs.

A CUDA build of torch takes 5 to 8 GB of disk while its turn lasts, and some of download.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "newest")
BUILD_TOOLS = ("setuptools>=77", "wheel", "pybind11>=2.13", "ninja")
RUN_TOOLS = ("numpy", "safetensors", "pytest", "pytest-benchmark", "hypothesis")
# As many of the big grids as `--sample` says (tests/sampling.py).
INTERPRETED = ("tests/dispatch", "tests/ops/test_parity.py", "tests/native/test_extension.py")
COMPILED = ("tests/compiled/test_aot.py",)

PROBE = r"""
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import lora_kernels as lk
import torch
from torch._subclasses import FakeTensorMode
from lora_kernels.dispatch import native, ops

native.available()  # loads the extension
has = torch._C._dispatch_has_kernel_for_dispatch_key
on = {key: sorted(op for op in ops() if has(f"lora_kernels_native::{op}", key))
      for key in ("CPU", "CUDA")}
try:
    import triton
    triton_version = triton.__version__
except ImportError:
    triton_version = ""

def layers(device):
    x = torch.empty(4, 256, dtype=torch.bfloat16, device=device)
    w = torch.empty(192, 256, dtype=torch.bfloat16, device=device)
    a, b = torch.empty(8, 256, device=device), torch.empty(192, 8, device=device)
    q = lk.NF4Weight.quantize(w)
    ys = (lk.functional.nf4_linear(x, q), lk.functional.lora_linear(x, w, a, b, scale=2.0),
          lk.functional.nf4_lora_linear(x, q, a, b, scale=2.0), q.dequantize())
    return [[str(y.device.type), list(y.shape)] for y in ys]

expected = [[4, 192]] * 3 + [[192, 256]]
meta = layers("meta")
with FakeTensorMode():
    fake = layers("cuda")
assert meta == [["meta", s] for s in expected] and fake == [["cuda", s] for s in expected]
print("PROBE" + json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda or "", "triton": triton_version,
    "path": lk.__file__, "reason": native.why_unavailable() or "",
    "build": native.build_info() if native.available() else {},
    "without_cuda": native.why_without_cuda() or "",
    "cpu_ops": on["CPU"], "cuda_ops": on["CUDA"],
    "warnings": [str(w.message) for w in caught if "lora_kernels" in str(w.message)],
}))
"""


@dataclass
class Row:
    """What is known of one release; a step that was not come to is empty."""

    asked: str
    torch: str = ""
    cuda: str = ""
    triton: str = ""
    python: str = ""
    installed: str = ""
    built: str = ""
    imported: str = ""
    doctor: str = ""
    meta: str = ""
    interpreted: str = ""
    compiled: str = ""
    seconds: dict[str, int] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)


class Failed(Exception):
    """A step that failed; the rest of its release is left out."""


class Matrix:
    """The releases asked for, one after the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.known = self.folder / "matrix.json"
        if self.known.exists():
            asked = set(args.torch)
            known = json.loads(self.known.read_text(encoding="utf-8"))
            self.rows = [Row(**row) for row in known if row["asked"] not in asked]

    def run(self) -> bool:
        """Whether every release came through every step."""
        good = True
        for release in self.args.torch:
            row = Row(release)
            self.rows.append(row)
            print(f"== torch {release}", flush=True)
            try:
                self.release(row)
            except Failed as error:
                good = False
                print(f"-- torch {release}: {error}", flush=True)
            finally:
                self.write()
                if not self.args.keep:
                    shutil.rmtree(self.environment(row), ignore_errors=True)
        return good and not any("failed" in v for r in self.rows for v in results(r))

    def environment(self, row: Row) -> Path:
        return self.folder / f"torch-{row.asked}"

    def release(self, row: Row) -> None:
        home = self.environment(row)
        python = home / "bin" / "python"
        if not python.exists():
            self.step(row, "venv", [self.args.python, "-m", "venv", home])
        pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
        wanted = "torch" if row.asked == "newest" else f"torch=={row.asked}"
        self.step(row, "installed", [*pip, wanted, *BUILD_TOOLS, *RUN_TOOLS])
        if shutil.which("cmake") is None:
            self.step(row, "installed", [*pip, "cmake"])
        row.installed = "yes"
        native = {"LORA_KERNELS_CUDA_ARCHS": self.args.archs, "JOBS": str(self.args.jobs)}
        command = [*pip, "-v", "--no-build-isolation", "--no-deps", "--force-reinstall", ROOT]
        self.step(row, "built", command, native)
        row.built = "yes"

        said = self.step(row, "imported", [python, "-c", PROBE])
        found = json.loads(said.split("PROBE")[-1])
        row.torch, row.cuda, row.triton = found["torch"], found["cuda"], found["triton"]
        row.python = ".".join(map(str, self.version(python)))
        row.details["build"] = json.dumps(found["build"])
        row.details["cuda_ops"] = " ".join(found["cuda_ops"])
        if found["reason"]:
            row.built = row.imported = "failed"
            raise Failed(found["reason"])
        row.built = "CPU and CUDA" if found["cuda_ops"] else "CPU"
        row.details["without_cuda"] = found["without_cuda"]
        row.details["warnings"] = "; ".join(found["warnings"])
        row.imported = f"{len(found['cpu_ops'])} CPU, {len(found['cuda_ops'])} CUDA ops"
        row.meta = "yes"
        self.step(row, "doctor", [python.parent / "lora-kernels", "doctor"])
        row.doctor = "yes"
        self.write()
        tests = self.tests_alone(Path(found["path"]).parent)
        for kind, paths, interpret in (
            ("interpreted", self.args.interpreted, "1"),
            ("compiled", self.args.compiled, "0"),
        ):
            if not paths or not row.triton:
                setattr(row, kind, "not tried" if row.triton else "no Triton")
                continue
            command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
            command += ["--sample", self.args.sample, *self.args.pytest]
            said = self.step(row, kind, command, {"TRITON_INTERPRET": interpret}, tests, False)
            last = [line for line in said.splitlines() if re.search(r"\d+ (passed|failed)", line)]
            summary = re.sub(r" in .*|=+", "", last[-1]).strip() if last else "failed: see the log"
            setattr(row, kind, re.sub(r", \d+ (warnings?|deselected)", "", summary))

    def tests_alone(self, package: Path) -> Path:
        """A copy of what the tests need, with the installed package in place of the checkout's."""
        folder = self.folder / "tests-alone"
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("tests", "bench", "csrc", "tools"):
            shutil.copytree(ROOT / name, folder / name)
        for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md"):
            shutil.copy2(ROOT / name, folder / name)
        (folder / package.name).symlink_to(package)
        return folder

    def version(self, python: Path) -> tuple[int, ...]:
        text = "import sys, json; print(json.dumps(sys.version_info[:3]))"
        done = subprocess.run([python, "-c", text], capture_output=True, text=True, check=True)
        return tuple(json.loads(done.stdout))

    def step(
        self,
        row: Row,
        name: str,
        command: list[object],
        variables: dict[str, str] | None = None,
        folder: Path | None = None,
        must: bool = True,
    ) -> str:
        """Runs a command outside the checkout, its output kept in a log.

        Raises:
            Failed: it failed and `must`.
        """
        log = self.folder / f"torch-{row.asked}.{name}.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("LORA_KERNELS_")}
        environment.pop("PYTHONPATH", None)
        environment.update(variables or {})
        start = time.monotonic()
        with log.open("w", encoding="utf-8") as out:
            code = subprocess.run(
                list(map(str, command)),
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=folder or self.folder,
                env=environment,
                check=False,
            ).returncode
        row.seconds[name] = row.seconds.get(name, 0) + round(time.monotonic() - start)
        print(f"   {name}: {'yes' if code == 0 else f'exit {code}'}", flush=True)
        text = log.read_text(encoding="utf-8", errors="replace")
        if code != 0 and must:
            if hasattr(row, name):
                setattr(row, name, "failed")
            row.details[name] = text[-3000:]
            raise Failed(f"{name}: exit {code}, see {log}")
        return text

    def write(self) -> None:
        """The rows so far, as JSON and as a table."""
        self.rows.sort(key=lambda row: [int(p) for p in re.findall(r"\d+", row.torch or "99")[:2]])
        for path, text in (
            (self.known, json.dumps([asdict(row) for row in self.rows], indent=1) + "\n"),
            (self.folder / "matrix.md", table(self.rows)),
        ):
            path.with_suffix(".new").write_text(text, encoding="utf-8")
            path.with_suffix(".new").replace(path)


def results(row: Row) -> tuple[str, ...]:
    """The outcome of each step."""
    return (row.installed, row.built, row.imported, row.doctor, row.meta,
            row.interpreted, row.compiled)  # fmt: skip


def table(rows: list[Row]) -> str:
    """Rows of a table in Markdown; below it, what was left out and why."""
    head = ["torch", "Triton", "Python", "built", "imported", "doctor, meta and fake tensors",
            "tests interpreted", "tests compiled"]  # fmt: skip
    lines = [head, ["---"] * len(head)]
    for row in rows:
        clear = "yes" if row.doctor == row.meta == "yes" else row.doctor or "not tried"
        cells = [row.torch or row.asked, row.triton, row.python, row.built, row.imported, clear,
                 row.interpreted, row.compiled]  # fmt: skip
        lines.append([cell or "not tried" for cell in cells])
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    for row in rows:
        if reason := row.details.get("without_cuda"):
            text += f"\ntorch {row.torch or row.asked}, no CUDA kernels: {reason}.\n"
    return text


def main() -> None:
    """As the module says; exit status 1 where a step failed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", nargs="+", default=list(RELEASES), metavar="RELEASE")
    parser.add_argument("--python", default=sys.executable, help="of the environments")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix")
    parser.add_argument("--archs", default="90a-real", help="GPUs to compile for (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--sample", default="0.02", help="part of the big grids (%(default)s)")
    parser.add_argument("--interpreted", nargs="*", default=INTERPRETED, metavar="PATH")
    parser.add_argument("--compiled", nargs="*", default=COMPILED, metavar="PATH")
    parser.add_argument("--pytest", nargs="*", default=[], help="more arguments for pytest")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    args = parser.parse_args()
    sys.exit(not Matrix(args).run())


if __name__ == "__main__":
    main()
