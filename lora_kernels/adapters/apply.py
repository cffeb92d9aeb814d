"""apply_lora: put adapters on a model's linear layers, quantising the base on the way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layers import (
    adapter_layers,
    count_bytes,
    count_parameters,
    get_module,
    named_modules,
    replace_module,
)
from lora_kernels.adapters.progress import Progress, with_progress
from lora_kernels.adapters.quantize import (
    check_layer,
    check_quantize,
    leave_fast_path,
    plan_quantisation,
    without_adapter,
)
from lora_kernels.adapters.reads import read_layers
from lora_kernels.adapters.report import LoRAReport, layer_row
from lora_kernels.adapters.targets import Targets, find_targets, is_excluded
from lora_kernels.integrations.peft import ALL_LINEAR, pattern_value
from lora_kernels.integrations.transformers import forget_quantizer
from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear
from lora_kernels.nn.linear4bit import check_not_repacked, is_linear4bit
from lora_kernels.nn.lora import check_adapter_dtype
from lora_kernels.nn.multi_lora_embedding import POOLED
from lora_kernels.nn.multi_lora_training import TrainableMultiLoRALinear
from lora_kernels.ops.common.kinds import check_kinds, describe


def apply_lora(
    model: nn.Module,
    r: int = 16,
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
    adapter_dtype: torch.dtype | None = None,
    block_size: int = 64,
    double_quant: bool = True,
    progress: bool | Progress | None = None,
) -> LoRAReport:
    """Put adapters on a model's linear layers, in place, and freeze everything else.

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
    """
    config = LoRAConfig(
        r,
        alpha,
        dropout,
        target_modules,  # type: ignore[arg-type]
        bool(use_rslora),
        rank_pattern or {},
        alpha_pattern or {},
        exclude_modules,  # type: ignore[arg-type]
        init,
        bool(use_dora),
    )
    check_model(model)
    check_kinds(apply_lora, locals())
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
) -> LoRAReport:
    """Put the configuration's adapters on the targets, which are known to take one."""
    if quantize is not None:
        check_quantize(quantize, block_size)
    if adapter_dtype is not None:
        check_adapter_dtype(adapter_dtype)
    reads = read_layers(model)
    plan = plan_quantisation(model, config, targets.names, reads) if quantize else (set(), [])
    dense, kept = plan
    # The plan holds names only: a reference to a layer would keep its dense weight alive.
    theirs = [name for name, module in named_modules(model) if is_linear4bit(module)]
    called = [name for name in theirs if id(get_module(model, name)) not in reads]
    bare = dense | {name for name in called if not is_excluded(config, name)}
    work = list(targets.names) + sorted(bare - set(targets.names))
    for name in theirs:
        check_not_repacked(name, get_module(model, name))
    for name in work:
        check_layer(name, get_module(model, name), reads, quantised=name in dense)
    steps = with_progress(work, progress)
    fmt: dict[str, Any] = {
        "block_size": block_size,
        "double_quant": double_quant,
        "quant_type": quantize,
    }
    bytes_before = count_bytes(model)
    model.requires_grad_(False)
    for name in steps:
        layer: Any = get_module(model, name)
        new: nn.Module
        form = fmt if name in dense else {}
        if name in targets.names:
            new = _adapted(layer, config, name, adapter_dtype, form)
        else:
            new = without_adapter(layer, form)
        replace_module(model, layer, new)
        del layer
    leave_fast_path(model)
    if theirs and not any(is_linear4bit(module) for module in model.modules()):
        forget_quantizer(model)
    model.lora_config = config  # type: ignore[assignment]
    trainable, total = count_parameters(model)
    return LoRAReport(
        modules=targets.names,
        quantized=tuple(name for name in work if name in dense),
        skipped=targets.skipped + tuple(kept),
        trainable_parameters=trainable,
        total_parameters=total,
        bytes_before=bytes_before,
        bytes_after=count_bytes(model),
        layers=tuple(layer_row(name, module) for name, module in adapter_layers(model)),
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


def check_model(model: nn.Module) -> None:
    """Raise unless adapters can be put on this model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {describe(model)}, expected a torch.nn.Module")
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"model: {type(model).__name__} has PEFT adapters already; pass the base model"
        )
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise ValueError("model: is compiled already; call apply_lora before torch.compile")
    if isinstance(model, nn.Linear | NF4Linear):
        raise ValueError(
            f"model: is a {type(model).__name__}, which cannot be replaced inside itself; use "
            "LoRALinear.from_linear"
        )
    pooled = next((n for n, m in named_modules(model) if isinstance(m, POOLED)), None)
    if pooled is not None:
        raise ValueError(f"model: {pooled} has a pool already; serving.detach_pool removes it")
    training = [n for n, m in named_modules(model) if isinstance(m, TrainableMultiLoRALinear)]
    if training:
        raise ValueError(
            f"model: {type(model).__name__} has adapters in training on {training[0]} and others; "
            "training.detach_adapters removes them"
        )
    adapted = [name for name, _ in adapter_layers(model)]
    if adapted:
        raise ValueError(
            f"model: {type(model).__name__} has adapters on {len(adapted)} layers already "
            f"({', '.join(adapted[:3])}, ...); merge_and_unload removes them"
        )


def check_patterns(config: LoRAConfig, names: tuple[str, ...]) -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, option):
            if not any(pattern_value({pattern: True}, name, False) for name in names):
                raise ValueError(
                    f"{option}: {pattern!r} matches none of the {len(names)} adapted layers, such "
                    f"as {names[0]!r}"
                )
