"""transformers' Trainer with checkpoints that hold the adapters, not the base.

A plain Trainer writes the whole model. `from_pretrained` ignores the adapters' keys in it, so a
model loaded from there is the base without the adapters.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from lora_kernels.adapters import load_adapter, save_adapter
from lora_kernels.adapters.extras import find_extras
from lora_kernels.adapters.layers import require_adapters, unwrap
from lora_kernels.integrations.peft import CONFIG_FILE

_ARGUMENTS_FILE = "training_args.bin"


class AdapterCheckpoints:
    """A mixin that makes any Trainer save and load adapters. It goes before the Trainer's class:

    `class MyTrainer(AdapterCheckpoints, trl.SFTTrainer): ...`

    Checkpoints and `save_model` write what `save_adapter` does, beside the tokenizer, the
    optimiser and the rest of the Trainer's own files. `resume_from_checkpoint` and
    `load_best_model_at_end` read it. FSDP and DeepSpeed through the Trainer's arguments are not
    supported.

    Examples:
        >>> from transformers import TrainingArguments
        >>> report = lk.apply_lora(model, r=8)
        >>> args = TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True)
        >>> rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
        >>> from transformers import Trainer
        >>> class MyTrainer(lk.training.AdapterCheckpoints, Trainer):
        ...     pass
        >>> MyTrainer(model, args, train_dataset=rows).save_model("best")
        >>> lk.load_adapter(model, "best").missing_keys
        ()
    """

    model: Any
    args: Any
    state: Any
    processing_class: Any
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = unwrap(self.model)
        if hasattr(model, "peft_config"):
            raise ValueError(
                f"model: {type(model).__name__} has PEFT's adapters, which a plain Trainer saves"
            )
        require_adapters(model)
        for engine in ("fsdp", "deepspeed"):
            if getattr(self, f"is_{engine}_enabled", False):
                raise ValueError(f"args: asks for {engine}, which is not supported here")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's. ValueError before the first step if a parameter trains that could not
        be saved."""
        model = unwrap(self.model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # saving repeats the warning
            find_extras(model, getattr(model, "lora_config", None))
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save or _is_split(self.model):
            save_adapter(self.model, folder)
        if not self.args.should_save:
            return
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        torch.save(self.args, folder / _ARGUMENTS_FILE)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if not (Path(resume_from_checkpoint) / CONFIG_FILE).is_file():
            # A plain Trainer wrote the whole model's state.
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        load_adapter(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_adapter(self.model, self.state.best_model_checkpoint)


class AdapterTrainer(AdapterCheckpoints, Trainer):
    """`transformers.Trainer` for a model that `apply_lora` made; its arguments are the Trainer's.

    Raises:
        ValueError: the model has no adapters, or PEFT's.

    Examples:
        >>> from transformers import TrainingArguments
        >>> report = lk.apply_lora(model, r=8)
        >>> args = TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True)
        >>> rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
        >>> trainer = lk.training.AdapterTrainer(model, args, train_dataset=rows)
        >>> trainer.save_model("best")
        >>> lk.load_adapter(model, "best").missing_keys
        ()
    """


class AdapterCallback(TrainerCallback):
    """Writes the adapters into every checkpoint of any Trainer, beside what the Trainer writes.

    Use it for a Trainer whose class cannot be changed. Its checkpoints still hold the whole model,
    and it resumes from that; `load_adapter` and PEFT read the adapters from the same folder.

    Examples:
        >>> from transformers import TrainingArguments
        >>> report = lk.apply_lora(model, r=8)
        >>> args = TrainingArguments("out", max_steps=1, report_to=[], use_cpu=True)
        >>> rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
        >>> from transformers import Trainer
        >>> keep = lk.training.AdapterCallback()
        >>> trainer = Trainer(model, args, train_dataset=rows, callbacks=[keep])
    """

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if state.is_world_process_zero or _is_split(model):
            save_adapter(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _is_split(model: nn.Module) -> bool:
    """Whether `fully_shard` has split the model. All processes then have to call save_adapter."""
    return any(hasattr(p, "full_tensor") for p in model.parameters())
