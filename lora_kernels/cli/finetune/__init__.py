"""Fine-tune a causal language model with LoRA or QLoRA.

Only the low-rank factors are trained; the base weights are frozen, in 4 bits unless told otherwise.
The run's folder gets checkpoints of the adapter and the optimiser, a JSON log, the loss curves and
the adapter in PEFT's format. Ctrl-C saves a checkpoint; --resume continues from it exactly.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from lora_kernels.cli.errors import TRACEBACK, Failed, UsageError, plain_words
from lora_kernels.cli.finetune.args import add_arguments, parse
from lora_kernels.cli.finetune.rundir import RunDir

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace, parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UsageError: the options cannot work.
    """
    args = parse(parser, argv)
    # accelerate imports bitsandbytes if it is installed. bitsandbytes then warns about kernels that
    # are not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from lora_kernels.cli.finetune.job import finetune
    except ImportError as error:
        raise UsageError(
            f"the package {error.name!r} is missing; install lora_kernels[finetune]"
        ) from error
    try:
        return finetune(args)
    except (UsageError, Failed, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        hint = ""
        if RunDir(Path(args.output)).checkpoints():
            hint = f"; continue with: lora-kernels finetune --output {args.output} --resume"
        raise Failed(plain_words(error) + hint) from error
