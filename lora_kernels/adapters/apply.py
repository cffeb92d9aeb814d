"""apply_lora: put adapters on a model's linear layers, quantising the base on the way."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import torch
from torch import nn

from lora_kernels.adapters.checks import check_model
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layers import (
    adapter_layers,
    count_bytes,
    count_parameters,
    get_module,
    replace_module,
    unwrap,
)
from lora_kernels.adapters.modules_to_save import (
    check_whole,
    match_modules,
    train_whole,
    with_task_head,
)
from lora_kernels.adapters.progress import Progress, with_progress
from lora_kernels.adapters.quantize import leave_fast_path, plan_base, without_adapter
from lora_kernels.adapters.reads import read_layers
from lora_kernels.adapters.report import LoRAReport, layer_row
from lora_kernels.adapters.targets import Targets, find_targets
from lora_kernels.adapters.token_indices import check_tokens, find_rows, train_tokens
from lora_kernels.integrations.peft import (
    ALL_LINEAR,
    default_targets,
    modules_of_task,
    pattern_value,
)
from lora_kernels.integrations.transformers import forget_quantizer, remember_vocabulary
from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear
from lora_kernels.nn.linear4bit import is_linear4bit
from lora_kernels.nn.lora import check_adapter_dtype
from lora_kernels.ops.common.kinds import check_kinds, describe


def apply_lora(
    model: nn.Module,
    r: int | LoRAConfig | Any = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    quantize: Literal["nf4", "fp4"] | None = None,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    exclude_modules: str | Iterable[str] = ("lm_head",),
    *,
    use_dora: bool = False,
    init: str = "kaiming",
    modules_to_save: Iterable[str] | None = None,
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    ensure_weight_tying: bool = False,
    config: LoRAConfig | Any = None,
    adapter_dtype: torch.dtype | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    progress: bool | Progress | None = None,
) -> LoRAReport:
    """Put adapters on a model's linear layers, in place, and freeze everything else.

    `apply_lora(model, config)` takes all options of an adapter from a `LoRAConfig` or from PEFT's
    `LoraConfig`.

    nn.Linear becomes LoRALinear (QLoRALinear with `quantize`); bitsandbytes' Linear4bit and
    NF4Linear become QLoRALinear over the same bytes (a Linear4bit without an adapter becomes
    NF4Linear). With `quantize` the linear layers that get no adapter become NF4Linear too, except
    excluded ones and output layers. A weight that another module shares (a tied embedding) stays
    dense, for quantising it would free nothing. A layer whose weight the model's code reads without
    calling it (Mamba's `dt_proj`), and one with a forward of its own, is left as it is; where other
    code calls it, it is adapted when it is named, and stays dense. Hooks on a layer go over to the
    one in its place. The options are kept as `model.lora_config`, for
    `save_adapter`.

    Every layer is checked before the first is replaced: an error leaves the model as it was. They
    are quantised one after the other, each on all of torch's threads, and each dense weight is
    freed before the next one's turn: the peak is the model and what one layer takes.

    Args:
        model: any module that holds linear layers; not compiled yet.
        r, alpha, dropout, use_rslora, use_dora, init: as in `nn.LoRALinear`.
        target_modules: names that a layer's full name ends in; or a regular expression for the
            full name; or "all-linear": every linear layer but the output layer.
        quantize: store the base in 4 bits.
        rank_pattern, alpha_pattern: r or alpha by name, as in PEFT: a regular expression for the
            end of the full name; the first that fits counts.
        exclude_modules: as `target_modules`; what is excluded is neither adapted nor quantised.
        modules_to_save: ends of the names of modules that train whole and are saved with the
            adapters, as in PEFT; they get no adapter and are not quantised. The new head of a
            model for a task (classification, question answering, vision) is always among them, but
            with an empty list.
        trainable_token_indices: rows of the input embedding that train by themselves, or of the
            modules whose names end as the keys do. An output layer that is tied follows.
        ensure_weight_tying: an embedding and an output layer that are tied stay so when one of them
            is in `modules_to_save`.
        config: all of the above but `quantize`, in place of `r` or by name.
        adapter_dtype: dtype of A, B and the magnitude; fp32 over a 16-bit base by default.
        block_size, double_quant: of `quantize`.
        progress: True for a bar (needs tqdm), False for none, or a function of (done, total,
            name). None shows the bar after two seconds, if standard error is a terminal and tqdm
            is installed.

    Returns:
        A report; `print` it.

    Raises:
        ValueError: no layer matches, a target is unknown or cannot be adapted (the message lists
            the candidates), the model has adapters already, an option is out of its range, or a
            weight to quantise holds non-finite values (the message names the layer).
        TypeError: an option has the wrong type.

    Examples:
        >>> report = lk.apply_lora(model, r=8, alpha=16, dropout=0.05, quantize="nf4")
        >>> len(report.modules), len(report.quantized)
        (7, 7)
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    given = {k: v for k, v in locals().items() if k in _OPTIONS}
    check_model(model)
    check_kinds(apply_lora, {k: v for k, v in locals().items() if k not in ("r", "config")})
    config = with_task_head(model, _config_of(model, given, config))
    targets = find_targets(model, config)
    check_patterns(config, targets.names)
    return apply_config(
        model,
        config,
        targets,
        quantize=quantize,
        adapter_dtype=adapter_dtype,
        block_size=block_size,
        double_quant=double_quant,
        progress=progress,
    )


_OPTIONS = tuple(field.name for field in fields(LoRAConfig))


def _config_of(model: nn.Module, given: dict[str, Any], config: Any) -> LoRAConfig:
    """The configuration that `apply_lora` was given, in one of three ways."""
    if not isinstance(given["r"], numbers.Number | str | None):
        if config is not None:
            raise TypeError("config: was given twice, as r too")
        if not hasattr(given["r"], "to_peft_dict") and not hasattr(given["r"], "to_dict"):
            raise TypeError(
                f"r: got {describe(given['r'])}, expected an int, a LoRAConfig or PEFT's LoraConfig"
            )
        config, given["r"] = given["r"], 16
    if config is None:
        for name in ("rank_pattern", "alpha_pattern"):
            given[name] = given[name] or {}
        return LoRAConfig(**{**given, "use_rslora": bool(given["use_rslora"])})
    for name, value in given.items():
        if value != inspect.signature(apply_lora).parameters[name].default:
            raise TypeError(f"{name}: got {describe(value)} beside a configuration, which has it")
    if isinstance(config, LoRAConfig):
        return config
    if isinstance(config, Mapping) or not hasattr(config, "to_dict"):
        raise TypeError(f"config: got {describe(config)}, expected LoRAConfig or PEFT's LoraConfig")
    options = config.to_dict()
    if options.get("target_modules") is None and options.get("peft_type") == "LORA":
        kind = getattr(getattr(model, "config", None), "model_type", None)
        options["target_modules"] = default_targets(kind)
    made = LoRAConfig.from_peft(options)
    named = made.modules_to_save
    if named:  # PEFT passes over those that fit nothing, and itself adds such ones for a task
        named += modules_of_task(options.get("task_type"))
        fitting = tuple(n for n in dict.fromkeys(named) if match_modules(model, [n]))
        made = replace(made, modules_to_save=fitting or named)
    return made


def apply_config(
    model: nn.Module,
    config: LoRAConfig,
    targets: Targets,
    *,
    quantize: str | None = None,
    adapter_dtype: torch.dtype | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    progress: bool | Progress | None = None,
    before: Callable[[], None] = lambda: None,
) -> LoRAReport:
    """Put the configuration's adapters on the targets, which are known to take one.

    Args:
        before: is called once everything is checked, before anything is changed.
    """
    if adapter_dtype is not None:
        check_adapter_dtype(adapter_dtype)
    trained = match_modules(model, config.modules_to_save or ())
    for name in trained:
        check_whole(model, name)
    rows = find_rows(model, config)
    reads = read_layers(model)
    check_tokens(model, rows, targets.names, trained, reads)
    plan = plan_base(
        model,
        config,
        targets.names,
        reads,
        quantize=quantize,
        block_size=block_size,
        stay=[row.name for row in rows],
    )
    work = list(targets.names) + sorted(plan.bare - set(targets.names))
    steps = with_progress(work, progress)
    fmt = {"block_size": block_size, "double_quant": double_quant, "quant_type": quantize}
    bytes_before = count_bytes(model)
    before()
    model.requires_grad_(False)
    for name in steps:
        layer: Any = get_module(model, name)
        new: nn.Module
        form = fmt if name in plan.dense else {}
        if name in targets.names:
            new = _adapted(layer, config, name, adapter_dtype, form)
        else:
            new = without_adapter(layer, form)
        replace_module(model, layer, new)
        del layer
    leave_fast_path(model)
    train_whole(model, trained, tied=config.ensure_weight_tying)
    train_tokens(model, rows, adapter_dtype)
    if plan.theirs and not any(is_linear4bit(module) for module in model.modules()):
        forget_quantizer(model)
    remember_vocabulary(unwrap(model))
    model.lora_config = config  # type: ignore[assignment]
    trainable, total = count_parameters(model)
    return LoRAReport(
        modules=targets.names,
        quantized=tuple(name for name in work if name in plan.dense),
        skipped=targets.skipped + tuple(plan.kept),
        trainable_parameters=trainable,
        total_parameters=total,
        bytes_before=bytes_before,
        bytes_after=count_bytes(model),
        layers=tuple(layer_row(name, module) for name, module in adapter_layers(model)),
        modules_to_save=tuple(trained),
        trainable_tokens={row.name: row.tokens for row in rows},
    )


def _adapted(
    layer: nn.Module,
    config: LoRAConfig,
    name: str,
    adapter_dtype: torch.dtype | None,
    form: dict[str, Any],
) -> LoRALinear | QLoRALinear:
    options = (
        config.rank_of(name),
        config.alpha_of(name),
        config.dropout,
        config.use_rslora,
        config.init,
        adapter_dtype,
        config.use_dora,
    )
    if isinstance(layer, NF4Linear):
        return QLoRALinear.from_weight(layer.weight, layer.bias, *options).train(layer.training)
    if is_linear4bit(layer):
        return QLoRALinear.from_linear4bit(layer, *options)
    assert isinstance(layer, nn.Linear)
    if not form:
        return LoRALinear.from_linear(layer, *options)
    return QLoRALinear.from_linear(layer, *options, **form)


def check_patterns(config: LoRAConfig, names: tuple[str, ...]) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(pattern_value({pattern: True}, name, False) for name in names):
                raise ValueError(
                    f"{option}: {pattern!r} matches none of the {len(names)} adapted layers, such "
                    f"as {names[0]!r}"
                )
