"""What can be asked of a transformers model without importing transformers."""

from __future__ import annotations

from typing import Any

from torch import nn


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, where the model names it."""
    getter = getattr(model, "get_output_embeddings", None)
    if getter is None:
        return None
    try:
        return getter()
    except (AttributeError, NotImplementedError):
        return None


def is_classifier(model: nn.Module) -> bool:
    """Whether the model ends in a newly made classification head."""
    name = type(model).__name__
    return name.endswith(("ForSequenceClassification", "ForTokenClassification"))


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of the model's task; None where PEFT would expect a saved head as well."""
    return "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None


def base_model_name(model: nn.Module) -> str | None:
    """The hub name or folder that the model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name or None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight transposed."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.split(".")[0] == "transformers"


def forget_quantizer(model: nn.Module) -> None:
    """Take transformers' marks of a quantised model away, once none of its own layers is left.

    With them the Trainer refuses to train, and `save_pretrained` writes a configuration that asks
    for layers that are no longer there.
    """
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    config: Any = getattr(model, "config", None)
    for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
        if name in vars(config) if config is not None else ():
            delattr(config, name)


def untie(model: nn.Module) -> bool:
    """Stop transformers from tying the output layer to the embedding; whether it was tied."""
    config: Any = getattr(model, "config", None)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if tied:
        config.tie_word_embeddings = False
    return tied
