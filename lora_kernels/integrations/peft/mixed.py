"""Batches whose rows each use their own adapter: PEFT's `adapter_names`, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels import functional
from lora_kernels.integrations.peft.state import Base, Branch, read_branch, widened
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.nf4.weight import NF4Weight

NO_ADAPTER = "__base__"


@functools.lru_cache(maxsize=256)
def _slots(names: tuple[str, ...], order: tuple[str, ...], device: torch.device) -> Tensor:
    """int32 [B], the place of each row's adapter in `order`; −1 for none here."""
    places = {name: i for i, name in enumerate(order)}
    return torch.tensor([places.get(n, -1) for n in names], dtype=torch.int32, device=device)


def mixed_forward(layer: Any, x: Tensor, base: Base, names: Sequence[str]) -> Tensor | None:
    """y of a batch, row i with the adapter names[i]; None if PEFT has to compute it."""
    here = layer._modules["lora_A"]._modules
    order = tuple(n for n in dict.fromkeys(names) if n in here and n != NO_ADAPTER)
    if not order:
        return layer.without_adapters(x)
    if x.dim() < 2:
        return None
    branches = []
    for name in order:
        branch = read_branch(layer, name)
        if isinstance(branch, str) or branch.bias is not None or branch.magnitude is not None:
            return None
        branches.append(branch)
    wide, bias = widened(x, base)
    y = functional.gather_lora(
        wide,
        _pages(branches),
        _slots(tuple(names), order, x.device),
        base=base.weight,
        bias=bias,
        dropout=_dropout(branches, x.device),
    )
    return y.to(x.dtype) if isinstance(base.weight, NF4Weight) else y


def _pages(branches: Sequence[Branch]) -> functional.RankPages:
    same = len({b.a.dtype for b in branches}) == 1
    dtype = branches[0].a.dtype if same else torch.float32
    return functional.page_adapters(
        [b.a.to(dtype) for b in branches],
        [(b.b if b.diag is None else b.b * b.diag).to(dtype) for b in branches],
        [b.scale for b in branches],
    )


def _dropout(branches: Sequence[Branch], device: torch.device) -> functional.SlotDropout | None:
    if not any(b.p for b in branches):
        return None
    count = len(branches)
    return functional.SlotDropout(
        torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device),
        torch.tensor([threshold(b.p) for b in branches], dtype=torch.int32, device=device),
    )
