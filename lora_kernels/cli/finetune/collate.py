"""Batches with little padding, and logits only where there is a label."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from lora_kernels.cli.finetune.data import IGNORE, Example

# Lengths of batches are multiples of this. Libraries keep code for each new shape (oneDNN and
# attention 1 to 3 MiB), and nearly every batch would have a new one.
LENGTH_STEP = 32


class Collator:
    """Pad to the batch's longest sequence, on the right, and on to a multiple of `LENGTH_STEP`, but
    not beyond `max_length`.

    With `trim_logits` the model computes logits (`logits_to_keep`) only for the columns whose next
    token has a label in some row, and labels are already shifted (`shift_labels`). For short
    answers to long prompts this saves most of the output layer's work.
    """

    def __init__(self, pad_id: int, trim_logits: bool, max_length: int | None = None) -> None:
        self.pad_id = pad_id
        self.trim_logits = trim_logits
        self.max_length = max_length

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels [B, L]; trimmed, also shift_labels [B, columns]."""
        longest = max(len(e["input_ids"]) for e in examples)
        length = -(-longest // LENGTH_STEP) * LENGTH_STEP
        if self.max_length is not None:
            length = max(longest, min(length, self.max_length))
        ids = torch.full((len(examples), length), self.pad_id)
        labels = torch.full((len(examples), length), IGNORE)
        mask = torch.zeros((len(examples), length), dtype=torch.long)
        for row, example in enumerate(examples):
            size = len(example["input_ids"])
            ids[row, :size] = torch.tensor(example["input_ids"])
            labels[row, :size] = torch.tensor(example["labels"])
            mask[row, :size] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self.trim_logits:
            shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
            columns = (shifted != IGNORE).any(0).nonzero().flatten()
            batch["shift_labels"] = shifted[:, columns]
            # A model that shifts these itself gets the same labels, or raises a shape error.
            batch["labels"] = torch.nn.functional.pad(shifted[:, columns], (1, 0), value=IGNORE)
            batch["logits_to_keep"] = columns
        return batch


def can_trim_logits(model: Any) -> bool:
    """Whether the model's forward takes `logits_to_keep` and passes `shift_labels` to its loss."""
    parameters = inspect.signature(model.forward).parameters
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return "logits_to_keep" in parameters and takes_more


class LengthGroupedSampler(Sampler[int]):
    """A shuffled order in which the examples of one batch have similar lengths, and the longest
    batches come first.

    Examples are shuffled, cut into groups of `batch_size * GROUP` and sorted by length inside a
    group; then the batches are shuffled. In the first epoch the `longest_first` longest ones go to
    its beginning: memory is at its most at once, and where it is too little, the run ends in its
    first steps and not after hours. The order depends only on the arguments and the epoch, so a
    resumed run sees the same batches. (transformers' own grouping does not guarantee that.)

    Args:
        lengths: of each example.
        batch_size: examples of a batch.
        seed: of the shuffling.
        longest_first: batches.
    """

    GROUP = 16

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, longest_first: int = 0
    ) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.longest_first = longest_first
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches = self._batches(order)
        # A short batch must stay last, or it would shift the batches after it.
        tail = batches.pop() if batches and len(batches[-1]) < self.batch_size else []
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if self.epoch == 0:
            batches = self._longest_first(batches)
        for batch in batches:
            yield from batch
        yield from tail

    def _batches(self, order: list[int]) -> list[list[int]]:
        """Of like lengths. The last one may be short, and then holds the shortest of its group."""
        group = self.batch_size * self.GROUP
        # A rest of less than a batch joins the group before it: alone it would be a short batch,
        # perhaps with the longest example, which no whole batch would have met.
        starts = list(range(0, len(order), group))
        if len(starts) > 1 and len(order) - starts[-1] < self.batch_size:
            starts.pop()
        batches: list[list[int]] = []
        for start, end in pairwise([*starts, len(order)]):
            part = sorted(order[start:end], key=lambda i: -self.lengths[i])
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return batches

    def _longest_first(self, batches: list[list[int]]) -> list[list[int]]:
        """By the longest row, which the others are padded to; of equal ones by all of their tokens.
        The rest keeps its order."""

        def size(place: int) -> tuple[int, int]:
            lengths = [self.lengths[i] for i in batches[place]]
            return max(lengths), sum(lengths)

        by_size = sorted(range(len(batches)), key=size, reverse=True)
        first = by_size[: self.longest_first]
        chosen = set(first)
        return [batches[i] for i in first] + [b for i, b in enumerate(batches) if i not in chosen]
