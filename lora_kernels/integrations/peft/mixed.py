"""Batches whose rows each use their own adapter: PEFT's `adapter_names`, in one pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import functional
from lora_kernels.integrations.peft.state import Base, Branch, read_branch, widened
from lora_kernels.ops.common.philox import threshold
from lora_kernels.ops.lora.short import infer_linear

NO_ADAPTER = "__base__"


@functools.lru_cache(maxsize=256)
def _slots(names: tuple[str, ...], order: tuple[str, ...], device: torch.device) -> Tensor:
    """int32 [B], the place of each row's adapter in `order`; −1 for none here."""
    places = {name: i for i, name in enumerate(order)}
    return torch.tensor([places.get(n, -1) for n in names], dtype=torch.int32, device=device)


class RowNames(list):
    """The `adapter_names` of one call of PEFT's `generate` or `forward`, and what the layers have
    made of them, kept for that call: the model runs once for each token, with the same adapters."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self.kept: dict[Any, tuple[list[Any], _Plan]] = {}


class _Plan(NamedTuple):
    """The adapters of a batch's rows at one layer.

    Attributes:
        order: the adapters of the slots.
        factors: A and B of each.
    """

    order: tuple[str, ...]
    factors: list[Tensor]
    pages: functional.RankPages
    slots: Tensor
    dropout: functional.SlotDropout | None


# Where no row has an adapter.
_NOBODY: Any = _Plan((), [], *[None] * 3)  # type: ignore[arg-type]


def mixed_forward(layer: Any, x: Tensor, base: Base, names: Sequence[str]) -> Tensor | None:
    """y of a batch, row i with the adapter names[i]; None if PEFT has to compute it."""
    if x.dim() < 2:
        return None
    if isinstance(names, RowNames) and not (layer.training or torch.is_grad_enabled()):
        plan = _kept_plan(layer, names, x)
    else:
        plan = _plan(layer, names, x)
    if plan is None:
        return None
    if not plan.order:
        return layer.without_adapters(x)
    wide, bias = widened(x, base)
    weight = base.weight
    if isinstance(weight, Tensor) and plan.dropout is None and not torch.is_grad_enabled():
        y = infer_linear(wide, weight, bias)
        if y is not None:
            return functional.gather_lora(wide, plan.pages, plan.slots, out=y)
    y = functional.gather_lora(
        *(wide, plan.pages, plan.slots), base=weight, bias=bias, dropout=plan.dropout
    )
    return y if isinstance(weight, Tensor) else y.to(x.dtype)


def _kept_plan(layer: Any, names: RowNames, x: Tensor) -> _Plan | None:
    """The plan of an earlier token of the same call, unless an adapter has changed since."""
    kept = names.kept.get(layer)
    if kept is not None and kept[0] == _state(layer, kept[1].order):
        return kept[1]
    plan = _plan(layer, names, x)
    if plan is not None and plan.order and not any(t.is_inference() for t in plan.factors):
        names.kept[layer] = _state(layer, plan.order), plan
    return plan


def _state(layer: Any, order: tuple[str, ...]) -> list[Any]:
    """What differs once an adapter is loaded, deleted, trained or scaled."""
    modules, scaling = layer._modules, layer.scaling
    found: list[Any] = []
    all_a, all_b = modules["lora_A"]._modules, modules["lora_B"]._modules
    for name in order:
        if name not in all_a:
            return []
        a, b = all_a[name]._parameters["weight"], all_b[name]._parameters["weight"]
        # By their ids, as == of tensors compares values; a plan keeps what it was made of alive.
        found += (id(a), a.data_ptr(), a._version, id(b), b.data_ptr(), b._version, scaling[name])
    return found


def _plan(layer: Any, names: Sequence[str], x: Tensor) -> _Plan | None:
    here = layer._modules["lora_A"]._modules
    order = tuple(n for n in dict.fromkeys(names) if n in here and n != NO_ADAPTER)
    if not order:
        return _NOBODY
    branches = []
    for name in order:
        branch = read_branch(layer, name)
        if isinstance(branch, str) or branch.bias is not None or branch.magnitude is not None:
            return None
        branches.append(branch)
    slots = _slots(tuple(names), order, x.device)
    same = len({b.a.dtype for b in branches}) == 1
    dtype = branches[0].a.dtype if same else torch.float32
    pages = functional.page_adapters(
        [b.a.to(dtype) for b in branches],
        [(b.b if b.diag is None else b.b * b.diag).to(dtype) for b in branches],
        [b.scale for b in branches],
    )
    factors = [t for b in branches for t in (b.a, b.b)]
    return _Plan(order, factors, pages, slots, _dropout(branches, x.device))


def _dropout(branches: Sequence[Branch], device: torch.device) -> functional.SlotDropout | None:
    if not any(b.p for b in branches):
        return None
    count = len(branches)
    return functional.SlotDropout(
        torch.randint(0, 2**63 - 1, (count,), dtype=torch.int64, device=device),
        torch.tensor([threshold(b.p) for b in branches], dtype=torch.int32, device=device),
    )
