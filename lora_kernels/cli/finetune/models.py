"""Loading the base model and its tokenizer."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from lora_kernels.cli.errors import UsageError, one_line
from lora_kernels.cli.finetune.causal import check_whole, fix_padding
from lora_kernels.cli.finetune.source import Source


def load_tokenizer(source: Source, size: int | None) -> Any:
    """The tokenizer, with a padding token below `size`, the model's vocabulary.

    Raises:
        UsageError: transformers cannot load it; the message quotes it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name, **source.options())
    except Exception as error:  # each file format's reader raises other errors
        raise UsageError(
            f"--model: cannot load the tokenizer of {source}: {one_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"--model: the tokenizer of {source} has neither pad nor eos token")
        tokenizer.pad_token = tokenizer.eos_token
    fix_padding(tokenizer, size)
    return tokenizer


def load_model(source: Source, dtype: torch.dtype) -> Any:
    """The model as a plain dense one in `dtype`, on the CPU, in evaluation mode.

    Raises:
        UsageError: transformers cannot load it (the message quotes it), or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    options = source.options()
    if source.gguf:
        try:
            from transformers import GgufConfig
        except ImportError:
            pass  # releases without it always load a dense model
        else:
            options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        # No setting turns off the GGUF reader's progress bar.
        with contextlib.redirect_stderr(io.StringIO()):
            model, info = AutoModelForCausalLM.from_pretrained(
                source.name, dtype=dtype, output_loading_info=True, **options
            )
    except Exception as error:  # each file format's reader raises other errors
        raise UsageError(f"--model: cannot load {source}: {one_line(error)}") from error
    check_whole(info, source)
    # A model saved or merged later is a plain one, whatever file it came from.
    if hasattr(model.config, "quantization_config") and source.gguf:
        del model.config.quantization_config
    return model.eval()


def pick_dtype(name: str) -> torch.dtype:
    """The compute dtype: `auto` is bfloat16 if the hardware multiplies it, else float32."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if torch.cuda.is_available():
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float32
        )
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (AVX512-BF16, AMX or Arm BF16)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_arm_bf16_supported")
    if any(getattr(torch.cpu, name, lambda: False)() for name in checks):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    words = set(flags.split())
    return bool(words & {"avx512_bf16", "amx_bf16"}) or {"bf16", "asimd"} <= words


def quiet_transformers() -> None:
    """Turn off transformers' progress bars and notes; the command shows its own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
