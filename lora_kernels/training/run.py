"""AdapterRun: the state of one adapter's training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_kernels.nn.multi_lora_training import SlotAdapter
from lora_kernels.training.job import AdapterJob


class NonFinite(RuntimeError):
    """Training stopped for adapters whose loss or gradient became infinite or not a number.

    Attributes:
        adapters: what happened to each of them, by name.
        losses: the losses of the adapters that did take the step, by name.

    Examples:
        >>> error = lk.training.NonFinite({"french": "its loss is nan"}, {"german": 2.5})
        >>> error.adapters, error.losses
        ({'french': 'its loss is nan'}, {'german': 2.5})
    """

    def __init__(self, adapters: Mapping[str, str], losses: Mapping[str, float]) -> None:
        self.adapters, self.losses = dict(adapters), dict(losses)
        what = "; ".join(f"{name!r}: {why}" for name, why in adapters.items())
        super().__init__(
            f"training stopped for {what}. The step was not taken, no other adapter was touched, "
            "and `save` leaves what was saved of it before; start it again with a lower lr, a "
            "lower max_grad_norm or more warmup"
        )


Layers = list[tuple[str, SlotAdapter]]


class AdapterRun:
    """An adapter with its data, optimiser and generator. It shares none of them with another.

    Attributes:
        layers: (module's name, adapter at that module).
        parameters: A and B of each layer in turn.
        step: how many steps are done.
        losses: of each step that is done.
        finished: there is no step or batch left, or the adapter has failed.
        failed: what became infinite or not a number, and at which step; None if nothing did. A
            and B then have the values before that step.
    """

    def __init__(
        self, name: str, slot: int, job: AdapterJob, generator: torch.Generator, layers: Layers
    ) -> None:
        self.name, self.slot, self.job, self.generator = name, slot, job, generator
        self.layers = layers
        self.parameters: list[Parameter] = [
            p for _, layer in layers for p in (layer.lora_A, layer.lora_B)
        ]
        self.optimizer = job.make_optimizer(self.parameters)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, job.factor)
        self.step, self.finished = 0, False
        self.losses: list[float] = []
        self.failed: str | None = None
        self._batches: Iterator[Mapping[str, Tensor]] | None = None
        self._next: Mapping[str, Tensor] | None = None  # fetched, and not trained on yet

    def next_batch(self) -> Mapping[str, Tensor] | None:
        """The micro-batch of the next step. If there is none, the run is finished: None.

        Raises:
            ValueError: the batches ended before the steps did and cannot begin again.
        """
        if self._next is not None or self.finished:
            return self._next
        if self._batches is None:
            self._batches = iter(self.job.batches)
        found = next(self._batches, None)
        if found is None and self.job.steps is not None:
            self._batches = iter(self.job.batches)
            found = next(self._batches, None)
            if found is None:
                raise ValueError(
                    f"batches of {self.name!r}: ended after {self.step} steps, expected "
                    f"{self.job.steps} (an iterator cannot begin again)"
                )
        self._next, self.finished = found, found is None
        return found

    def update(self, loss: float) -> None:
        """Clip the gradients of the last backward, take the optimiser's step, and clear them.

        If the loss or a gradient is not finite, the adapter has failed and takes no step.
        """
        self.failed = self._why_not_finite(loss)
        if self.failed is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.finished, self._next = True, None
            return
        if self.job.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.job.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss)
        self._count_step()

    def _why_not_finite(self, loss: float) -> str | None:
        step = self.step + 1
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss}"
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
        return None if math.isfinite(norm) else f"the gradient norm of step {step} is {norm}"

    def _count_step(self) -> None:
        self._next = None
        self.step += 1
        self.finished = self.step == self.job.total

    def state(self) -> dict[str, Any]:
        """What resuming needs apart from A and B, which the adapter's files hold."""
        return {
            "step": self.step,
            "losses": list(self.losses),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Resume from `state()`, skipping the batches that were used."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.step, self.finished, self._batches, self._next = 0, False, None, None
        self.failed = None
        while self.step < state["step"] and self.next_batch() is not None:
            self._count_step()
        if self.step < state["step"]:
            raise ValueError(
                f"batches of {self.name!r}: ended after {self.step}, expected at least the "
                f"{state['step']} that the checkpoint has used"
            )
        self.losses = list(state["losses"])
