"""Checks that a model is a complete causal language model with a matching tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

from lora_kernels.cli.errors import UsageError, one_line
from lora_kernels.cli.finetune.source import Source

# Ends of the names of classes whose weights hold another head than a language model's.
OTHER_TASKS = re.compile(
    r"For(\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction|MaskedLM|"
    r"MaskGeneration|\w*Retrieval|RewardModel\w*|\w*CTC)$"
)
EXPECTED = "expected a causal language model"


def load_config(source: Source) -> Any:
    """The model's configuration, which must be one of a causal language model.

    Raises:
        UsageError: transformers cannot read it, or the model is for another task.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.name, **source.options())
    except Exception as error:
        raise UsageError(
            f"--model: cannot read the configuration of {source}: {one_line(error)}"
        ) from error
    names = getattr(config, "architectures", None) or []
    if names and all(OTHER_TASKS.search(name) for name in names):
        raise UsageError(f"--model: {source} is a {', '.join(names)}, {EXPECTED}")
    if getattr(config, "is_encoder_decoder", False):
        what = names[0] if names else config.model_type
        raise UsageError(f"--model: {source} is an encoder with a decoder ({what}), {EXPECTED}")
    pad, size = getattr(config.get_text_config(), "pad_token_id", None), vocabulary(config)
    if isinstance(pad, int) and size is not None and pad >= size:
        raise UsageError(
            f"--model: the config.json of {source} gives pad_token_id {pad}, expected a token "
            f"below its vocab_size {size} (or null)"
        )
    return config


def length_limit(config: Any) -> int | None:
    """The longest input in tokens; None if the configuration sets no limit."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def vocabulary(config: Any) -> int | None:
    """The size of the vocabulary; None if the configuration does not say."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) and size > 0 else None


def fix_padding(tokenizer: Any, size: int | None) -> None:
    """Set a padding token that the model knows. Padding is masked, so any one will do.

    Raises:
        UsageError: the model knows none of the tokenizer's special tokens.
    """
    if size is None or tokenizer.pad_token_id < size:
        return
    for name in ("eos_token", "unk_token", "bos_token"):
        number = getattr(tokenizer, f"{name}_id", None)
        if number is not None and number < size:
            tokenizer.pad_token = getattr(tokenizer, name)
            return
    raise UsageError(
        f"--model: the tokenizer pads with token {tokenizer.pad_token_id}, and the model knows "
        f"the tokens below {size} alone"
    )


def check_tokens(tokenizer: Any, ids: Iterable[int], size: int | None) -> None:
    """Raise UsageError if a token has no row in the model's embedding."""
    most = max(ids, default=0)
    if size is not None and most >= size:
        token = tokenizer.convert_ids_to_tokens(most)
        raise UsageError(
            f"--model: its tokenizer gives {token!r} the number {most}, and the model knows the "
            f"tokens below {size} alone; they do not belong together, or the embedding was not "
            "resized"
        )


def check_whole(info: dict[str, Any], source: Source) -> None:
    """Raise UsageError if weights were missing from the model's files, so that they are random.

    Args:
        info: transformers' `output_loading_info`.
    """
    lacking = sorted(
        {*info.get("missing_keys", ()), *(key[0] for key in info.get("mismatched_keys", ()))}
    )
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if lacking[3:] else "")
        raise UsageError(
            f"--model: the weights of {source} lack {shown}, which would be random; "
            f"{EXPECTED} with its head"
        )


@torch.no_grad()
def check_reads_backwards(model: Any, source: Source) -> None:
    """Raise UsageError if a later token changes the logits of earlier ones.

    transformers loads an encoder as a language model without a warning. In training it would only
    learn to copy the tokens that it sees.
    """
    from transformers import PretrainedConfig

    count = min(8, length_limit(model.config) or 8)
    ids = torch.arange(count)[None] % model.get_input_embeddings().weight.shape[0]
    other = ids.clone()
    other[0, -1] = 0
    first, second = (
        model(input_ids=i.to(model.device)).logits[0, : count - 1].float() for i in (ids, other)
    )
    change = (first - second).abs().max().item()
    # Experts are chosen per token, so another token may change how the others are rounded.
    rounding = 1024 * torch.finfo(model.dtype).eps * first.abs().max().item()
    # Some releases of transformers give every configuration this field; it means nothing there.
    telling = not hasattr(PretrainedConfig(), "is_decoder")
    encoder = telling and getattr(model.config, "is_decoder", None) is False
    if (encoder and change > 0) or change > min(rounding, 0.1 * first.abs().max().item()):
        kind = type(model).__name__
        raise UsageError(
            f"--model: {source} is an encoder ({kind}: a token changes the logits of the tokens "
            f"before it), {EXPECTED}"
        )
