"""Serve many LoRA adapters at once: one batch, each row with its own.

A few adapters are fine-tuned briefly, each on a few lines in its own voice. The others are
these with seeded noise. All go into one pool of rank pages. One mixed batch is answered, and
every row is compared with the model with that adapter alone. Then the batch is timed, in turn with
the base model alone and with PEFT's mixed batch. Only the plot is kept.
"""

from __future__ import annotations

import argparse
import logging

from lora_kernels.cli.errors import UsageError
from lora_kernels.cli.finetune.args import not_negative, positive

__all__ = ["add_arguments", "run"]

QUESTION = "What will you do tomorrow?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option."""
    add = parser.add_argument_group("what to serve").add_argument
    add(
        "--model", metavar="NAME", help="folder, hub name or .gguf file (default: the demo's model)"
    )
    add("--adapters", type=positive, default=1000, metavar="N", help="(default: %(default)s)")
    add("--rank", type=positive, default=8, metavar="R", help="(default: %(default)s)")
    add(
        "--train-steps",
        type=positive,
        default=8,
        metavar="N",
        help="for each of the fine-tuned adapters (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the model and the pages; auto: bfloat16 where the hardware multiplies it "
        "(default: %(default)s)",
    )
    add("--seed", type=not_negative, default=0, help="(default: %(default)s)")

    add = parser.add_argument_group("what to measure").add_argument
    add(
        "--batch",
        type=positive,
        default=16,
        metavar="ROWS",
        help="rows, each with its own adapter (default: %(default)s)",
    )
    add(
        "--tokens",
        type=positive,
        default=32,
        metavar="N",
        help="tokens that each row is answered with (default: %(default)s)",
    )
    add("--question", default=QUESTION, help="of every row (default: %(default)r)")
    add(
        "--rounds",
        type=positive,
        default=3,
        metavar="N",
        help="each figure is the median of so many (default: %(default)s)",
    )
    add(
        "--peft-seconds",
        type=not_negative,
        default=60,
        metavar="S",
        help="time in which PEFT may load adapters; 0 leaves it out (default: %(default)s)",
    )
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--plot",
        metavar="FILE",
        default="serve-demo.png",
        help="tokens/s over the number of adapters in the batch; .png, .svg or .pdf "
        "(default: %(default)s)",
    )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser, argv: list[str]) -> int:
    """Run the command. Returns 0, or 1 if a row differs from its adapter alone.

    Raises:
        UsageError: the options cannot work.
    """
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # peft imports bitsandbytes, which warns
    try:
        from lora_kernels.cli.serve_demo.job import serve
    except ImportError as error:
        raise UsageError(
            f"the package {error.name!r} is missing; install lora_kernels[finetune]"
        ) from error
    return serve(args)
