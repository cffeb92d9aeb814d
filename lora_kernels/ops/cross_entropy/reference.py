"""Cross-entropy in plain PyTorch: the oracle of every other backend.

Logits are rounded to x's dtype, as a linear layer's output is; the loss is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import Implementation, register
from lora_kernels.ops.cross_entropy.schema import loss_dtype


def cross_entropy(
    logits: Tensor, labels: Tensor, ignore_index: int, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """losses = log Σ exp(logits) - logits[label];  dlogits = softmax(logits) - one-hot(label)."""
    _check_labels(labels, logits.shape[1], ignore_index)
    kept = labels != ignore_index
    target = labels.where(kept, 0)[:, None]
    log_p = torch.log_softmax(logits.to(loss_dtype(logits.dtype)), dim=1)
    losses = -log_p.gather(1, target)[:, 0].where(kept, 0)
    if not need_grad:
        return losses, logits.new_empty(0)
    p = log_p.exp()
    p.scatter_add_(1, target, p.new_full((), -1).expand(target.shape))
    return losses, p.where(kept[:, None], 0).to(logits.dtype)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, needs: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of logits = x·Wᵀ, with dx = dlogits·W and dW = dlogitsᵀ·x."""
    losses, dlogits = cross_entropy(x @ weight.T, labels, ignore_index, any(needs))
    dx = dlogits @ weight if needs[0] else x.new_empty(0)
    dw = dlogits.T @ x if needs[1] else weight.new_empty(0)
    return losses, dx, dw


def _check_labels(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    if labels.device.type != "cpu":
        return  # reading them would wait for the device, whose own checks name a bad index
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if bad.any():
        at = int(bad.nonzero()[0])
        raise ValueError(
            f"labels: got {int(labels[at])} at index {at}, expected 0 to {vocabulary - 1} "
            f"or {ignore_index}"
        )


def _accepts(*args: object, **kwargs: object) -> str | None:
    return None


for _op in (cross_entropy, linear_cross_entropy):
    register(_op.__name__, Implementation("reference", _op, _accepts))
