"""y[t] = W[id_t] + c[i]·A[i][:, id_t]ᵀ·B[i]ᵀ with i the slot of token t: an embedding whose tokens
each use their own adapter, or none (PEFT's LoRA of an embedding, A [r, V] and B [D, r]).

Backward, with dy = ∂L/∂y, s[t] = A[i][:, id_t] and u[t] = dy[t]·B[i]:
    dA[i][:, v] = Σ_t c[i]·u[t]      over the tokens of slot i with id v
    dB[i] = Σ_t c[i]·dy[t]ᵀ·s[t],  dc[i] = Σ_t u[t]·s[t],  dW[v] = Σ_t dy[t] over id v
Saved: ids and slots (and the parameters themselves); s is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_kernels.dispatch.registry import run
from lora_kernels.dispatch.settings import KeepsSettings
from lora_kernels.ops.common.flatten import needs_grad, to_rows
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.gather.api import _entries
from lora_kernels.ops.gather.embedding_schema import GatherEmbedForward
from lora_kernels.ops.gather.pages import RankPages, page_adapters


class GatherLoRAEmbeddingFunction(KeepsSettings):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor | None, slots: Tensor, *pages: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids, slots, *pages)
        ctx.vocabulary = pages[0].shape[1]
        return torch.ops.lora_kernels.gather_lora_embed_fwd(ids, weight, list(pages), slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ids, slots, *pages = ctx.saved_tensors
        _, want_weight, _, want_a, want_b, _, _, want_scales = ctx.needs_input_grad
        needs = [want_a, want_b, want_scales]
        dy = to_rows(dy)
        da, db, dscales = torch.ops.lora_kernels.gather_lora_embed_bwd(dy, ids, pages, slots, needs)
        dweight = None
        if want_weight:
            dweight = torch.ops.aten.embedding_dense_backward(dy, ids, ctx.vocabulary, -1, False)
        return (
            None,
            dweight,
            None,
            da if want_a else None,
            db if want_b else None,
            None,
            None,
            dscales if want_scales else None,
        )


def gather_lora_embedding(
    ids: Tensor,
    pages: RankPages,
    slots: Tensor,
    *,
    weight: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Each token's own adapter on an embedding, over its weight or alone.

    Differentiable in weight and the pages' a, b and scales. A token without adapter is the
    weight's row, bit for bit.

    Args:
        ids: int64 or int32, of any shape.
        pages: a [P, V, 16], b [P, 16, D], as `page_embedding_adapters` makes them.
        slots: int32, the slot of each token, −1 for none: of ids' shape, or of its first
            dimensions (one slot for each sequence of a batch).
        weight: W [V, D]; None: no embedding beside.
        out: [..., D] contiguous: the adapters' part is added to it in place, outside autograd;
            then no weight.

    Returns:
        [..., D] in weight's dtype, else the pages'; `out` where given.

    Raises:
        ValueError: a shape, a device, a slot or an id does not fit (the last two on the CPU; on a
            GPU they are not read: such a slot counts as none, and such an id gives zeros).
        TypeError: a dtype does not fit.

    Examples:
        >>> embedding = torch.nn.Embedding(100, 32)
        >>> a, b = torch.randn(4, 100), torch.randn(32, 4)
        >>> pages = lk.functional.page_embedding_adapters([a], [b], scales=[2.0])
        >>> ids, slots = torch.tensor([7, 7]), torch.tensor([0, -1], dtype=torch.int32)
        >>> y = lk.functional.gather_lora_embedding(ids, pages, slots, weight=embedding.weight)
        >>> torch.equal(y[1], embedding.weight[7])  # no adapter: the row as it is
        True
    """
    try:
        [own] = _entries(ids.unsqueeze(-1), slots)
        flat, given = ids.reshape(-1), list(pages)
        call = GatherEmbedForward(flat, weight, given, own)
        call.check()
        if out is not None:
            return _add(ids, flat, given, own, weight, out)
        if needs_grad(weight, *given):
            y = GatherLoRAEmbeddingFunction.apply(flat, weight, own, *given)
        else:
            y = run("gather_lora_embed_fwd", call)
        return y.view(*ids.shape, y.shape[-1])
    except Exception:
        check_kinds(gather_lora_embedding, locals())
        raise


def _add(
    ids: Tensor,
    flat: Tensor,
    pages: list[Tensor],
    slots: Tensor,
    weight: Tensor | None,
    out: Tensor,
) -> Tensor:
    if weight is not None:
        raise ValueError("weight: was given beside out, expected None")
    expected = [*ids.shape, pages[1].shape[2]]
    if list(out.shape) != expected or out.device != ids.device or not out.is_contiguous():
        raise ValueError(
            f"out: got shape {list(out.shape)} on {out.device}, expected {expected} contiguous "
            f"on {ids.device}"
        )
    if not out.is_floating_point():
        raise TypeError(f"out: got dtype {out.dtype}, expected a floating-point one")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError("out: requires a gradient, expected a tensor outside autograd")
    with torch.no_grad():
        rows = out.view(-1, out.shape[-1])
        torch.ops.lora_kernels.gather_lora_embed_add(rows, flat, pages, slots)
    return out


def page_embedding_adapters(
    lora_a: Sequence[Tensor | None],
    lora_b: Sequence[Tensor | None],
    scales: Sequence[float] | Tensor,
) -> RankPages:
    """`page_adapters` of an embedding's adapters, A [r_i, V] and B [D, r_i].

    Examples:
        >>> a, b = torch.randn(4, 100), torch.randn(32, 4)  # a vocabulary of 100, 32 features
        >>> pages = lk.functional.page_embedding_adapters([a], [b], scales=[2.0])
        >>> pages.a.shape, pages.b.shape
        (torch.Size([1, 100, 16]), torch.Size([1, 16, 32]))
    """
    try:
        pages = page_adapters(lora_a, lora_b, scales)
        return pages._replace(a=pages.a.transpose(1, 2).contiguous())
    except Exception:
        check_kinds(page_embedding_adapters, locals())
        raise
