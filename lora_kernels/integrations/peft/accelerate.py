"""PEFT's models on this package's kernels, and back.

The modules, their parameters, names, hooks and state stay PEFT's own objects: a layer's class is
replaced by a subclass that adds a forward. PEFT is imported when a function is called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lora_kernels.integrations.peft.report import AccelerationReport, LayerRow


def accelerate(model: nn.Module) -> AccelerationReport:
    """Run the LoRA layers that PEFT has made on this package's kernels.

    For a model of `get_peft_model`, `PeftModel.from_pretrained`, `inject_adapter_in_model` or
    transformers' `add_adapter`; in place, and at any time, before or after the optimizer is made.
    Nothing is copied: names, parameters and their storage stay as they are, `isinstance` of PEFT's
    classes holds, and everything of PEFT goes on working as it does, `save_pretrained` to the byte.
    A layer or a call that the kernels do not take runs on PEFT's code. Adapters added later are
    accelerated too. A second call changes nothing and reports how the layers stand now.

    With `lora_dropout` above 0 the masks in training are not those that torch's generator would
    draw: they are a hash of a seed from it, made again in the backward and never stored.

    Args:
        model: any module that holds layers of PEFT.

    Returns:
        each layer, and for those on PEFT's code the reason.

    Raises:
        ImportError: PEFT is not installed.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lora_kernels.integrations.peft import accelerate
        >>> peft_model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
        >>> report = accelerate(peft_model)
        >>> len(report.accelerated), report.left
        (7, ())
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from lora_kernels.integrations.peft.classes import accelerate_module, kind_of, reason_of

    rows = []
    for name, module in _modules(model):
        accelerate_module(module)
        if isinstance(module, BaseTunerLayer):
            base = type(module.get_base_layer()).__name__
            rows.append(LayerRow(name, kind_of(module), base, reason_of(module)))
    return AccelerationReport(tuple(rows))


def decelerate(model: nn.Module) -> None:
    """Give every layer its class of PEFT back; `accelerate` undone.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lora_kernels.integrations.peft import accelerate, decelerate
        >>> peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        >>> report = accelerate(peft_model)
        >>> decelerate(peft_model)
        >>> {type(m).__module__ for m in peft_model.modules() if hasattr(m, "lora_A")}
        {'peft.tuners.lora.layer'}
    """
    from lora_kernels.integrations.peft.classes import decelerate_module

    for _, module in _modules(model):
        decelerate_module(module)


def register() -> None:
    """Have PEFT make accelerated LoRA layers from now on, for every model in this process.

    For scripts in which another library calls `get_peft_model`. Models that exist are left alone;
    PEFT's mixed models (`mixed=True`) take `accelerate` once they are made.

    Raises:
        ImportError: PEFT is not installed.
        RuntimeError: another package has put a LoRA class of its own into PEFT's table.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lora_kernels.integrations.peft import accelerate, register, unregister
        >>> register()
        >>> peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
        >>> type(peft_model.base_model.model.model.layers[0].self_attn.q_proj).__module__
        'lora_kernels.integrations.peft.linear'
        >>> unregister()
    """
    from lora_kernels.integrations.peft.classes import LoraModel

    _set_model_class(LoraModel.peft_class, LoraModel)


def unregister() -> None:
    """Undo `register`. Layers that exist stay as they are.

    Examples:
        >>> from lora_kernels.integrations.peft import register, unregister
        >>> register()
        >>> unregister()
    """
    from lora_kernels.integrations.peft.classes import LoraModel

    _set_model_class(LoraModel, LoraModel.peft_class)


def _set_model_class(old: type, new: type) -> None:
    """Replace the class that PEFT makes of a LoraConfig in PEFT's own table."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as TABLE

    found = TABLE[PeftType.LORA]
    if found not in (old, new):
        raise RuntimeError(
            f"PEFT's table of methods has {found.__module__}.{found.__qualname__} for LoRA, "
            f"expected {old.__module__}.{old.__qualname__}: use accelerate(model)"
        )
    TABLE[PeftType.LORA] = new


@contextlib.contextmanager
def adapter_rows(model: Any, adapter_names: Sequence[str]) -> Iterator[None]:
    """Within the block row i of each batch uses the adapter adapter_names[i], in training too.

    It is PEFT's `model(..., adapter_names=...)`, which PEFT refuses in training mode. An adapter
    gets the gradient of its own rows; which adapters train is as `requires_grad` says. With
    gradient checkpointing, call `backward` inside the block.

    Args:
        model: a PeftModel with LoRA adapters.
        adapter_names: for each row of the batch, "__base__" for none.

    Raises:
        ValueError: PEFT's, for a name that is no adapter, or a wrong number of them.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lora_kernels.integrations.peft import accelerate, adapter_rows
        >>> peft_model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]), "french")
        >>> peft_model.add_adapter("german", LoraConfig(target_modules=["q_proj"]))
        >>> peft_model.base_model.set_adapter(["french", "german"])  # both train
        >>> report = accelerate(peft_model)
        >>> ids = torch.tensor([[5, 6, 7], [5, 6, 7], [8, 9, 10]])
        >>> with adapter_rows(peft_model.train(), ["french", "german", "__base__"]):
        ...     loss = peft_model(input_ids=ids, labels=ids).loss
        >>> loss.backward()
    """
    tuner = getattr(model, "base_model", model)
    # A tuple: nothing is kept from one call of the model to the next, between which it may learn.
    block = tuner._enable_peft_forward_hooks(adapter_names=tuple(adapter_names))
    training, tuner.training = tuner.training, False  # all that PEFT's check looks at
    try:
        block.__enter__()
    finally:
        tuner.training = training
    with contextlib.ExitStack() as stack:
        stack.push(block.__exit__)
        yield


def _modules(model: nn.Module, prefix: str = "", seen: set[int] | None = None) -> Iterator[Any]:
    """`named_modules`, but PEFT's attention layer makes new parameters when that is called."""
    seen = set() if seen is None else seen
    if id(model) not in seen:
        seen.add(id(model))
        yield prefix, model
        for name, child in model._modules.items():
            if child is not None:
                yield from _modules(child, f"{prefix}.{name}" if prefix else name, seen)
