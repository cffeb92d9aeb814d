"""The options of `lora-kernels finetune`, their checks, and what `--demo` sets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lora_kernels.cli.errors import UsageError

# Options that decide what is learned: a resumed run cannot change them.
FIXED = [
    "model",
    "data",
    "demo",
    "rank",
    "alpha",
    "dropout",
    "rslora",
    "dora",
    "target_modules",
    "fuse",
    "quantize",
    "double_quant",
    "block_size",
    "lr",
    "loraplus_ratio",
    "weight_decay",
    "epochs",
    "max_steps",
    "batch_size",
    "grad_accum",
    "max_length",
    "warmup",
    "max_grad_norm",
    "schedule",
    "eval_fraction",
    "dtype",
    "seed",
]

MAX_LENGTH = 512  # tokens, if the model takes as many

# Chosen for about three minutes of training on two cores; see README.md.
DEMO = {
    "output": "demo-output",
    "rank": 16,
    "alpha": 32.0,
    "dropout": 0.05,
    "quantize": "nf4",
    "double_quant": True,
    "block_size": 64,
    "lr": 4e-4,
    "loraplus_ratio": 4.0,
    "max_steps": 150,
    "batch_size": 8,
    "max_length": 192,
    "eval_steps": 50,
    "save_steps": 50,
    "generate": 3,
    "overwrite": True,
    "verify": True,
}


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return value


def not_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 0")
    return value


def share(text: str) -> float:
    """A number from 0 to below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 0 <= value < 1")
    return value


def above_zero(text: str) -> float:
    """A number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected a number above 0")
    return value


def from_zero(text: str) -> float:
    """A number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected a number of at least 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every option."""
    add = parser.add_argument_group("what to train").add_argument
    add(
        "--demo",
        action="store_true",
        help="SmolLM2-135M on questions about Python's own docstrings; nothing else is needed",
    )
    add(
        "--model", metavar="NAME", help="folder, hub name or .gguf file (default: the demo's model)"
    )
    add(
        "--data",
        metavar="FILE",
        help="plain text, or .jsonl or .json with rows of prompt and response (or completion), "
        "messages, text, or as Alpaca's or ShareGPT's",
    )
    add("--output", metavar="DIR", default="runs/finetune", help="(default: %(default)s)")
    add("--overwrite", action="store_true", help="replace the run that --output holds")
    add(
        "--resume",
        nargs="?",
        const="last",
        metavar="CHECKPOINT",
        help="continue the run in --output, from its last checkpoint or the one named",
    )

    add = parser.add_argument_group("adapter").add_argument
    add("--rank", type=positive, default=16, metavar="R", help="(default: %(default)s)")
    add(
        "--alpha",
        type=above_zero,
        default=32.0,
        help="the branch is scaled by alpha/rank (default: %(default)s)",
    )
    add("--dropout", type=share, default=0.05, metavar="P", help="(default: %(default)s)")
    add("--rslora", action="store_true", help="scale by alpha/sqrt(rank) instead")
    add("--dora", action="store_true", help="learn each output's magnitude as well (DoRA)")
    add(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="suffixes of module names, one regular expression, or all-linear (default)",
    )

    add = parser.add_argument_group("base weights").add_argument
    add("--quantize", choices=("nf4", "fp4", "none"), default="nf4", help="(default: %(default)s)")
    add(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="quantise the block scales too (default: on)",
    )
    add(
        "--block-size",
        type=positive,
        default=64,
        metavar="N",
        help="weights that share a scale (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="compute type; auto: bfloat16 where the hardware multiplies it (default: %(default)s)",
    )

    add = parser.add_argument_group("optimisation").add_argument
    add("--lr", type=above_zero, default=2e-4, help="(default: %(default)s)")
    add(
        "--loraplus-ratio",
        type=above_zero,
        default=1.0,
        metavar="RATIO",
        help="LoRA+: learning rate of B over that of A (default: %(default)s)",
    )
    add("--weight-decay", type=from_zero, default=0.0, help="(default: %(default)s)")
    add("--epochs", type=above_zero, default=1.0, help="(default: %(default)s)")
    add("--max-steps", type=positive, metavar="N", help="optimiser steps; goes before --epochs")
    add("--batch-size", type=positive, default=8, metavar="N", help="(default: %(default)s)")
    add(
        "--grad-accum",
        type=positive,
        default=1,
        metavar="N",
        help="batches per optimiser step (default: %(default)s)",
    )
    add(
        "--max-length",
        type=positive,
        metavar="TOKENS",
        help=f"(default: {MAX_LENGTH}, or what the model takes where that is less)",
    )
    add(
        "--schedule",
        choices=("cosine", "linear", "constant_with_warmup"),
        default="cosine",
        help="(default: %(default)s)",
    )
    add(
        "--warmup",
        type=from_zero,
        default=0.05,
        help="steps, or a share of all steps when below 1 (default: %(default)s)",
    )
    add(
        "--max-grad-norm",
        type=from_zero,
        default=1.0,
        help="0: no clipping (default: %(default)s)",
    )
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="recompute activations in the backward: less memory, more time",
    )
    add(
        "--fuse",
        action=argparse.BooleanOptionalAction,
        help="run projections of one input (q, k and v, gate and up) as one (default: on a GPU; "
        "the CPU's kernels take one after the other, so that it gains nothing)",
    )
    add("--seed", type=not_negative, default=0, help="(default: %(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")

    add = parser.add_argument_group("checks and results").add_argument
    add(
        "--eval-fraction",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="share of --data that is held out (default: %(default)s)",
    )
    add("--eval-steps", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    add("--save-steps", type=positive, default=100, metavar="N", help="(default: %(default)s)")
    add(
        "--keep",
        type=positive,
        default=2,
        metavar="N",
        help="checkpoints kept (default: %(default)s)",
    )
    add(
        "--generate",
        type=not_negative,
        default=2,
        metavar="N",
        help="answers to show before and after (default: %(default)s)",
    )
    add(
        "--verify",
        action="store_true",
        help="reload the adapter into a fresh model and compare the logits; merge it and measure",
    )
    add("--merge", action="store_true", help="also save the merged model in DIR/merged")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse, apply `--demo` or the resumed run's settings as defaults, and check.

    Raises:
        UsageError: options that contradict each other, or a resumed run's settings.
    """
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO)
        args = parser.parse_args(argv)
    if args.resume:
        saved = _saved_settings(Path(args.output))
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for name in FIXED:
            if name in saved and getattr(args, name) != saved[name]:
                option = "--" + name.replace("_", "-")
                raise UsageError(
                    f"{option}: got {getattr(args, name)}, but the run in {args.output} was "
                    f"started with {saved[name]}"
                )
    _check(args)
    return args


def _check(args: argparse.Namespace) -> None:
    if args.demo and args.data:
        raise UsageError("--data: --demo brings its own data; leave one of them out")
    if not args.demo and not args.data:
        raise UsageError("--data: give a .jsonl or text file (or --demo)")
    if args.max_length is not None and args.max_length < 2:
        raise UsageError(f"--max-length: got {args.max_length}, expected at least 2")
    size = args.block_size
    if args.quantize != "none" and (size & (size - 1) or not 32 <= size <= 4096):
        raise UsageError(f"--block-size: got {size}, expected a power of two from 32 to 4096")
    if args.resume and args.overwrite and not args.demo:
        raise UsageError("--overwrite: contradicts --resume")


def _saved_settings(output: Path) -> dict[str, Any]:
    from lora_kernels.cli.finetune.rundir import RunDir

    run = RunDir(output).read_run()
    if run is None:
        raise UsageError(f"--resume: {str(output)!r} holds no run to continue")
    return run["settings"]


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options that a run's folder keeps: all but those that may differ when it is resumed."""
    leave_out = {"output", "overwrite", "resume", "threads"}
    return {k: v for k, v in sorted(vars(args).items()) if k not in leave_out}


def max_length(args: argparse.Namespace, limit: int | None) -> int:
    """`--max-length`, or its default, for a model that takes `limit` tokens.

    Raises:
        UsageError: more was asked for than the model takes.
    """
    if args.max_length is None:
        return min(MAX_LENGTH, limit or MAX_LENGTH)
    if limit is not None and args.max_length > limit:
        raise UsageError(
            f"--max-length: got {args.max_length}, expected at most {limit}, the model's "
            "max_position_embeddings"
        )
    return args.max_length


def target_modules(args: argparse.Namespace) -> str | list[str]:
    """`--target-modules` as `apply_lora` takes it. One name with regex characters is a regex."""
    names = args.target_modules
    if len(names) == 1 and (names[0] == "all-linear" or any(c in names[0] for c in "*+?()[]|\\^$")):
        return names[0]
    return names


def quantization(args: argparse.Namespace) -> dict[str, Any]:
    """The base weights' options as `apply_lora` and `load_adapter` take them."""
    if args.quantize == "none":
        return {"quantize": None}
    return {
        "quantize": args.quantize,
        "block_size": args.block_size,
        "double_quant": args.double_quant,
    }
