"""An op called by name, and the arguments that its oracle takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.nf4.reference import dense_weight
from lora_kernels.ops.packed.schema import split_base


def call(op: Any, args: Sequence[Any], run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Run an op, or the one of a name: each output by its name in the schema ("y" where it has
    none), those of a list numbered, and what it wrote to a copy of its argument; `run` does it
    where given."""
    if isinstance(op, str):
        op = getattr(torch.ops.lora_kernels, op).default
    arguments, returns = op._schema.arguments, op._schema.returns
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    args = [_copy(a) if i in written else a for i, a in enumerate(args)]
    returned = (run or op)(*args)
    values = [returned] if len(returns) == 1 else returned or ()
    outputs = {arguments[i].name: args[i] for i in written}
    for declared, value in zip(returns, values, strict=True):
        name = declared.name or "y"
        if isinstance(value, Tensor):
            outputs[name] = value
        else:
            outputs |= {f"{name}{i}": t for i, t in enumerate(value)}
    return outputs


def _copy(t: Tensor) -> Tensor:
    """With the same strides."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)


def oracle_args(op: str, args: Sequence[Any]) -> list[Any]:
    """The arguments in fp64. A 4-bit base is decoded to the compute type first: the weight's
    rounding belongs to the format, not to the error of a kernel."""
    dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
    compute = dtypes[0] if dtypes else torch.float32  # none: there is no base
    schema = getattr(torch.ops.lora_kernels, op).default._schema
    # Trailing arguments may be left to their defaults.
    named = dict(zip((a.name for a in schema.arguments), args, strict=False))
    if op.startswith("lora_packed"):
        parts = [(w, m) for w, m, _ in split_base(named["base"], named["meta"])]
        named["base"] = [dense_weight(w, m, compute) for w, m in parts]
        named["meta"] = [size for _, m in parts for size in (*m[:2], 0, 0, 0)]
    elif "base" in named and not Meta(*named["meta"]).is_dense:
        named["base"] = [dense_weight(named["base"], named["meta"], compute)]
        named["meta"] = named["meta"][:2]
    return [double(a) for a in named.values()]


def double(value: Any) -> Any:
    """Floating tensors, in lists too, in fp64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [double(v) for v in value] if isinstance(value, list) else value
