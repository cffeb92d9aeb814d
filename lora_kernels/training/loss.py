"""The loss of each adapter, over its own tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lora_kernels.training.batch import IGNORE, Batch

Loss = Callable[[Tensor, Tensor], Tensor]


def causal_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, as in transformers' causal models.

    Args:
        logits: [B, L, V]; computed in fp32 or, for fp64, in fp64.
        labels: int64 [B, L], −100 for none.
    """
    wide = logits if logits.dtype.itemsize > 4 else logits.float()
    return F.cross_entropy(wide[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def losses_of(output: Any, batch: Batch, loss: Loss) -> dict[int, Tensor]:
    """The loss of each slot in the batch, over its own rows and columns."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != batch.labels.shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
        raise ValueError(
            f"model: gives {got}, expected logits [{', '.join(map(str, batch.labels.shape))}, V]"
        )
    return {
        slot: loss(logits[rows, :length], batch.labels[rows, :length])
        for slot, (rows, length) in batch.rows.items()
    }
