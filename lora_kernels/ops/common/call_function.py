"""Autograd functions over calls: what an op takes is written in the class of its calls alone.

`torch.autograd.Function` takes tensors, not lists of them, so a call's fields are handed over one
after the other, a list of tensors entry by entry. Gradients, and which are asked for, come back in
the shape of the call.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from lora_kernels.dispatch.settings import KeepsSettings

_LISTS = (Sequence[Tensor], Sequence[Tensor | None])


class CallFunction(KeepsSettings):
    """Base of the autograd functions whose arguments are a call's.

    Attributes:
        kind: the class of the calls.
    """

    kind: ClassVar[type[Any]]
    _lists: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hints = typing.get_type_hints(cls.kind)
        cls._lists = tuple(i for i, f in enumerate(cls.kind._fields) if hints[f] in _LISTS)

    @classmethod
    def run(cls, call: Any) -> Any:
        """`apply` of a call: what `forward(ctx, counts, *values)` returns."""
        counts = tuple(len(call[i]) for i in cls._lists)
        return cls.apply(counts, *cls.spread(call))

    @classmethod
    def spread(cls, call: Any) -> list[Any]:
        """The fields of a call, or of what has its shape, lists of tensors entry by entry."""
        values: list[Any] = []
        at = 0
        for i in cls._lists:
            values += call[at:i]
            values += call[i]
            at = i + 1
        values += call[at:]
        return values

    @classmethod
    def gathered(cls, counts: Sequence[int], values: Sequence[Any]) -> Any:
        """What `spread` spread."""
        fields: list[Any] = []
        at = 0
        for i, count in zip(cls._lists, counts, strict=True):
            start = at + i - len(fields)
            fields += values[at:start]
            fields.append(list(values[start : start + count]))
            at = start + count
        fields += values[at:]
        return cls.kind(*fields)

    @classmethod
    def keep(cls, ctx: Any, counts: Sequence[int], call: Any, *made: Tensor) -> None:
        """Keep a call for the backward, and tensors that the forward made."""
        values = cls.spread(call)
        ctx.save_for_backward(*made, *(v if isinstance(v, Tensor) else None for v in values))
        ctx.counts, ctx.made = counts, len(made)
        ctx.rest = [None if isinstance(v, Tensor) else v for v in values]

    @classmethod
    def kept(cls, ctx: Any) -> tuple[Any, list[Tensor]]:
        """What `keep` kept: the call, and the tensors that the forward made."""
        saved = ctx.saved_tensors  # once: checkpointing and offloading unpack at each read
        made, tensors = list(saved[: ctx.made]), saved[ctx.made :]
        values = [r if t is None else t for t, r in zip(tensors, ctx.rest, strict=True)]
        return cls.gathered(ctx.counts, values), made

    @classmethod
    def asked(cls, ctx: Any) -> Any:
        """Which gradients are asked for, in the shape of the call."""
        return cls.gathered(ctx.counts, ctx.needs_input_grad[1:])

    @classmethod
    def grads(cls, **grads: Any) -> tuple[Any, ...]:
        """What `backward` returns, of the gradients by field; one for every entry of a list."""
        nothing = cls.kind(*[None] * len(cls.kind._fields))
        return (None, *cls.spread(nothing._replace(**grads)))
