"""Storing a model's linear layers in 4 bits: which of them, and what is checked before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lora_kernels.adapters.checks import check_model
from lora_kernels.adapters.config import LoRAConfig
from lora_kernels.adapters.layers import (
    count_bytes,
    count_parameters,
    get_module,
    named_modules,
    replace_module,
)
from lora_kernels.adapters.progress import Progress, with_progress
from lora_kernels.adapters.reads import Read, read_layers, read_only
from lora_kernels.adapters.report import LoRAReport
from lora_kernels.adapters.targets import is_excluded, kept_dense
from lora_kernels.integrations.transformers import forget_quantizer
from lora_kernels.nn import LoRALinear, NF4Linear
from lora_kernels.nn.common import check_finite_weight, check_linear_layer
from lora_kernels.nn.linear4bit import check_linear4bit, check_not_repacked, is_linear4bit
from lora_kernels.nn.multi_lora_training import TrainableMultiLoRALinear
from lora_kernels.ops.common.base import QUANT_TYPES, check_block_size
from lora_kernels.ops.common.kinds import check_kinds, describe


@dataclass(frozen=True)
class BasePlan:
    """What becomes of a model's base, by name: a reference to a layer would keep its weight alive.

    Attributes:
        dense: layers to quantise.
        kept: (name, reason) of layers that stay dense.
        theirs: bitsandbytes' layers.
        bare: those of the two that this package's take the place of, adapted or not.
    """

    dense: frozenset[str]
    kept: tuple[tuple[str, str], ...]
    theirs: tuple[str, ...]
    bare: frozenset[str]


def plan_base(
    model: nn.Module,
    config: LoRAConfig,
    targets: tuple[str, ...],
    reads: Mapping[int, Read],
    *,
    quantize: str | None,
    block_size: int,
    stay: Iterable[str] = (),
) -> BasePlan:
    """Which layers to quantise or take over; all of them, and the targets, are checked.

    Args:
        stay: layers that stay dense.
    """
    dense: set[str] = set()
    kept: list[tuple[str, str]] = []
    if quantize is not None:
        check_quantize(quantize, block_size)
        dense, kept = plan_quantisation(model, config, targets, reads)
        dense -= set(stay)
    theirs = [name for name, module in named_modules(model) if is_linear4bit(module)]
    called = [name for name in theirs if id(get_module(model, name)) not in reads]
    bare = dense | {name for name in called if not is_excluded(config, name)}
    for name in theirs:
        check_not_repacked(name, get_module(model, name))
    for name in (*targets, *sorted(bare - set(targets))):
        check_layer(name, get_module(model, name), reads, quantised=name in dense)
    return BasePlan(frozenset(dense), tuple(kept), tuple(theirs), frozenset(bare))


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
    config = LoRAConfig(exclude_modules=exclude_modules)  # type: ignore[arg-type]
    if quantize is None:
        check_quantize("None", block_size)
    plan = plan_base(
        model, config, (), read_layers(model), quantize=quantize, block_size=block_size
    )
    if not plan.bare:
        left = "; ".join(f"{name} ({why})" for name, why in plan.kept[:4]) or "none"
        raise ValueError(
            f"model: {type(model).__name__} has no dense linear layer to quantise (left: {left})"
        )
    form = {"block_size": block_size, "double_quant": double_quant, "quant_type": quantize}
    bytes_before = count_bytes(model)
    for name in with_progress(sorted(plan.bare), progress):
        layer = get_module(model, name)
        new = without_adapter(layer, form if name in plan.dense else {})
        replace_module(model, layer, new)
        del layer
    leave_fast_path(model)
    if plan.theirs and not any(is_linear4bit(module) for module in model.modules()):
        forget_quantizer(model)
    trainable, total = count_parameters(model)
    return LoRAReport(
        modules=(),
        quantized=tuple(sorted(plan.dense)),
        skipped=plan.kept,
        trainable_parameters=trainable,
        total_parameters=total,
        bytes_before=bytes_before,
        bytes_after=count_bytes(model),
        layers=(),
    )


def check_quantize(quantize: object, block_size: int) -> None:
    """Raise ValueError for a format to quantise to that there is not."""
    if quantize not in QUANT_TYPES:
        raise ValueError(
            f"quantize: got {describe(quantize)}, expected {' or '.join(QUANT_TYPES)}, or None"
        )
    check_block_size("block_size", block_size)


def check_layer(name: str, layer: Any, reads: Mapping[int, Read], *, quantised: bool) -> None:
    """Raise what converting the layer would raise, without converting it."""
    try:
        if reason := read_only(layer, reads):
            raise ValueError(reason)
        if isinstance(layer, NF4Linear):
            layer.weight.check()
        elif is_linear4bit(layer):
            check_linear4bit(layer)
        else:
            check_linear_layer(layer)
            if quantised:
                check_finite_weight(layer.weight)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def without_adapter(layer: nn.Module, form: dict[str, Any]) -> NF4Linear:
    if is_linear4bit(layer):
        return NF4Linear.from_linear4bit(layer)
    assert isinstance(layer, nn.Linear)
    return NF4Linear.from_linear(layer, **form)


def plan_quantisation(
    model: nn.Module, config: LoRAConfig, targets: tuple[str, ...], reads: Mapping[int, Read]
) -> tuple[set[str], list[tuple[str, str]]]:
    """(names of layers to quantise, (name, reason) of layers that stay dense)."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    stay = kept_dense(model, config)
    dense: set[str] = set()
    kept: list[tuple[str, str]] = []
    for name, module in named_modules(model):
        if not isinstance(module, nn.Linear) or is_linear4bit(module):
            continue
        if name not in targets:
            if is_excluded(config, name) or id(module) in stay | reads.keys():
                continue
            try:
                check_linear_layer(module)
            except (TypeError, ValueError):
                continue
        if module.weight.is_meta:
            raise ValueError(
                f"quantize: the weight of {name} is on the meta device, expected loaded values"
            )
        if id(module) in reads:
            kept.append((name, f"{reads[id(module)].reason}, kept dense"))
        elif owners[id(module.weight)] > 1:
            kept.append((name, "weight is tied, kept dense"))
        else:
            dense.add(name)
    return dense, kept


def leave_fast_path(model: nn.Module) -> None:
    """Make nn.TransformerEncoderLayer call its layers: its fused path reads their weights only."""
    ours = (LoRALinear, NF4Linear, TrainableMultiLoRALinear)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(child, ours) for child in module.modules()
        ):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and any(
            isinstance(child, ours) for child in module.modules()
        ):
            module.use_nested_tensor = False
