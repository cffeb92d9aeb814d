"""The configuration that a call of `apply_lora` asks for."""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.modules_to_save import match_modules
from lora_kernels.integrations.peft import default_targets, modules_of_task
from lora_kernels.ops.common.kinds import describe


def resolve_config(
    model: nn.Module, config: Any, given: Mapping[str, Any], defaults: Mapping[str, Any]
) -> LoRAConfig:
    """The configuration, from options or from a configuration in place of them.

    Args:
        model: is asked for the defaults that PEFT has for its architecture.
        config: a LoRAConfig or PEFT's LoraConfig, or None.
        given: the options; `r` may be the configuration.
        defaults: of the options, from which none may differ beside a configuration.

    Raises:
        TypeError: there are two configurations, or options beside one.
    """
    given = dict(given)
    if not isinstance(given["r"], numbers.Number | str | None):
        if config is not None:
            raise TypeError("config: was given twice, as r too")
        if not hasattr(given["r"], "to_peft_dict") and not hasattr(given["r"], "to_dict"):
            raise TypeError(
                f"r: got {describe(given['r'])}, expected an int, a LoRAConfig or PEFT's LoraConfig"
            )
        config, given["r"] = given["r"], defaults["r"]
    if config is None:
        for name in ("rank_pattern", "alpha_pattern"):
            given[name] = given[name] or {}
        return LoRAConfig(**{**given, "use_rslora": bool(given["use_rslora"])})
    for name, value in given.items():
        if value != defaults[name]:
            raise TypeError(f"{name}: got {describe(value)} beside a configuration, which has it")
    if isinstance(config, LoRAConfig):
        return config
    if isinstance(config, Mapping) or not hasattr(config, "to_dict"):
        raise TypeError(f"config: got {describe(config)}, expected LoRAConfig or PEFT's LoraConfig")
    return _from_peft(model, config.to_dict())


def _from_peft(model: nn.Module, options: dict[str, Any]) -> LoRAConfig:
    if options.get("target_modules") is None and options.get("peft_type") == "LORA":
        architecture = getattr(getattr(model, "config", None), "model_type", None)
        options["target_modules"] = default_targets(architecture)
    config = LoRAConfig.from_peft(options)
    named = config.modules_to_save
    if not named:
        return config
    # PEFT ignores names that fit no module, and itself adds such names for a task.
    named += modules_of_task(options.get("task_type"))
    fitting = tuple(n for n in dict.fromkeys(named) if match_modules(model, [n]))
    return replace(config, modules_to_save=fitting or named)
