"""Cross-entropy in plain PyTorch: the oracle of every other backend.

Logits are rounded to x's dtype, as a linear layer's output is; the loss is computed in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_kernels.dispatch.registry import register_reference
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.cross_entropy.schema import CrossEntropy, LinearCrossEntropy, loss_dtype


@register_reference
def cross_entropy(c: CrossEntropy) -> tuple[Tensor, Tensor]:
    """losses = log Σ exp(logits) - logits[label];  dlogits = softmax(logits) - one-hot(label)."""
    logits, labels = c.logits, c.labels
    _check_labels(labels, logits.shape[1], c.ignore_index)
    kept = labels != c.ignore_index
    target = labels.where(kept, 0)[:, None]
    log_p = torch.log_softmax(logits.to(loss_dtype(logits.dtype)), dim=1)
    losses = -log_p.gather(1, target)[:, 0].where(kept, 0)
    if not c.need_grad:
        return losses, logits.new_empty(0)
    p = log_p.exp()
    p.scatter_add_(1, target, p.new_full((), -1).expand(target.shape))
    return losses, p.where(kept[:, None], 0).to(logits.dtype)


@register_reference
def linear_cross_entropy(c: LinearCrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    """The same of logits = x·Wᵀ, with dx = dlogits·W and dW = dlogitsᵀ·x."""
    x, weight, needs = c.x, c.weight, c.needs
    alone = CrossEntropy(x @ weight.T, c.labels, c.ignore_index, any(needs))
    losses, dlogits = cross_entropy(alone)
    dx = dlogits @ weight if needs[0] else x.new_empty(0)
    wide = rank_dtype(weight.dtype)
    dw = dlogits.T.to(wide) @ x.to(wide) if needs[1] else weight.new_empty(0, dtype=wide)
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
