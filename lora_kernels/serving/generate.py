"""generate_batch: prompts of one batch, each with its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.serving.attach import attached_pool


class Generated(NamedTuple):
    """The result of `generate_batch`.

    Attributes:
        texts: the answer to each prompt, without special tokens.
        tokens: the new tokens of each answer, int64, up to and with the first end of sequence.

    Examples:
        >>> pool = lk.serving.AdapterPool(model.eval(), slots=4, pages=4)
        >>> names = lk.serving.attach_pool(model, pool)
        >>> made = lk.serving.generate_batch(model, tokenizer, ["Hello"], [None], max_new_tokens=1)
        >>> len(made.texts), made.tokens[0].shape
        (1, torch.Size([1]))
    """

    texts: list[str]
    tokens: list[Tensor]


@torch.no_grad()
def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    adapters: Sequence[str | None],
    **generate_kwargs: Any,
) -> Generated:
    """Run transformers' `generate` over a batch whose rows each use their own adapter.

    Prompts are padded on the left, whatever the tokenizer's setting. With greedy decoding each row
    gets the tokens that a model with its adapter alone would give.

    Args:
        model: a causal language model with a pool attached, in eval mode.
        tokenizer: pads with its padding token, or with its end of sequence if it has none.
        prompts: texts; the tokenizer adds special tokens.
        adapters: a name for each prompt, as for `AdapterPool.acquire`; None for the base alone.
        generate_kwargs: for `generate`. Beams are allowed, several sequences for a prompt are not.

    Raises:
        ValueError: there is not one adapter for each prompt, a prompt is empty, the model is in
            training mode or has no pool, there is no token to pad with, or several sequences are
            asked for.

    Examples:
        >>> pool = lk.serving.AdapterPool(model.eval(), slots=4, pages=4)
        >>> names = lk.serving.attach_pool(model, pool)
        >>> prompts, names = ["Hello", "Bonjour"], [None, None]  # or names that the pool knows
        >>> made = lk.serving.generate_batch(model, tokenizer, prompts, names, max_new_tokens=2)
        >>> len(made.texts)
        2
    """
    if not isinstance(prompts, str):
        check_kinds(generate_batch, locals())
    pool = attached_pool(model)
    if isinstance(prompts, str) or len(prompts) != len(adapters):
        raise ValueError(
            f"adapters: got {len(adapters)}, expected one for each of the "
            f"{1 if isinstance(prompts, str) else len(prompts)} prompts (a list)"
        )
    if model.training:
        raise ValueError("model: is in training mode, expected eval()")
    several = _option(model, generate_kwargs, "num_return_sequences")
    if several not in (None, 1):
        raise ValueError(f"num_return_sequences: got {several}, expected 1")
    if not prompts:
        return Generated([], [])
    ids = [torch.tensor(i) for i in tokenizer(list(prompts))["input_ids"]]
    empty = [i for i, t in enumerate(ids) if not t.numel()]
    if empty:
        raise ValueError(f"prompts[{empty[0]}]: has no token, expected one or more")
    ends = _ends(model, generate_kwargs)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id
    if pad is None:
        raise ValueError("tokenizer: has no padding token and no end of sequence, expected one")
    width = max(map(len, ids))
    batch = torch.stack([torch.nn.functional.pad(t, (width - len(t), 0), value=pad) for t in ids])
    mask = torch.stack([torch.arange(width) >= width - len(t) for t in ids]).long()
    options = {"pad_token_id": pad, **generate_kwargs}
    # Each beam is a row of the batch; the beams of a prompt follow each other.
    beams = _option(model, generate_kwargs, "num_beams") or 1
    rows = [name for name in adapters for _ in range(beams)]
    with pool.route(rows):
        out = model.generate(
            input_ids=batch.to(model.device), attention_mask=mask.to(model.device), **options
        )
    sequences = out if isinstance(out, Tensor) else out.sequences
    tokens = [_until(row, ends) for row in sequences[:, width:].cpu()]
    return Generated([tokenizer.decode(t, skip_special_tokens=True) for t in tokens], tokens)


def _option(model: Any, given: dict[str, Any], name: str) -> Any:
    """The value that `generate` uses: its own argument, or a configuration's."""
    if name in given:
        return given[name]
    config = given.get("generation_config") or getattr(model, "generation_config", None)
    return getattr(config, name, None)


def _ends(model: Any, given: dict[str, Any]) -> list[int]:
    ends = _option(model, given, "eos_token_id")
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [int(i) for i in torch.as_tensor(ends).view(-1)]


def _until(row: Tensor, ends: list[int]) -> Tensor:
    found = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
    return row[: int(found[0]) + 1] if found.numel() else row
