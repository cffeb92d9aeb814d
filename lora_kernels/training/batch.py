"""Batch: the micro-batches of several adapters, joined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lora_kernels.ops.common.checks import names as dtype_names

IGNORE = -100
KEYS = ("input_ids", "labels", "attention_mask", "position_ids", "token_type_ids")


class Batch(NamedTuple):
    """Micro-batches of several adapters as the rows of one batch.

    A micro-batch [B, L] keeps its own padding, on whichever side. Shorter ones are padded on the
    right to the longest, so positions do not change. That padding is masked and has no label and
    no adapter, so it affects nothing.

    Packed documents are rows without a mask whose position_ids restart. transformers' models tell
    such documents apart only if there is no mask at all, so they go into batches of their own. The
    positions of the padding then make it a document apart.

    Attributes:
        inputs: int64 [ΣB, max L], by argument of the model. input_ids are always there, and
            attention_mask except for packed documents; others if a micro-batch has them.
        labels: int64 [ΣB, max L], −100 for none; not shifted.
        slots: int32 [ΣB, max L], −1 for padding between micro-batches.
        rows: (slice of rows, number of columns) of each slot's micro-batch.

    Examples:
        >>> def micro_batch(*ids):
        ...     return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([ids])}
        >>> parts = {0: ("french", micro_batch(1, 2, 3)), 1: ("german", micro_batch(4, 5))}
        >>> batch = lk.training.Batch.join(parts, torch.device("cpu"))
        >>> batch.slots
        tensor([[ 0,  0,  0],
                [ 1,  1, -1]], dtype=torch.int32)
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    slots: Tensor
    rows: dict[int, tuple[slice, int]]

    @classmethod
    def join(
        cls,
        parts: Mapping[int, tuple[str, Mapping[str, Tensor]]],
        device: torch.device,
        pad_id: int = 0,
    ) -> Batch:
        """Join the micro-batches of several slots on a device.

        Args:
            parts: (adapter's name, micro-batch) by slot. A micro-batch has int64 input_ids and
                labels [B, L]; it may have attention_mask, position_ids and token_type_ids [B, L].
            device: of the result.
            pad_id: the token for padding.

        Raises:
            ValueError: there is no micro-batch; one lacks input_ids, labels or a label to learn,
                has an unknown argument or a wrong shape (the message names the adapter); or
                packed documents are mixed with others.
            TypeError: a value is not an int64 tensor (a mask may be bool or int32).
        """
        if not parts:
            raise ValueError("parts: got none, expected one or more")
        for name, part in parts.values():
            check_micro_batch(name, part)
        packed = [is_packed(part) for _, part in parts.values()]
        if any(packed) and not all(packed):
            raise ValueError("parts: got packed documents beside others, expected them apart")
        width = max(part["input_ids"].shape[1] for _, part in parts.values())
        used = [k for k in KEYS if any(k in part for _, part in parts.values())]
        always = () if any(packed) else ("attention_mask",)
        columns: dict[str, list[Tensor]] = {k: [] for k in {*used, *always}}
        slots, rows, first = [], {}, 0
        for slot, (_, part) in parts.items():
            count, length = part["input_ids"].shape
            rows[slot] = slice(first, first + count), length
            first += count
            own = torch.full((count, length), slot, dtype=torch.int32)
            slots.append(F.pad(own, (0, width - length), value=-1))
            for key, made in columns.items():
                value = part[key] if key in part else _default(key, part)
                value = value.to(device, torch.int64)
                made.append(F.pad(value, (0, width - length), value=_fill(key, pad_id)))
        joined = {key: torch.cat(made) for key, made in columns.items()}
        labels = joined.pop("labels")
        return cls(joined, labels, torch.cat(slots).to(device), rows)


def is_packed(part: Mapping[str, Tensor]) -> bool:
    """Whether rows of a micro-batch hold several documents, by their position_ids."""
    positions = part.get("position_ids")
    if positions is None or "attention_mask" in part:
        return False
    return bool((positions.diff(dim=-1) != 1).any())


def _default(key: str, part: Mapping[str, Tensor]) -> Tensor:
    """The value that a model assumes for an argument that a micro-batch leaves out."""
    ids = part["input_ids"]
    if key == "position_ids":
        return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return torch.full_like(ids, int(key == "attention_mask"))


def _fill(key: str, pad_id: int) -> int:
    return {"input_ids": pad_id, "labels": IGNORE}.get(key, 0)


def check_micro_batch(name: str, part: Mapping[str, Tensor]) -> None:
    """Raise ValueError or TypeError, with the adapter's name, for what `Batch` does not take."""
    where = f"batches of {name!r}"
    if not isinstance(part, Mapping):
        raise TypeError(f"{where}: got {type(part).__name__}, expected a mapping to tensors")
    for key in ("input_ids", "labels"):
        if key not in part:
            raise ValueError(f"{where}: {key} is missing, got {', '.join(map(str, part))}")
    shape = list(part["input_ids"].shape) if isinstance(part["input_ids"], Tensor) else None
    for key, value in part.items():
        if key not in KEYS:
            raise ValueError(f"{where}: got {key!r}, expected some of {', '.join(KEYS)}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {key}: got {type(value).__name__}, expected a tensor")
        masks = (torch.bool, torch.int32) if key == "attention_mask" else ()
        if value.dtype not in (torch.int64, *masks):
            raise TypeError(
                f"{where}: {key}: got dtype {dtype_names([value.dtype])}, expected int64"
            )
        if value.dim() != 2 or list(value.shape) != shape:
            expected = "[B, L]" if key == "input_ids" else f"{shape} as input_ids"
            raise ValueError(f"{where}: {key}: got shape {list(value.shape)}, expected {expected}")
    if not bool((part["labels"][:, 1:] != IGNORE).any()):
        raise ValueError(f"{where}: labels: got none to learn, expected one or more")
