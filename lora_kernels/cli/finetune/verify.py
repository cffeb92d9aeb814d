"""Checking a saved adapter: a fresh model with it has to give the trained model's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits [B, L, V] of a padded batch, in evaluation mode, on the CPU."""
    training = model.training
    model.eval()
    out = model(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
    ).logits
    model.train(training)
    return out.cpu()


def compare(trained: Tensor, reloaded: Tensor) -> dict[str, Any]:
    """(whether the logits are equal to the bit, the largest difference)."""
    return {
        "equal": torch.equal(trained, reloaded),
        "max_difference": (trained.float() - reloaded.float()).abs().max().item(),
    }
