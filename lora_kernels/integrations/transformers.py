"""Properties of a transformers model, read without importing transformers."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn


def output_layer(model: nn.Module) -> nn.Module | None:
    """The layer that makes the logits, if the model names it."""
    return _asked(model, "get_output_embeddings")


def input_embedding(model: nn.Module) -> nn.Module | None:
    """The layer that looks up the tokens, if the model names it."""
    return _asked(model, "get_input_embeddings")


def vocabulary_layers(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output layer, those of them that the model names."""
    return [m for m in (input_embedding(model), output_layer(model)) if m is not None]


def _asked(model: nn.Module, getter: str) -> nn.Module | None:
    """What a method of the model gives; None if it has no such method or no such layer."""
    method = getattr(model, getter, None)
    try:
        return None if method is None else method()
    except (AttributeError, NotImplementedError):
        return None


# Ends of the names of models with a new head for a task, whose classes are the user's.
_TASKS = ("Classification", "QuestionAnswering", "MultipleChoice", "Segmentation", "Detection")
_HEADS = ("classifier", "score", "qa_outputs")


def task_heads(model: nn.Module) -> list[str]:
    """Names of the modules that a model for a task has beside its backbone. None for a language
    model, whose head was pretrained."""
    kind = type(model).__name__
    if "For" not in kind or not kind.endswith(_TASKS):
        return []
    heads = [n for n, m in model.named_children() if next(m.parameters(), None) is not None]
    backbone = getattr(model, "base_model_prefix", "")
    if backbone in heads:
        return [name for name in heads if name != backbone]
    return [name for name in heads if name in _HEADS]


_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of the model's task; None if it has no name for it."""
    kind = type(model).__name__
    return next((task for end, task in _TASK_TYPES.items() if kind.endswith(end)), None)


def resized_vocabulary(model: nn.Module) -> tuple[int, int] | None:
    """(vocabulary size when the model was loaded, size now) if they differ, else None.

    For a model that does not know where it was loaded from, the first is the size that
    `remember_vocabulary` noted. The network is not used."""
    config: Any = getattr(model, "config", None)
    name, size = base_model_name(model), _vocabulary(config)
    if size is None:
        return None
    before = vars(model).get(_SEEN)
    # Of a folder without the file (one with a GGUF) transformers gives the class's defaults.
    if name is not None and (not Path(name).is_dir() or (Path(name) / "config.json").is_file()):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            before = _vocabulary(type(config).from_pretrained(name, local_files_only=True))
    return None if before is None or before == size else (before, size)


_SEEN = "_lora_kernels_vocabulary"


def remember_vocabulary(model: nn.Module) -> None:
    """Note the size of a model's vocabulary, for `resized_vocabulary`."""
    vars(model)[_SEEN] = _vocabulary(getattr(model, "config", None))


def _vocabulary(config: Any) -> int | None:
    """The vocabulary's size; of the text part, if the model takes more than text."""
    getter = getattr(config, "get_text_config", None)
    return getattr(config if getter is None else getter(), "vocab_size", None)


def base_model_name(model: nn.Module) -> str | None:
    """The hub name or folder that the model was loaded from."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return name or None


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): a linear layer that stores its weight transposed."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.split(".")[0] == "transformers"


def forget_quantizer(model: nn.Module) -> None:
    """Remove transformers' marks of a model quantised by it, once no such layer is left.

    With them the Trainer refuses to train, and `save_pretrained` writes a configuration that asks
    for layers that no longer exist.
    """
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    config: Any = getattr(model, "config", None)
    for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
        if name in vars(config) if config is not None else ():
            delattr(config, name)


def share_weight(model: nn.Module) -> bool:
    """Whether output layer and embedding share a weight; True if the model lacks one of them."""
    ends = input_embedding(model), output_layer(model)
    weights = [getattr(layer, "weight", None) for layer in ends]
    return any(w is None for w in weights) or weights[0] is weights[1]


def untie(model: nn.Module) -> bool:
    """Stop transformers from tying the output layer to the embedding. Returns whether it did."""
    config: Any = getattr(model, "config", None)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if tied:
        config.tie_word_embeddings = False
    return tied
