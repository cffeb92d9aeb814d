"""Runs PEFT's own tests without and with this package registered, and says which differ.

    python -m tools.peft_suite [--tests FOLDER] [FILE ...] [-k EXPRESSION]

Without --tests the source distribution of the installed PEFT is fetched with pip. The tests that
need a model hub or a package that is not installed fail in both runs, and count as equal.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

FILES = ("test_custom_models.py", "test_initialization.py", "test_lora_variants.py")


def pytest_configure() -> None:
    """As a plugin of pytest: what PEFT makes from here on is accelerated."""
    from lora_kernels.integrations.peft import register

    register()


def fetch(folder: Path) -> Path:
    """The tests of the installed release of PEFT, from its source distribution."""
    from importlib.metadata import version

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "-q", "-d", str(folder), f"peft=={version('peft')}"]
    subprocess.run(command, check=True)
    [archive] = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("peft-*/tests"))


def outcomes(report: Path) -> dict[str, str]:
    """Each test's outcome, and of a failure its message."""
    found = {}
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        result = next((c for c in case if c.tag in ("failure", "error", "skipped")), None)
        found[name] = "passed" if result is None else f"{result.tag}: {result.get('message')}"
    return found


def run(tests: Path, files: Sequence[str], chosen: str, accelerated: bool) -> dict[str, str]:
    """One run of the chosen tests, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]
        command += ["-p", "tools.peft_suite"] if accelerated else []
        command += ["-o", "addopts=", "--rootdir", str(tests.parent), f"--junit-xml={report}"]
        command += ["-k", chosen] if chosen else []
        subprocess.run([*command, *(str(tests / f) for f in files)], stdout=subprocess.DEVNULL)
        if not report.exists():
            raise RuntimeError(f"pytest wrote no report for {', '.join(files)} in {tests}")
        return outcomes(report)


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A line for each test whose outcome differs; messages hold addresses and times, so only of
    tests that pass in one run alone."""
    lines = []
    for name in sorted(before | after):
        kinds = [results.get(name, "not run").split(":")[0] for results in (before, after)]
        if kinds[0] != kinds[1]:
            lines.append(f"{name}\n    PEFT: {before.get(name)}\n    with us: {after.get(name)}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("files", nargs="*", default=FILES, help="of PEFT's tests folder")
    parser.add_argument("--tests", type=Path, help="PEFT's tests folder; default: fetched with pip")
    parser.add_argument("-k", default="", dest="chosen", help="as pytest's -k")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        tests = given.tests or fetch(Path(folder))
        before = run(tests, given.files, given.chosen, accelerated=False)
        after = run(tests, given.files, given.chosen, accelerated=True)
    passed = [sum(v == "passed" for v in results.values()) for results in (before, after)]
    print(f"{len(before)} tests: {passed[0]} pass with PEFT, {passed[1]} with lora_kernels")
    lines = compare(before, after)
    print(*lines, sep="\n")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
