"""The `lora-kernels` command.

A subcommand is a module named in `COMMANDS`, with a docstring (its help text),
`add_arguments(parser)` and `run(args, parser, argv) -> int`. It is imported only when its command
runs, so that `lora-kernels --version` does not wait for transformers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import os
import sys
from collections.abc import Sequence

from lora_kernels.cli.errors import TRACEBACK, Failed, UsageError, plain_words

# name: (module, one line for `lora-kernels --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "finetune": (
        "lora_kernels.cli.finetune",
        "fine-tune a causal language model with LoRA or QLoRA",
    ),
    "serve-demo": (
        "lora_kernels.cli.serve_demo",
        "serve many adapters in one batch, check every row and measure it",
    ),
    "doctor": (
        "lora_kernels.cli.doctor",
        "show this machine, the installed versions and the path every op takes here",
    ),
}

PROGRAM = "lora-kernels"


def version() -> str:
    """The installed version of the package."""
    try:
        return importlib.metadata.version("lora_kernels")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed)"


def _top_parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="LoRA and QLoRA kernels for PyTorch.",
        epilog=f"commands:\n{lines}\n\n`{PROGRAM} COMMAND --help` lists a command's options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{PROGRAM} [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {version()}")
    parser.add_argument(
        "command", metavar="COMMAND", choices=list(COMMANDS), help=argparse.SUPPRESS
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments without the program's name; None takes `sys.argv[1:]`.

    Returns:
        The exit status: 0 done, 1 the run or a check failed, 2 wrong usage, 128 + signal when
        interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    top = _top_parser()
    if not argv:
        top.print_help()
        return 2
    for stream in (sys.stdout, sys.stderr):  # paths and locales need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Options before the command are parsed here; those after it belong to the command.
    command = top.parse_args(argv[:1]).command
    module = importlib.import_module(COMMANDS[command][0])
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    try:
        return module.run(args, parser, argv[1:])
    except (UsageError, Failed) as error:
        message = " ".join(str(error).splitlines())
        print(f"{PROGRAM} {command}: error: {message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except BrokenPipeError:  # the reader of the output has closed it
        # Python flushes standard output again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"{PROGRAM} {command}: error: {plain_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{PROGRAM} {command}: interrupted", file=sys.stderr)
        return 130
