"""Comparing each row of a mixed batch with the model with that adapter alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_kernels.cli.finetune.collate import can_trim_logits
from lora_kernels.cli.serve_demo.adapters import Adapters, fill
from lora_kernels.cli.serve_demo.progress import Tick
from lora_kernels.dispatch import use_backend
from lora_kernels.serving import AdapterPool
from lora_kernels.testing import assert_within_budget


@dataclass
class Checked:
    """The result of the comparison.

    Attributes:
        rows: how many were compared.
        wrong: a message for each row that exceeds the error budget.
        tokens: how many were generated.
        chosen: how many of them the model with the adapter alone would choose, given the tokens
            before.
    """

    rows: int
    tokens: int
    chosen: int = 0
    wrong: list[str] = field(default_factory=list)


@torch.no_grad()
def check_rows(
    served: Any,
    pool: AdapterPool,
    single: Any,
    adapters: Adapters,
    numbers: Sequence[int],
    prompt: Tensor,
    answers: Sequence[Tensor],
    tick: Tick,
) -> Checked:
    """Check the logits of a mixed batch's rows against the error budget.

    The oracle of a row is the model with the row's adapter alone in fp64. The budget follows from
    the error of the same model in plain PyTorch in the model's dtype.

    Args:
        served: the model with the pool attached.
        single: a model with one adapter, whose values are set for each row.
        numbers: the adapter of each row.
        prompt: int64 [L], the same for every row.
        answers: int64 [T] for each row; T may differ.
    """
    lengths = [len(answer) for answer in answers]
    prompts = prompt.to(served.device).expand(len(answers), -1)
    # Padding of short rows comes after all tokens that are compared.
    filled = pad_sequence(list(answers), batch_first=True).to(served.device)  # [B, T]
    ids = torch.cat([prompts, filled], 1)
    with pool.route([adapters.name(i) for i in numbers]):
        mixed = _logits(served, ids, filled.shape[1])
    exact_model = copy.deepcopy(single).double()
    found = Checked(len(numbers), sum(lengths))
    for row, (i, length) in enumerate(zip(numbers, lengths, strict=True)):
        state = adapters.state(i)
        for model in (single, exact_model):
            fill(model, state, pool.spec.dtype)
        own = ids[row : row + 1, : len(prompt) + length]
        with use_backend("reference"):
            plain = _logits(single, own, length)[0]
        exact = _logits(exact_model, own, length)[0]
        try:
            assert_within_budget(mixed[row, :length], exact, plain, adapters.name(i))
        except AssertionError as error:
            found.wrong.append(str(error))
        found.chosen += int((plain.argmax(-1) == own[0, -length:]).sum())
        tick(adapters.name(i))
    return found


def _logits(model: Any, ids: Tensor, answer: int) -> Tensor:
    """Logits [B, T, V] at the positions that predict the last T tokens of ids [B, L + T]."""
    options = {"logits_to_keep": answer + 1} if can_trim_logits(model) else {}
    return model(input_ids=ids, **options).logits[:, -answer - 1 : -1]
