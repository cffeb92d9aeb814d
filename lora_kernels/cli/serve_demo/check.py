"""Each row of a mixed batch against the model with that adapter alone."""

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
    """What the comparison found.

    Attributes:
        rows: how many were compared.
        wrong: a message for each row that is over the error budget.
        tokens, chosen: how many were generated; how many of them are the most likely next token
            of the adapter alone, after the tokens before.
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
    """Hold the logits of a mixed batch's rows to the one error budget.

    Each row's oracle is the model with the row's adapter alone in fp64, and its yardstick the same
    in plain PyTorch in the model's dtype.

    Args:
        served: with the pool attached.
        single: with one adapter, which is filled.
        numbers: the adapter of each row.
        prompt: int64 [L], of every row.
        answers: int64 [T] of each row, T its own.
    """
    lengths = [len(answer) for answer in answers]
    prompts = prompt.to(served.device).expand(len(answers), -1)
    # What fills up short rows comes after all that they are compared in.
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
    """[B, T, V], of the positions that chose the answer's tokens, the last T of ids [B, L + T]."""
    options = {"logits_to_keep": answer + 1} if can_trim_logits(model) else {}
    return model(input_ids=ids, **options).logits[:, -answer - 1 : -1]
