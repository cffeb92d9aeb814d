"""Small random models for tasks, each with a new head, and what PEFT makes of the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}

_LABELS = {"num_labels": 5}


def _text(kind: str, config: str, **options: Any) -> Any:
    import transformers

    options = _LABELS | {"vocab_size": 40, "pad_token_id": 0} | options
    made = getattr(transformers, config)(**_SMALL, **options)
    return getattr(transformers, kind)(made)


def _image(kind: str, config: str) -> Any:
    import transformers

    made = getattr(transformers, config)(**_SMALL, **_LABELS, image_size=16, patch_size=8)
    return getattr(transformers, kind)(made)


def _distilbert() -> Any:
    import transformers

    made = transformers.DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=1, n_heads=2, vocab_size=40
    )
    return transformers.DistilBertForSequenceClassification(made)


# By name: (how it is made, its head's modules, PEFT's task).
MODELS: dict[str, tuple[Any, tuple[str, ...], str | None]] = {
    "llama sequence": (
        lambda: _text("LlamaForSequenceClassification", "LlamaConfig", num_key_value_heads=2),
        ("score",),
        "SEQ_CLS",
    ),
    "bert sequence": (
        lambda: _text("BertForSequenceClassification", "BertConfig"),
        ("classifier",),
        "SEQ_CLS",
    ),
    "roberta sequence": (
        lambda: _text("RobertaForSequenceClassification", "RobertaConfig"),
        ("classifier",),
        "SEQ_CLS",
    ),
    "distilbert sequence": (_distilbert, ("pre_classifier", "classifier"), "SEQ_CLS"),
    "bert tokens": (
        lambda: _text("BertForTokenClassification", "BertConfig"),
        ("classifier",),
        "TOKEN_CLS",
    ),
    "bert questions": (
        lambda: _text("BertForQuestionAnswering", "BertConfig", num_labels=2),
        ("qa_outputs",),
        "QUESTION_ANS",
    ),
    "llama questions": (
        lambda: _text(
            "LlamaForQuestionAnswering", "LlamaConfig", num_key_value_heads=2, num_labels=2
        ),
        ("qa_outputs",),
        "QUESTION_ANS",
    ),
    "bert choice": (
        lambda: _text("BertForMultipleChoice", "BertConfig"),
        ("classifier",),
        None,
    ),
    "vit image": (
        lambda: _image("ViTForImageClassification", "ViTConfig"),
        ("classifier",),
        None,
    ),
}
TARGETS = ["query", "q_proj", "q_lin", "dense", "down_proj"]


def make(name: str) -> Any:
    """The model, always the same, in eval mode."""
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def targets(model: nn.Module) -> list[str]:
    """Names of TARGETS that the model has."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return [name for name in TARGETS if name in ends]


def inputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if hasattr(model.config, "image_size"):
        return {"pixel_values": torch.randn(16, 3, 16, 16, generator=generator)}
    ids = torch.randint(1, 40, (16, 7), generator=generator)
    return {"input_ids": ids[:, None] if "MultipleChoice" in type(model).__name__ else ids}


def predictions(model: nn.Module, like: Any = None) -> Tensor:
    """All of the outputs' floats, in one."""
    with torch.no_grad():
        out = model(**inputs(like or model))
    parts = [v for v in out.values() if isinstance(v, Tensor) and v.is_floating_point()]
    return torch.cat([part.flatten() for part in parts])


def learn(model: nn.Module) -> nn.Module:
    """Change all that trains, as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.1)
    return model
