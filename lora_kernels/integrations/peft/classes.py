"""Which class of PEFT has which class here."""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners import lora
from torch import nn

from lora_kernels.integrations.peft.linear import Accelerated, Linear
from lora_kernels.integrations.peft.mixed import RowNames

# Why a class of PEFT has none; the rest are named by `reason_of`.
_LEFT = {
    "lora.Conv1d": "no kernel for convolutions",
    "lora.Conv2d": "no kernel for convolutions",
    "lora.Conv3d": "no kernel for convolutions",
    "lora.Embedding": "a look-up, which PEFT does as fast",
    "lora.Linear8bitLt": "no kernel for 8-bit weights",
    "lora.MultiheadAttention": "torch takes whole weights here: PEFT merges them at each call",
    "lora.ParamWrapper": "target_parameters: PEFT merges the parameter at each call",
}


class LoraModel(lora.LoraModel):
    """`peft.LoraModel`, but that the layers which it makes are accelerated."""

    peft_class = lora.LoraModel

    @staticmethod
    def _create_new_module(
        lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        make = lora.LoraModel._create_new_module
        made = make(lora_config, adapter_name, target, **kwargs)
        accelerate_module(made)
        return made

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        if type(kwargs.get("adapter_names")) is list:
            kwargs["adapter_names"] = RowNames(kwargs["adapter_names"])
        return super()._enable_peft_forward_hooks(*args, **kwargs)


@functools.cache
def classes() -> dict[type, Any]:
    """The classes here by PEFT's."""
    found: dict[type, Any] = {c.peft_class: c for c in (LoraModel, Linear)}
    if hasattr(lora, "Linear4bit"):  # PEFT found bitsandbytes
        from lora_kernels.integrations.peft.linear4bit import Linear4bit

        found[Linear4bit.peft_class] = Linear4bit
    return found


def accelerate_module(module: nn.Module) -> None:
    """Give an object of one of PEFT's classes its class here, if there is one."""
    found = classes().get(type(module))
    if found is not None:
        module.__class__ = found


def decelerate_module(module: nn.Module) -> None:
    """Give an object PEFT's class back."""
    if isinstance(module, Accelerated | LoraModel):
        module.__class__ = module.peft_class


def kind_of(layer: nn.Module) -> str:
    """The class of PEFT of a layer, as its users write it, such as "lora.Linear"."""
    kind: Any = getattr(layer, "peft_class", type(layer))
    package = kind.__module__.removeprefix("peft.tuners.").split(".")[0]
    return f"{package}.{kind.__name__}"


def reason_of(layer: Any) -> str:
    """Why a layer of PEFT runs on PEFT's code; "" if it does not."""
    if isinstance(layer, Accelerated):
        return layer.refuse() or ""
    kind = type(layer)
    if not kind.__module__.startswith("peft."):
        return f"{kind.__module__}.{kind.__qualname__} is no class of PEFT's"
    return _LEFT.get(kind_of(layer), f"no kernel for {kind_of(layer)}")
