"""`python -m tools.ptxemu.tests [isa | cuda | tma | triton ...] [-k TEXT] [--all]`: runs the functions
whose name holds TEXT, of the files whose name begins so, one after the other."""

from __future__ import annotations

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path


def main() -> int:
    """How many failed."""
    parser = argparse.ArgumentParser("python -m tools.ptxemu.tests", description=__doc__)
    parser.add_argument("files", nargs="*", default=[""], help="default: every file")
    parser.add_argument("-k", default="", metavar="TEXT", help="only functions whose name holds it")
    parser.add_argument(
        "--all", action="store_true", help="every shape of the sweeps: half an hour"
    )
    args = parser.parse_args()
    failed = 0
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if not any(path.stem.startswith(f"test_{name}") for name in args.files):
            continue
        for name, function in vars(import_module(f"tools.ptxemu.tests.{path.stem}")).items():
            if not name.startswith("test_") or args.k not in name:
                continue
            start = time.time()
            try:
                function()
                print(f"ok   {name} {time.time() - start:.1f}s", flush=True)
            except (Exception, SystemExit) as error:
                failed += 1
                print(f"FAIL {name}: {type(error).__name__} {str(error)[:900]}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
