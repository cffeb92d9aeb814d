"""Stopping when a number is not finite: no later step can repair the weights."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_kernels.cli.errors import Failed

TRY = "a lower --lr, a lower --max-grad-norm, more --warmup, or --dtype float32"


class NonFinite(Failed):
    """A loss, a gradient norm or a weight became infinite or not a number.

    Attributes:
        what: the quantity, with its value.
        last_good: the last step whose weights are known to be good.
    """

    def __init__(self, what: str, last_good: int) -> None:
        super().__init__(what)
        self.what, self.last_good = what, last_good


def gradient_norm(model: nn.Module) -> float:
    """The norm of all gradients of the model; 0 if it has none."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0


def check_step(model: nn.Module, loss: float, finished: int) -> None:
    """Raise NonFinite unless the loss and the gradients of the step after `finished` are finite."""
    step = finished + 1
    if not math.isfinite(loss):
        # The loss was computed with these weights, so the step that made them may have gone wrong.
        raise NonFinite(f"the training loss of step {step} is {loss}", finished - 1)
    norm = gradient_norm(model)
    if not math.isfinite(norm):
        raise NonFinite(f"the gradient norm of step {step} is {norm}", finished)


def check_weights(model: nn.Module, step: int) -> None:
    """Raise NonFinite unless every trainable parameter is finite after `step`."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NonFinite(f"{name} holds non-finite values after step {step}", step - 1)


def check_output(logits: Tensor, step: int) -> None:
    """Raise NonFinite unless the model's logits after `step` are finite."""
    if not bool(torch.isfinite(logits).all()):
        raise NonFinite(f"the model's output after step {step} is not finite", step - 1)


def check_held_out(loss: float, step: int) -> None:
    """Raise NonFinite unless the held-out loss after `step` is finite."""
    if not math.isfinite(loss):
        raise NonFinite(f"the held-out loss after step {step} is {loss}", step - 1)


def explain(error: NonFinite, checkpoints: list[Path], output: Path) -> Failed:
    """The message for the user: what happened, what is left, what to try."""
    good = [p for p in checkpoints if int(p.name.rpartition("-")[2]) <= error.last_good]
    kept = (
        f"The last good adapter is in {good[-1]}."
        if good
        else "No good checkpoint had been saved yet (--save-steps)."
    )
    return Failed(
        f"training stopped: {error.what}. No adapter was written to {output}. {kept} "
        f"Start again with {TRY}."
    )
