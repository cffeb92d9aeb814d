"""MultiLoRALinear: a linear layer whose batch rows each use their own adapter."""

from __future__ import annotations

import re
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_kernels import functional
from lora_kernels.ops.gather import RankPages

_EXPERT = re.compile(r"experts?\.\d+\b")  # an expert of a mixture gets some of the tokens only


class Router(Protocol):
    """What tells a layer its adapters and which row uses which: a `serving.AdapterPool`."""

    def active_slots(self) -> Tensor | None:
        """int32, the slot of each row or token, −1 for none; None if no row has an adapter."""

    def active_tokens(self) -> tuple[int, int] | None:
        """(batch, tokens of each row) of the model's current input; None if it is not known."""

    def pages(self, module: str) -> RankPages:
        """The adapters' pages for a module."""


class MultiLoRALinear(nn.Module):
    """y = base(x) + scale·x·Aᵀ·Bᵀ, with A, B and scale of each row's own slot.

    The base is any linear layer (nn.Linear, NF4Linear, bitsandbytes' Linear4bit), and its own
    forward is called. Without active slots the layer computes what its base does. The result of a
    row without an adapter is the base's, bit for bit, whatever the other rows of the batch use.

    Slots [B] belong to the rows of x [B, ..., K] and hold for all tokens of a row. If a model
    folds batch and tokens into one dimension, x [B·T, K], slots [B] are expanded if the router
    knows T; otherwise they must be given for each token ([B, T] or [B·T]). A layer that selects or
    reorders tokens (an expert of a mixture) cannot tell which token belongs to which row, and
    takes no adapters this way.

    The state dict is the base's under `base.`; `serving.detach_pool` brings the base back.

    Args:
        base: the layer; it is not changed.
        router: gives the slots and the pages.
        name: the name under which the router knows the module.

    Examples:
        >>> pool = lk.serving.AdapterPool(model, slots=4, pages=4, target_modules=["q_proj"])
        >>> names = lk.serving.attach_pool(model, pool)
        >>> layer = model.model.layers[0].self_attn.q_proj
        >>> type(layer).__name__, type(layer.base).__name__
        ('MultiLoRALinear', 'Linear')
    """

    def __init__(self, base: nn.Module, router: Router, name: str) -> None:
        super().__init__()
        layer: Any = base
        pages = router.pages(name)
        got, expected = (layer.in_features, layer.out_features), _features(pages)
        if got != expected:
            raise ValueError(
                f"{name}: has in_features={got[0]}, out_features={got[1]}, the pool's pages are "
                f"for {expected[0]}, {expected[1]}"
            )
        self.base, self.router, self.name = base, router, name
        self.picks = self.picks_tokens(name)
        self.in_features, self.out_features = got
        self.train(base.training)

    @staticmethod
    def picks_tokens(name: str) -> bool:
        """Whether a module of this name is an expert of a mixture, which selects tokens."""
        return _EXPERT.search(name) is not None

    @property
    def weight(self) -> Any:
        """The base's."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base's."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to y [..., N]."""
        y = self.base(x)
        slots = self.router.active_slots()
        if slots is None:
            return y
        slots = fit_slots(self.name, slots, x, self.router, picks=self.picks)
        pages = self.router.pages(self.name)
        x = x.to(y.dtype)  # under autocast they differ
        inputs = (x, y, pages.a, pages.b, pages.scales)
        if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
            return y + functional.gather_lora(x, pages, slots)
        return functional.gather_lora(x, pages, slots, out=y.contiguous())

    def extra_repr(self) -> str:
        return f"name={self.name!r}"


def fit_slots(
    name: str, slots: Tensor, x: Tensor, router: Router | None = None, *, picks: bool = False
) -> Tensor:
    """The slots in a shape that matches x's leading dimensions, or the first of them.

    Args:
        name: the layer's, for the error.
        slots: of each row [B] or each token ([B, T] or [B·T]) of the model's input.
        x: the layer's input [..., K].
        router: knows (batch, tokens) of the model's input. Without one, slots [B, T] tell them.
        picks: the layer selects tokens; then x must have as many tokens as the model's input.

    Raises:
        ValueError: x has other tokens than the model's input, or has them in another order.
    """
    lead = x.shape[:-1]
    if slots.shape == lead[: slots.dim()] and not picks:
        return slots
    if router is None:
        tokens = (slots.shape[0], slots.shape[1]) if slots.dim() == 2 else None
    else:
        tokens = router.active_tokens()
    if tokens is None and not picks:
        if 1 in (slots.dim(), len(lead)) and slots.numel() == lead.numel():
            return slots.reshape(lead)
    elif tokens is not None and _all_tokens(lead, *tokens):
        batch, length = tokens
        if slots.shape == (batch,):
            return slots.unsqueeze(1).expand(batch, length).reshape(lead)
        if slots.numel() == batch * length:
            return slots.reshape(lead)
    raise ValueError(
        f"{name}: slots: got shape {list(slots.shape)}, expected {list(lead)} as x has, or the "
        "first of these; a layer that folds batch and tokens into one dimension needs the model's "
        "own call around it, or a slot for each token, and one that picks tokens takes no adapter"
    )


def _all_tokens(lead: torch.Size, batch: int, length: int) -> bool:
    """Whether leading dimensions hold all tokens of the input, row after row."""
    folded = [n for n in lead if n != 1]
    return folded in ([n for n in (batch, length) if n != 1], [batch * length])


def _features(pages: RankPages) -> tuple[int, int]:
    return pages.a.shape[2], pages.b.shape[2]
