"""transformers' Trainer with the changes that the command needs."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from lora_kernels.cli.errors import UsageError, one_line
from lora_kernels.cli.finetune import finite
from lora_kernels.cli.finetune.collate import LengthGroupedSampler
from lora_kernels.cli.finetune.data import IGNORE
from lora_kernels.cli.finetune.rundir import RunDir
from lora_kernels.cli.finetune.verify import logits_of
from lora_kernels.training.huggingface import AdapterCheckpoints


class FinetuneTrainer(AdapterCheckpoints, Trainer):
    """The command's Trainer. Checkpoints are renamed into place, and non-finite numbers stop it.

    Args:
        run: the run's folder; `args.output_dir` must be its root.
        loraplus_ratio: learning rate of the B factors over that of the A factors (LoRA+: Hayou et
            al., 2024).
        keep: how many checkpoints are kept.
    """

    def __init__(self, *, run: RunDir, loraplus_ratio: float, keep: int, **kwargs: Any) -> None:
        self.run_dir = run
        self.loraplus_ratio = loraplus_ratio
        self.keep = keep
        self._staging: str | None = None
        self.optimizer: Any = None
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of `args.optim`, with one parameter group per learning rate."""
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(
                model, self.args.learning_rate, self.loraplus_ratio, self.args.weight_decay
            )
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch. Raises NonFinite before the optimiser uses such a gradient."""
        loss = super().training_step(model, *args, **kwargs)
        finite.check_step(model, float(loss), self.state.global_step)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Compute the metrics; raises NonFinite before a checkpoint of bad weights is written."""
        metrics = super().evaluate(*args, **kwargs)
        finite.check_held_out(metrics.get("eval_token_loss", 0.0), self.state.global_step)
        return metrics

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        data = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(example["input_ids"]) for example in data]
        # Of two steps in every process: the second has the optimiser's state in memory as well.
        step = self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(lengths, self._train_batch_size, self.args.seed, 2 * step)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint under a temporary name and rename it when it is complete."""
        self.check_finite()  # before an older, good checkpoint is removed for it
        root = self.run_dir.root
        root.mkdir(parents=True, exist_ok=True)
        self._staging = tempfile.mkdtemp(prefix=".saving-", dir=root)
        try:
            super()._save_checkpoint(model, trial)
            for path in Path(self._staging).glob("checkpoint-*"):
                place = root / path.name
                if place.exists():
                    place.rename(Path(self._staging) / "replaced")
                os.replace(path, place)
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        for old in self.run_dir.checkpoints()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def check_finite(self) -> None:
        """Raise NonFinite unless the trained weights and the model's logits are finite."""
        finite.check_weights(self.model, self.state.global_step)
        finite.check_output(
            logits_of(self.model, self.data_collator(self.train_dataset[:1])),
            self.state.global_step,
        )

    def save_now(self) -> Path:
        """Save a checkpoint of the last finished step; returns its folder."""
        self._save_checkpoint(self.model, None)
        return self.run_dir.root / f"checkpoint-{self.state.global_step}"

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with readable(checkpoint):
            super()._load_rng_state(checkpoint)


@contextlib.contextmanager
def readable(checkpoint: str | None) -> Iterator[None]:
    """Turn errors of reading a checkpoint's files into one that says that it is damaged."""
    try:
        yield
    except Exception as error:
        raise UsageError(
            f"--resume: {checkpoint!r} is damaged ({one_line(error)}); name an older checkpoint"
        ) from error


def parameter_groups(
    model: nn.Module, lr: float, loraplus_ratio: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of trainable parameters: B factors at `ratio * lr`, all others at `lr`."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    b = [p for n, p in named if "lora_B" in n.split(".")]
    others = [p for n, p in named if "lora_B" not in n.split(".")]
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay, "name": "A"},
        {"params": b, "lr": lr * loraplus_ratio, "weight_decay": weight_decay, "name": "B"},
    ]
    return [group for group in groups if group["params"]]


def token_losses(logits: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of each label, so that evaluation need not keep logits. -100 without a label.

    Args:
        logits: [B, L, V], or a tuple that begins with it.
        labels: [B, L], or [B, L + 1] if the logits were trimmed (see `Collator`).

    Returns:
        fp32 [B, L].
    """
    if isinstance(logits, tuple):
        logits = logits[0]
    if labels.shape[1] == logits.shape[1] + 1:
        targets = labels[:, 1:]
    else:
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
    keep = targets != IGNORE
    losses = torch.full(targets.shape, float(IGNORE), device=logits.device)
    losses[keep] = nn.functional.cross_entropy(
        logits[keep].float(), targets[keep], reduction="none"
    )
    return losses


def mean_token_loss(prediction: Any) -> dict[str, float]:
    """The mean over all labelled tokens, independent of the batches."""
    losses = torch.as_tensor(prediction.predictions, dtype=torch.float64)
    return {"token_loss": losses[losses != IGNORE].mean().item()}


def training_arguments(args: Any, run: RunDir, evaluate: bool) -> TrainingArguments:
    """transformers' arguments for the command's options."""
    return TrainingArguments(
        output_dir=str(run.root),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        lr_scheduler_type=args.schedule,
        warmup_steps=args.warmup,
        max_grad_norm=args.max_grad_norm,
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps" if evaluate else "no",
        eval_steps=args.eval_steps,
        save_strategy="steps",
        save_steps=args.save_steps,
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        report_to="none",
        **_checkpointing(args.gradient_checkpointing),
    )


def _checkpointing(on: bool) -> dict[str, Any]:
    if not on:
        return {}
    # Its name differs between releases of transformers.
    names = TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing"
    name = name if name in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
