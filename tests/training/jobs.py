"""Adapters that differ in all that may differ, and each of them trained alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_kernels import LoRAConfig, apply_lora
from lora_kernels.adapters import adapter_layers
from lora_kernels.training import AdapterJob
from tests.adapters.models import VOCABULARY, llama


def batches(
    seed: int, *, count: int = 4, rows: int = 2, length: int = 7, left: int = 0, right: int = 0
) -> list[dict[str, Tensor]]:
    """Random tokens; row 0 has padding of its own on the left or on the right."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(0, VOCABULARY, (rows, length), generator=g)
        mask = torch.ones_like(ids)
        mask[0, :left] = 0
        mask[0, length - right :] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[-1, 1:3] = -100  # a prompt
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def jobs(dropout: bool) -> dict[str, AdapterJob]:
    """Eight: other ranks, scales, layers, data, lengths, padding, steps and schedules each."""
    p = (lambda value: value) if dropout else (lambda value: 0.0)

    def config(r: int, alpha: float, dropout: float, **options: Any) -> LoRAConfig:
        return LoRAConfig(r=r, alpha=alpha, dropout=dropout, **options)

    return {
        "one": AdapterJob(config(1, 2, p(0.1)), batches(1), lr=1e-3, seed=1),
        "left": AdapterJob(
            config(3, 6, p(0.5), target_modules=("q_proj", "v_proj")),
            batches(2, length=11, left=4),
            lr=2e-3,
            seed=2,
            schedule="linear",
        ),
        "right": AdapterJob(
            config(8, 4, 0.0, use_rslora=True),
            batches(3, rows=1, right=2, count=2),
            steps=5,
            seed=3,
            schedule="cosine",
            warmup=2,
        ),
        "gaussian": AdapterJob(
            config(12, 24, p(0.05), init="gaussian"), batches(4, rows=3), seed=4, weight_decay=0.1
        ),
        "short": AdapterJob(config(16, 16, p(0.1)), batches(5, count=1), seed=5),
        "patterns": AdapterJob(
            config(24, 12, p(0.25), rank_pattern={"down_proj": 2}, alpha_pattern={"up_proj": 30}),
            batches(6, length=4),
            seed=6,
            max_grad_norm=0.1,
        ),
        "wide": AdapterJob(
            config(40, 40, p(0.1), target_modules=r".*layers\.1\..*(gate|o)_proj"),
            batches(7, length=9),
            seed=7,
            max_grad_norm=None,
        ),
        "same seed": AdapterJob(config(5, 5, p(0.1)), batches(8, right=1), seed=1),
    }


def alone(
    job: AdapterJob, dtype: torch.dtype, quantize: str | None
) -> tuple[list[float], dict[str, Tensor]]:
    """(losses, weights) of the adapter trained by itself with `apply_lora` and torch's own means.

    The values at first are fp32's whatever the dtype.
    """
    model = llama()
    torch.manual_seed(job.seed)
    config = job.config
    apply_lora(
        model,
        config.r,
        config.alpha,
        config.dropout,
        config.target_modules,
        quantize,
        config.use_rslora,
        config.rank_pattern,
        config.alpha_pattern,
        init=config.init,
    )
    model.to(dtype).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = job.optimizer(parameters) if job.optimizer else adamw(job, parameters)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, job.factor)
    data = list(job.batches)
    losses = []
    for step in range(job.steps or len(data)):
        batch = data[step % len(data)]
        # Not the model's own loss, which is in fp32 always.
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if job.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, job.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses, weights(adapter_layers(model))


def adamw(job: AdapterJob, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=job.lr, weight_decay=job.weight_decay)


def weights(layers: Iterable[tuple[str, Any]]) -> dict[str, Tensor]:
    return {
        f"{name}.{factor}": getattr(layer, f"lora_{factor}").detach().clone()
        for name, layer in layers
        for factor in "AB"
    }
