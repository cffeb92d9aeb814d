"""MultiLoRAEmbedding: an embedding whose batch rows each use their own adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.nn.multi_lora import Router, fit_slots


class MultiLoRAEmbedding(nn.Module):
    """y = base(ids) + scale·A[:, ids]ᵀ·Bᵀ, with A, B and scale of each row's own slot.

    Slots, state dict and `serving.detach_pool` are as in `MultiLoRALinear`.

    Args:
        base: a plain nn.Embedding; it is not changed.
        router: gives the slots and the pages (a [P, V, 16]).
        name: the name under which the router knows the module.

    Examples:
        >>> pool = lk.serving.AdapterPool(model, slots=4, pages=4, target_modules=["embed_tokens"])
        >>> names = lk.serving.attach_pool(model, pool)
        >>> type(model.model.embed_tokens).__name__
        'MultiLoRAEmbedding'
    """

    def __init__(self, base: nn.Embedding, router: Router, name: str) -> None:
        super().__init__()
        check_embedding(name, base)
        pages = router.pages(name)
        got, expected = list(base.weight.shape), [pages.a.shape[1], pages.b.shape[2]]
        if got != expected:
            raise ValueError(f"{name}: has weight {got}, the pool's pages are for {expected}")
        self.base, self.router, self.name = base, router, name
        self.num_embeddings, self.embedding_dim = base.num_embeddings, base.embedding_dim
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The base's."""
        return self.base.weight

    @property
    def padding_idx(self) -> int | None:
        """The base's."""
        return self.base.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] to y [..., D]."""
        y = self.base(ids)
        slots = self.router.active_slots()
        if slots is None:
            return y
        slots = fit_slots(self.name, slots, ids.unsqueeze(-1), self.router)
        pages = self.router.pages(self.name)
        if torch.is_grad_enabled() and any(t.requires_grad for t in (y, pages.a, pages.b)):
            return y + functional.gather_lora_embedding(ids, pages, slots).to(y.dtype)
        return functional.gather_lora_embedding(ids, pages, slots, out=y.contiguous())

    def extra_repr(self) -> str:
        return f"name={self.name!r}"


def check_embedding(name: str, layer: nn.Module) -> None:
    """Raise TypeError unless a layer only looks up rows of its weight."""
    kind = type(layer).__name__
    if not isinstance(layer, nn.Embedding) or type(layer).forward is not nn.Embedding.forward:
        raise TypeError(
            f"{name}: got {kind}, expected torch.nn.Embedding with no forward of its own"
        )
    if layer.max_norm is not None:
        raise TypeError(f"{name}: has max_norm={layer.max_norm}, expected None")
