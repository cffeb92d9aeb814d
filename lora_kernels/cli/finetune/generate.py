"""Answers to held-out prompts, to show beside the reference."""

from __future__ import annotations

from typing import Any

import torch

MAX_NEW_TOKENS = 48


def spread(items: list[Any], count: int) -> list[Any]:
    """`count` items at even distances in the list."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str], limit: int | None = None) -> list[str]:
    """Greedy continuations of the prompts, at most `MAX_NEW_TOKENS` tokens each.

    Args:
        limit: the longest input of the model in tokens; a longer prompt loses its beginning.
    """
    if not prompts:
        return []
    side, training = tokenizer.padding_side, model.training
    tokenizer.padding_side = "left"
    model.eval()
    try:
        new_tokens = MAX_NEW_TOKENS if limit is None else min(MAX_NEW_TOKENS, limit // 2)
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        room = None if limit is None else new_tokens - limit
        batch = tokenizer.pad({"input_ids": [i[room:] for i in ids]}, return_tensors="pt")
        out = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    finally:
        tokenizer.padding_side = side
        model.train(training)
    new = out[:, batch["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
