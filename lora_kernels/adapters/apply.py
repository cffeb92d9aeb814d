"""apply_lora: put adapters on a model's linear layers, quantising the base on the way."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import nn

from lora_kernels.adapters.checks import check_model, check_patterns
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layers import count_bytes, unwrap
from lora_kernels.adapters.modules_to_save import train_whole, with_task_head
from lora_kernels.adapters.plan import Plan, make_plan, replace_layers
from lora_kernels.adapters.progress import Progress, with_progress
from lora_kernels.adapters.report import LoRAReport, make_report
from lora_kernels.adapters.resolve import resolve_config
from lora_kernels.adapters.targets import find_targets
from lora_kernels.adapters.token_indices import train_tokens
from lora_kernels.integrations.peft import ALL_LINEAR
from lora_kernels.integrations.transformers import output_layer, remember_vocabulary
from lora_kernels.nn.frozen_linear import shorten
from lora_kernels.ops.common.kinds import check_kinds


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

    nn.Linear becomes LoRALinear (QLoRALinear with `quantize`). bitsandbytes' Linear4bit and
    NF4Linear become QLoRALinear over the same bytes; a Linear4bit without an adapter becomes
    NF4Linear. With `quantize` the linear layers that get no adapter become NF4Linear too, except
    excluded ones and output layers. A weight that another module shares (a tied embedding) stays
    dense, for quantising it would free nothing. A layer with a forward of its own is left as it
    is, and so is one whose weight the model's code reads without calling it (Mamba's `dt_proj`).
    If other code does call it, it gets an adapter when it is named, and stays dense. Hooks on a
    layer move to the one in its place. A plain output layer stays what it is, and has a forward
    that takes a token or a few to a faster product, on a CPU in bf16. The options are kept as
    `model.lora_config`, for `save_adapter`.

    Every layer is checked before the first is replaced, so an error leaves the model unchanged.
    Layers are quantised one after the other, each on all of torch's threads. Each dense weight is
    freed before the next layer is quantised: the peak of memory is the model and one layer.

    Args:
        model: any module that holds linear layers; not compiled yet.
        r, alpha, dropout, use_rslora, use_dora, init: as in `nn.LoRALinear`.
        target_modules: names that a layer's full name ends in; or a regular expression for the
            full name; or "all-linear": every linear layer but the output layer.
        quantize: store the base in 4 bits.
        rank_pattern, alpha_pattern: r or alpha for some layers, as in PEFT. A key is a regular
            expression for the end of a layer's full name; the first that matches counts.
        exclude_modules: as `target_modules`. Excluded layers are neither adapted nor quantised.
        modules_to_save: ends of the names of modules that train whole and are saved with the
            adapters, as in PEFT. They get no adapter and are not quantised. The new head of a
            model for a task (classification, question answering, vision) is always among them,
            unless the list is empty.
        trainable_token_indices: tokens whose rows of the input embedding train; or by the end of a
            module's name, the rows of that module. A tied output layer trains the same rows.
        ensure_weight_tying: an embedding and an output layer that are tied stay tied when one of
            them is in `modules_to_save`.
        config: all of the above except `quantize`. It may also be passed as `r`.
        adapter_dtype: dtype of A, B and the magnitude; fp32 over a 16-bit base by default.
        block_size, double_quant: of `quantize`.
        progress: True for a bar (needs tqdm), False for none, or a function of (done, total,
            name). With None the bar shows after two seconds, if standard error is a terminal and
            tqdm is installed.

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
    config = with_task_head(model, resolve_config(model, config, given, _DEFAULTS))
    targets = find_targets(model, config)
    check_patterns(config, targets.names)
    plan = make_plan(
        model,
        config,
        targets,
        quantize=quantize,
        block_size=block_size,
        double_quant=double_quant,
        adapter_dtype=adapter_dtype,
    )
    bytes_before = count_bytes(model)
    put_adapters(model, plan, progress)
    return make_report(model, plan, bytes_before)


_OPTIONS = tuple(field.name for field in fields(LoRAConfig))
_DEFAULTS = {name: p.default for name, p in inspect.signature(apply_lora).parameters.items()}


def put_adapters(model: nn.Module, plan: Plan, progress: bool | Progress | None = None) -> None:
    """Carry out a plan: freeze the model, replace its layers, and mark what trains beside them."""
    names = with_progress(plan.replaced, progress)  # raises if a bar was asked for without tqdm
    model.requires_grad_(False)
    replace_layers(model, plan, names)
    train_whole(model, plan.trained, tied=plan.config.ensure_weight_tying)
    train_tokens(model, plan.rows, plan.adapter_dtype)
    remember_vocabulary(unwrap(model))
    shorten(output_layer(unwrap(model)))
    model.lora_config = plan.config  # type: ignore[assignment]
