"""Which option of PEFT's LoraConfig runs where, as data: docs/peft.md shows it, a test tries it.

Written for PEFT 0.21.2. An option that is not in the tables here fails the test.
"""

from __future__ import annotations

from typing import Any, NamedTuple

YES = "accelerated"
TRANSPOSED = "its weight is stored transposed, which the CPU's kernels do not take"
REFUSED = "PEFT refuses it"


class Option(NamedTuple):
    """One value of an option, tried on the three kinds of base layer that there are kernels for.

    Attributes:
        name: the field of LoraConfig.
        shown: the value, as the table shows it.
        value: the value, or text that makes it, with PEFT's classes at hand.
        linear, four_bit, conv1d: `YES`, `REFUSED`, or the reason in the report.
        extra: other options that the value needs.
    """

    name: str
    shown: str
    value: Any
    linear: str = YES
    four_bit: str = YES
    conv1d: str = TRANSPOSED
    extra: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def _own(variant: str) -> str:
    return f"{variant} has a forward of its own"


ALORA, ARROW = _own("ALoraLinearVariant"), _own("ArrowLinearVariant")
_START = ("True", "False", "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "eva")

# What changes the forward, or might: each is tried.
TRIED: tuple[Option, ...] = (
    Option("r", "4", 4),
    Option("lora_alpha", "7", 7),
    Option("rank_pattern", '{"layer": 3}', {"layer": 3}),
    Option("alpha_pattern", '{"layer": 5}', {"layer": 5}),
    Option("use_rslora", "True", True),
    Option("lora_dropout", "0.25", 0.25),
    Option("lora_bias", "True", True),
    Option("bias", '"all"', "all"),
    Option("bias", '"lora_only"', "lora_only"),
    Option("fan_in_fan_out", "True", True),
    *(
        Option("init_lora_weights", v, {"True": True, "False": False}.get(v, v), four_bit=four)
        for v in _START
        for four in [REFUSED if v in ("orthogonal", "pissa", "pissa_niter_4") else YES]
    ),
    Option("init_lora_weights", "mica", "mica", four_bit=REFUSED),
    Option("use_dora", "True", True, conv1d=YES),
    Option(
        *("use_dora", "True, with lora_bias", True, REFUSED, REFUSED, REFUSED),
        extra={"lora_bias": True},
    ),
    Option("kasa_config", "KasaConfig()", "KasaConfig()", conv1d=REFUSED),
    Option("alora_invocation_tokens", "[1, 2]", [1, 2], ALORA, ALORA, ALORA),
    Option(
        *("velora_config", "VeloraConfig()", "VeloraConfig(num_groups=4)"),
        *(_own("VeloraLinearVariant"), REFUSED, _own("VeloraLinearVariant")),
    ),
    Option(
        *("monteclora_config", "MontecloraConfig()", "MontecloraConfig()"),
        *(_own("MontecloraLinearVariant"), YES, _own("MontecloraLinearVariant")),
    ),
    Option(
        *("use_bdlora", "BdLoraConfig()", 'BdLoraConfig(["layer"], nblocks=2)'),
        *(_own("BdLoraLinearVariant"), YES, REFUSED),
    ),
    Option("arrow_config", "ArrowConfig()", "ArrowConfig()", ARROW, ARROW, ARROW),
    Option("use_qalora", "True, of effect on GPTQ alone", True),
    Option("qalora_group_size", "16, without use_qalora", 16),
)

# Where adapters are put, and what they start from. The forward is that of the layer.
PLACES = {
    "target_modules": "which layers",
    "exclude_modules": "which layers",
    "layers_to_transform": "which layers",
    "layers_pattern": "which layers",
    "layer_replication": "repeated layers share their base",
    "ensure_weight_tying": "tied factors are one tensor, of any strides",
    "modules_to_save": "trained whole, by PEFT",
    "trainable_token_indices": "rows of an embedding, trained by PEFT",
    "target_parameters": "left: see lora.ParamWrapper",
}
STARTS = {
    "loftq_config": "start values",
    "eva_config": "start values",
    "corda_config": "start values and base weight",
    "lora_ga_config": "start values and base weight",
}
RECORDS = {
    "task_type": "which class of PeftModel",
    "peft_type": "the method",
    "auto_mapping": "a record",
    "peft_version": "a record",
    "base_model_name_or_path": "a record",
    "revision": "a record",
    "inference_mode": "whether adapters train",
    "runtime_config": "ephemeral_gpu_offload: LoRA accelerated, DoRA left",
    "megatron_config": "left: Megatron's layers have classes of their own",
    "megatron_core": "left: Megatron's layers have classes of their own",
}


def table() -> str:
    """The table of docs/peft.md, in Markdown.

    Examples:
        >>> from lora_kernels.integrations.peft.coverage import table
        >>> print(table().splitlines()[0])
        | option | nn.Linear | bitsandbytes 4-bit | Conv1D on a CPU |
    """
    lines = ["| option | nn.Linear | bitsandbytes 4-bit | Conv1D on a CPU |", "|---|---|---|---|"]
    for o in TRIED:
        value = f"`{o.name}={o.shown}`" if o.name != "init_lora_weights" else f"init `{o.shown}`"
        lines.append(f"| {value} | {_cell(o.linear)} | {_cell(o.four_bit)} | {_cell(o.conv1d)} |")
    for name, note in {**PLACES, **STARTS, **RECORDS}.items():
        lines.append(f"| `{name}` | {note} | | |")
    return "\n".join(lines)


def _cell(outcome: str) -> str:
    if outcome in (YES, REFUSED):
        return outcome
    return "left: stored transposed" if outcome == TRANSPOSED else f"left: {outcome}"
