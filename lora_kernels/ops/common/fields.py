"""A call's fields as an autograd function takes them, so that an op's arguments are written only
once, in the class of its calls.

`torch.autograd.Function` takes tensors, not lists of them, so a call's fields are passed one after
the other, and a list of tensors entry by entry. The gradients, and which of them are needed, have
the shape of the call:

    FIELDS = Fields(LoRALinearForward)
    LoRALinearFunction.apply(FIELDS.counts(call), *FIELDS.spread(call))
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

C = TypeVar("C")
_LISTS = (Sequence[Tensor], Sequence[Tensor | None])


def _among(t: Tensor, others: Sequence[Tensor | None]) -> bool:
    return any(t is other for other in others)


class Fields(Generic[C]):
    """The fields of a class of calls.

    Args:
        kind: a NamedTuple.
    """

    def __init__(self, kind: type[C]) -> None:
        named_tuple: Any = kind
        self._kind = named_tuple
        names: tuple[str, ...] = named_tuple._fields
        hints = typing.get_type_hints(kind)
        self._lists = tuple(i for i, name in enumerate(names) if hints[name] in _LISTS)
        self._nothing = named_tuple(*[None] * len(names))
        for i in self._lists:
            self._nothing = self._nothing._replace(**{names[i]: []})

    def counts(self, call: Any) -> tuple[int, ...]:
        """How many tensors each list of a call has."""
        return tuple(len(call[i]) for i in self._lists)

    def spread(self, call: Any) -> list[Any]:
        """The fields of a call, or of values in the same shape, with lists of tensors entry by
        entry."""
        values: list[Any] = []
        at = 0
        for i in self._lists:
            values += call[at:i]
            values += call[i]
            at = i + 1
        values += call[at:]
        return values

    def gathered(self, counts: Sequence[int], values: Sequence[Any]) -> C:
        """The inverse of `spread`."""
        fields: list[Any] = []
        at = 0
        for i, count in zip(self._lists, counts, strict=True):
            start = at + i - len(fields)
            fields += values[at:start]
            fields.append(list(values[start : start + count]))
            at = start + count
        fields += values[at:]
        return self._kind(*fields)

    def keep(
        self,
        ctx: Any,
        counts: Sequence[int],
        values: Sequence[Any],
        *made: Tensor,
        without: Sequence[Tensor | None] = (),
    ) -> None:
        """Save a call (its values were spread) for the backward, without what the backward does not
        read. `made` are tensors that the forward made and the backward reads."""
        tensors = [v if isinstance(v, Tensor) and not _among(v, without) else None for v in values]
        ctx.save_for_backward(*made, *tensors)
        ctx.counts, ctx.made = counts, len(made)
        ctx.rest = [None if isinstance(v, Tensor) else v for v in values]

    def kept(self, ctx: Any) -> tuple[C, list[Tensor]]:
        """What `keep` saved: the call, and the tensors that the forward made."""
        saved = ctx.saved_tensors  # once: checkpointing and offloading unpack at each read
        made, tensors = list(saved[: ctx.made]), saved[ctx.made :]
        values = [r if t is None else t for t, r in zip(tensors, ctx.rest, strict=True)]
        return self.gathered(ctx.counts, values), made

    def asked(self, ctx: Any) -> Any:
        """Which gradients are needed, in the shape of the call."""
        return self.gathered(ctx.counts, ctx.needs_input_grad[1:])

    def grads(self, **grads: Any) -> tuple[Any, ...]:
        """What `backward` returns, made from the gradients by field. A list has one gradient for
        each of its entries."""
        return (None, *self.spread(self._nothing._replace(**grads)))
