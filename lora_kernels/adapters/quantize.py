"""quantize_model: a model's linear layers in 4 bits, without adapters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from lora_kernels.adapters.checks import check_model, check_quantize
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layers import count_bytes, unwrap
from lora_kernels.adapters.plan import make_plan, replace_layers
from lora_kernels.adapters.progress import Progress, with_progress
from lora_kernels.adapters.report import LoRAReport, make_report
from lora_kernels.adapters.targets import Targets
from lora_kernels.integrations.transformers import output_layer
from lora_kernels.nn.frozen_linear import shorten
from lora_kernels.ops.common.kinds import check_kinds


def quantize_model(
    model: nn.Module,
    quantize: Literal["nf4", "fp4"] = "nf4",
    exclude_modules: str | Iterable[str] = ("lm_head",),
    *,
    block_size: int = 64,
    double_quant: bool = True,
    progress: bool | Progress | None = None,
) -> LoRAReport:
    """Store a model's linear layers in 4 bits, in place, without any adapter: a base for a pool of
    adapters, or for `load_adapter`.

    What stays dense is what `apply_lora` leaves dense: excluded modules, output layers and heads,
    tied weights, and layers that the model's code reads without calling them. `requires_grad` of
    what is left stays as it was.

    Args:
        model, exclude_modules, block_size, double_quant, progress: as in `apply_lora`.
        quantize: the format.

    Returns:
        A report; `print` it.

    Raises:
        ValueError: there is nothing to quantise, the model has adapters already, an option is out
            of its range, or a weight holds non-finite values (the message names the layer).
        TypeError: an option has the wrong type.

    Examples:
        >>> report = lk.quantize_model(model)
        >>> len(report.quantized), report.modules
        (7, ())
    """
    check_model(model)
    check_kinds(quantize_model, locals())
    if quantize is None:
        check_quantize("None", block_size)
    plan = make_plan(
        model,
        LoRAConfig(exclude_modules=exclude_modules),  # type: ignore[arg-type]
        Targets((), ()),
        quantize=quantize,
        block_size=block_size,
        double_quant=double_quant,
    )
    if not plan.replaced:
        left = "; ".join(f"{name} ({why})" for name, why in plan.kept_dense[:4]) or "none"
        raise ValueError(
            f"model: {type(model).__name__} has no dense linear layer to quantise (left: {left})"
        )
    bytes_before = count_bytes(model)
    replace_layers(model, plan, with_progress(plan.replaced, progress))
    shorten(output_layer(unwrap(model)))
    return make_report(model, plan, bytes_before)
