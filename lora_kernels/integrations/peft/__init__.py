"""PEFT: its models on this package's kernels, and its files.

One line after `get_peft_model` or `PeftModel.from_pretrained`, `accelerate(model)`, or one before,
`register()`; the rest of a script stays as it is. PEFT is not imported until one of them is called.
"""

from lora_kernels.integrations.peft.accelerate import (
    accelerate,
    adapter_rows,
    decelerate,
    register,
    unregister,
)
from lora_kernels.integrations.peft.files import (  # noqa: F401  (for the rest of this package)
    ALL_LINEAR,
    CONFIG_FILE,
    EMBEDDING,
    MAGNITUDE,
    PICKLED_WEIGHTS_FILE,
    WEIGHTS_FILE,
    base_key_of,
    check_config,
    check_directory,
    check_to_apply,
    default_targets,
    key_of,
    matches,
    modules_of_task,
    pattern_value,
    plain_key,
    saved_key,
    split_key,
    tokens_key,
)
from lora_kernels.integrations.peft.report import AccelerationReport, LayerRow

__all__ = [
    "AccelerationReport",
    "LayerRow",
    "accelerate",
    "adapter_rows",
    "decelerate",
    "register",
    "unregister",
]
