"""AdapterJob: the data and the hyperparameters of one adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_kernels.adapters import LoRAConfig

SCHEDULES = ("constant", "linear", "cosine")
MakeOptimizer = Callable[[list[Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class AdapterJob:
    """One adapter of a `MultiLoRATrainer`.

    Attributes:
        config: the adapter's options; DoRA is not supported.
        batches: one micro-batch for each step, as `Batch.join` takes them. If there are fewer than
            `steps`, they are iterated again, which an iterator does not allow.
        steps: how many; None for one pass over the batches.
        lr, weight_decay: of AdamW.
        schedule: of the learning rate: "constant", "linear" or "cosine" (down to 0 at the end).
        warmup: steps over which the learning rate rises from 0.
        max_grad_norm: the norm to which this adapter's gradient is clipped; 0 or None for never.
        seed: of A's initial values and of dropout. They are those of an adapter trained alone
            after `torch.manual_seed(seed)` and `apply_lora`.
        optimizer: makes an optimiser of the parameters, in place of AdamW with lr and weight_decay.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of its range.

    Examples:
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> batches = [{"input_ids": ids, "labels": ids}] * 2
        >>> job = lk.training.AdapterJob(lk.LoRAConfig(r=8), batches, lr=5e-4, schedule="cosine")
        >>> job.total
        2
    """

    config: LoRAConfig
    batches: Iterable[Mapping[str, Tensor]]
    steps: int | None = None
    lr: float = 2e-4
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    max_grad_norm: float | None = 1.0
    seed: int = 0
    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, LoRAConfig):
            raise TypeError(f"config: got {type(self.config).__name__}, expected LoRAConfig")
        if self.config.use_dora:
            raise ValueError("config.use_dora: got True, expected False: LoRA trains here only")
        if not isinstance(self.batches, Iterable):
            raise TypeError(f"batches: got {type(self.batches).__name__}, expected an iterable")
        if self.steps is not None:
            _whole("steps", self.steps, 1)
        _whole("warmup", self.warmup, 0)
        _whole("seed", self.seed, None)
        for name in ("lr", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if name == "max_grad_norm" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name}: got {value!r}, expected a number")
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: got {value}, expected a finite number of at least 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: got {self.schedule!r}, expected one of {', '.join(SCHEDULES)}"
            )
        if self.schedule != "constant" and self.total is None:
            raise ValueError(
                f"steps: got None with schedule {self.schedule!r} and batches without a length, "
                "expected a number"
            )
        if self.total == 0:
            raise ValueError("batches: got none, expected one or more")

    @property
    def total(self) -> int | None:
        """The number of steps; None if it is not known before the batches end."""
        if self.steps is not None:
            return self.steps
        return len(self.batches) if isinstance(self.batches, Sized) else None

    def make_optimizer(self, parameters: list[Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the adapter's parameters."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)

    def factor(self, step: int) -> float:
        """The factor of the learning rate at a step, counted from 0."""
        if step < self.warmup:
            return step / self.warmup
        if self.schedule == "constant":
            return 1.0
        assert self.total is not None
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.schedule == "linear":
            return max(0.0, 1.0 - done)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))


def _whole(name: str, value: Any, least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {value!r}, expected an int")
    if least is not None and value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
