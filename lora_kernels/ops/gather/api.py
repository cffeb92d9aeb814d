"""y[t] = x[t]·Wᵀ + bias + Σ_e w[e]·c[i]·drop(x[t])·A[i]ᵀ·B[i]ᵀ over the entries e of token t, i the
slot of e: a batch whose tokens each use their own adapter, or several, or none.

Sources: Chen et al., 2023, "Punica"; Sheng et al., 2023, "S-LoRA"; here with a backward pass.

Backward, with dy = ∂L/∂y, s[e] = drop(x[t])·A[i]ᵀ and u[e] = dy[t]·B[i]:
    ds[e] = w[e]·c[i]·u[e]
    dx[t] = dy[t]·W + Σ_e drop'(ds[e]·A[i])      drop' is the forward's mask and factor again
    dA[i] = Σ_e ds[e]ᵀ·drop(x[t])                sums over the entries of slot i; exact zeros
    dB[i] = Σ_e w[e]·c[i]·dy[t]ᵀ·s[e]            where it has none
    dc[i] = Σ_e w[e]·u[e]·s[e],  dw[e] = c[i]·u[e]·s[e],  dbias = Σ_t dy[t]
Saved: x and s (and the parameters themselves).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.registry import direct, implementation
from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.base import check_input
from lora_kernels.ops.common.checks import check_shape
from lora_kernels.ops.common.flatten import autocast, from_rows, needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.gather.pages import FIELDS, RankPages
from lora_kernels.ops.gather.schema import GatherLoRAAdd, GatherLoRAForward, Needs
from lora_kernels.ops.nf4.weight import NF4Weight


class Mixture(NamedTuple):
    """Adapters by (token, slot, weight): token t adds weight · adapter for each of its entries.

    Attributes:
        tokens: int32 [E], rows of x (of its leading dimensions flattened), in any order.
        slots: int32 [E], −1 for none.
        weights: fp32 [E].

    Examples:
        >>> half = lk.functional.Mixture(
        ...     tokens=torch.tensor([0, 0], dtype=torch.int32),
        ...     slots=torch.tensor([0, 1], dtype=torch.int32),
        ...     weights=torch.tensor([0.5, 0.5]),
        ... )
        >>> a, b = [torch.randn(4, 64)] * 2, [torch.randn(32, 4)] * 2
        >>> pages = lk.functional.page_adapters(a, b, [1.0, 1.0])
        >>> y = lk.functional.gather_lora(torch.randn(3, 64), pages, half)
        >>> y.any(dim=1)  # only token 0 is named
        tensor([ True, False, False])
    """

    tokens: Tensor
    slots: Tensor
    weights: Tensor


class SlotDropout(NamedTuple):
    """Dropout of the adapters' input, with settings of its own for each slot.

    Attributes:
        seeds: int64 [S].
        thresholds: int32 [S], round(65536 p).
        rows: int32 [E], the row of its slot's mask that an entry takes; None: entries are
            counted slot by slot, so that an adapter drops as it would in a batch of its own.

    Examples:
        >>> dropout = lk.functional.SlotDropout(
        ...     seeds=torch.tensor([1, 2]),
        ...     thresholds=torch.tensor([0, 6554], dtype=torch.int32),  # p = 0 and 0.1
        ... )
        >>> a, b = [torch.randn(4, 64)] * 2, [torch.randn(32, 4)] * 2
        >>> pages = lk.functional.page_adapters(a, b, [1.0, 1.0])
        >>> slots = torch.tensor([0, 1, 1], dtype=torch.int32)
        >>> lk.functional.gather_lora(torch.randn(3, 64), pages, slots, dropout=dropout).shape
        torch.Size([3, 32])
    """

    seeds: Tensor
    thresholds: Tensor
    rows: Tensor | None = None


class _Counts(NamedTuple):
    """How many tensors of each kind an autograd function gets. It gets them one after the other."""

    base: int
    pages: int
    entries: int
    dropout: int

    def split(self, tensors: Sequence[Any]) -> Iterator[list[Any]]:
        at = 0
        for count in self:
            yield list(tensors[at : at + count])
            at += count


class GatherLoRAFunction(KeepsSettings):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, meta: list[int], counts: _Counts, *tensors: Tensor
    ) -> Tensor:
        base, pages, entries, dropout = counts.split(tensors)
        y, s = torch.ops.lora_kernels.gather_lora_fwd(x, base, meta, bias, pages, entries, dropout)
        ctx.save_for_backward(x, s, *tensors)
        ctx.meta, ctx.counts = meta, counts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, s, *tensors = ctx.saved_tensors
        base, pages, entries, dropout = ctx.counts.split(tensors)
        want_x, want_bias, _, _, *asked = ctx.needs_input_grad
        want_base, want_pages, want_entries, _ = ctx.counts.split(asked)
        needs = Needs(
            want_x,
            want_bias,
            len(entries) > 1 and want_entries[2],
            want_pages[0::FIELDS],
            want_pages[1::FIELDS],
            want_pages[4::FIELDS],
        )
        rows = to_rows(dy)
        dx, dbias, dweights, da, db, dscales = torch.ops.lora_kernels.gather_lora_bwd(
            rows, x, s, base, ctx.meta, pages, entries, dropout, needs.pack()
        )
        grads: list[Tensor | None] = [dx if want_x else None, dbias if want_bias else None]
        grads += [None, None, *(rows.T @ x if want else None for want in want_base)]
        for i in range(len(da)):
            grads += [
                da[i] if needs.a[i] else None,
                db[i] if needs.b[i] else None,
                None,
                None,
                dscales[i] if needs.scales[i] else None,
            ]
        grads += [None, None, dweights if needs.weights else None][: len(entries)]
        return (*grads, *(None for _ in dropout))


def gather_lora(
    x: Tensor,
    pages: RankPages | Sequence[RankPages],
    slots: Tensor | Mixture,
    *,
    base: Tensor | NF4Weight | None = None,
    bias: Tensor | None = None,
    dropout: SlotDropout | None = None,
    out: Tensor | None = None,
    add: bool = True,
) -> Tensor:
    """Each token's own adapter, over a base layer or alone.

    Differentiable in x, bias, the pages' a, b and scales and a mixture's weights; a slot that no
    token uses gets exact zeros. A token without adapter is what the base alone gives, bit for bit.

    Args:
        x: [..., K]; fp32, fp16, bf16 (fp64 on the reference).
        pages: the adapters of one projection, or of several that share x, as q/k/v do: their
            outputs lie side by side. Slots without an adapter at one of them have rank 0 there.
        slots: int32, the slot of each token, −1 for none: of x's leading dimensions, or of the
            first ones (one slot for each sequence of a batch); or a `Mixture`.
        base: W [N, K] in x's dtype or 4-bit, N over all projections; None: no base layer.
        bias: [N] in x's dtype.
        dropout: of the adapters' input.
        out: [..., N] of any strides whose last is 1: the adapters' part is added to it, or written
            over it where not `add`, in place and outside autograd; then no base, bias or dropout.

    Returns:
        [..., N] in x's dtype; `out` where given.

    Raises:
        ValueError: a shape, a device, a slot or a token does not fit (the last two on the CPU;
            on a GPU they are not read, and a slot that does not exist counts as none).
        TypeError: a dtype does not fit.

    Examples:
        >>> a = [torch.randn(4, 64), torch.randn(16, 64)]  # ranks 4 and 16
        >>> b = [torch.randn(32, 4), torch.randn(32, 16)]
        >>> pages = lk.functional.page_adapters(a, b, scales=[2.0, 0.5])
        >>> x, weight = torch.randn(3, 64), torch.randn(32, 64)
        >>> slots = torch.tensor([1, -1, 0], dtype=torch.int32)  # token 1 has no adapter
        >>> y = lk.functional.gather_lora(x, pages, slots, base=weight)
        >>> y.shape
        torch.Size([3, 32])
    """
    try:
        if isinstance(pages, RankPages):
            flat: list[Tensor] = list(pages)
            pages = [pages]
        else:
            flat = [t for p in pages for t in p]
        entries = _entries(x, slots)
        if out is not None:
            return _add(x, flat, entries, base, bias, dropout, out, overwrite=not add)
        if isinstance(base, Tensor):
            x, bias, base = autocast(x, bias, base)
        else:
            x, bias = autocast(x, bias)
        meta, tensors = [0, x.shape[-1] if x.dim() else 0], []
        if base is None:
            for p in pages:
                meta[0] += p.b.shape[-1]
        elif isinstance(base, NF4Weight):
            meta, tensors = list(base.meta), list(base.check().base)
        else:
            if base.dim() != 2:
                check_shape("base", base, ["N", "K"])
            meta, tensors = list(base.shape), [base]
        drops = [] if dropout is None else _dropout(dropout, entries[0])
        if x.dim() == 0:
            check_input(x, meta[1])
        call = GatherLoRAForward(to_rows(x), tensors, meta, bias, flat, entries, drops)
        given = [*tensors, *flat, *entries, *drops]
        if needs_grad(x, bias, *given):
            call.check(x)
            counts = _Counts(len(tensors), len(flat), len(entries), len(drops))
            y = GatherLoRAFunction.apply(call.x, bias, meta, counts, *given)
        else:
            y = _forward(x, call)
        return from_rows(y, x)
    except Exception:
        check_kinds(gather_lora, locals())
        raise


def _forward(x: Tensor, call: GatherLoRAForward) -> Tensor:
    """y outside autograd. The native kernels check every argument themselves."""
    forward = direct("gather_lora_fwd", call)
    if forward is None:
        call.check(x)
        return torch.ops.lora_kernels.gather_lora_fwd(*call)[0]
    try:
        if len(call.base) != 1 or call.dropout:
            return forward(call)[0]
        # A dense base is torch's own product, and needs no s.
        y = torch.nn.functional.linear(call.x, call.base[0], call.bias)
        add = implementation("gather_lora_add", "native")
        add(GatherLoRAAdd(y, call.x, call.pages, call.entries, False))
        return y
    except Exception:
        call.check(x)  # says more
        raise


def _entries(x: Tensor, slots: Tensor | Mixture) -> list[Tensor]:
    if isinstance(slots, tuple):
        tokens, slots, weights = slots
        return [slots, tokens, weights]
    lead = x.shape[:-1]
    if slots.shape != lead[: slots.dim()]:
        raise ValueError(
            f"slots: got shape {list(slots.shape)}, expected {list(lead)} as x has, or the first "
            "of these"
        )
    if slots.dim() < len(lead):
        slots = slots.reshape(*slots.shape, *[1] * (len(lead) - slots.dim())).expand(lead)
    return [slots.reshape(-1)]


def _dropout(dropout: SlotDropout, slots: Tensor) -> list[Tensor]:
    rows = dropout.rows
    return [dropout.seeds, dropout.thresholds, rows_of_slots(slots) if rows is None else rows]


def rows_of_slots(slots: Tensor) -> Tensor:
    """How many entries of the same slot come before each: int32 [E]."""
    ordered, order = slots.sort(stable=True)
    first = torch.searchsorted(ordered, ordered)
    at = torch.arange(slots.shape[0], device=slots.device) - first
    return torch.empty_like(slots).scatter_(0, order, at.to(slots.dtype))


def _add(
    x: Tensor,
    pages: list[Tensor],
    entries: list[Tensor],
    base: object,
    bias: object,
    dropout: object,
    out: Tensor,
    overwrite: bool,
) -> Tensor:
    if base is not None or bias is not None or dropout is not None:
        for name, value in (("base", base), ("bias", bias), ("dropout", dropout)):
            if value is not None:
                raise ValueError(f"{name}: was given beside out, expected None")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: requires a gradient, expected a tensor outside autograd")
    if (x.dim() != 2 or out.dim() != 2) and out.shape[:-1] != x.shape[:-1]:
        _check_add(x, pages, entries, out)
    try:
        rows = out if out.dim() == 2 else out.view(-1, out.shape[-1])
        add = GatherLoRAAdd(rows, to_rows(x), pages, entries, overwrite)
        native = direct("gather_lora_add", add)
        if native is not None:
            native(add)
            return out
    except Exception:
        _check_add(x, pages, entries, out)  # says more
        raise
    _check_add(x, pages, entries, out)
    # Entering the block takes as long as a small layer's kernel where caches are cold.
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
        torch.ops.lora_kernels.gather_lora_add(*add)
    return out


def _check_add(x: Tensor, pages: list[Tensor], entries: list[Tensor], out: Tensor) -> None:
    """Raise ValueError that names the argument which does not fit."""
    if out.dim() == 0 or out.shape[:-1] != x.shape[:-1] or out.dtype != x.dtype:
        raise ValueError(
            f"out: got shape {list(out.shape)} {out.dtype}, expected {list(x.shape[:-1])} + [N] "
            f"{x.dtype} as x has"
        )
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out: has strides {list(out.stride())}, expected the last to be 1")
    meta = [out.shape[-1], x.shape[-1]]
    GatherLoRAForward(x, [], meta, None, pages, entries, []).check(x)
