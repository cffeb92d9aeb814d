"""Reading an adapter and checking it on the host, before a pool makes room for it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels.adapters import LoRAConfig
from lora_kernels.adapters.reading import (
    Factors,
    check_factors,
    drop_other_kinds,
    naming,
    read_config,
    read_weights,
    split_weights,
    weights_file,
)
from lora_kernels.adapters.targets import is_excluded
from lora_kernels.adapters.words import first_few
from lora_kernels.integrations.peft import (
    CONFIG_FILE,
    EMBEDDING,
    check_config,
    check_directory,
    key_of,
    split_key,
)
from lora_kernels.integrations.peft import matches as named_by
from lora_kernels.ops.common.checks import names
from lora_kernels.serving.spec import PoolSpec

Source = str | os.PathLike[str] | Mapping[str, Tensor]


class PagedFactors(NamedTuple):
    """One module's adapter as in its pages: a [r, K], b [r, N] (rows of Bᵀ), scale."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class AdapterState:
    """An adapter that fits a pool, in the pool's dtype, on the host.

    Attributes:
        factors: by module, for the modules that the adapter adapts.
    """

    factors: Mapping[str, PagedFactors]

    @property
    def nbytes(self) -> int:
        return sum(f.a.nbytes + f.b.nbytes for f in self.factors.values())


def read_state(source: Source, config: object, spec: PoolSpec) -> AdapterState:
    """Read an adapter and check it against the pool's spec. The result shares no memory with it.

    Args:
        source: a directory in PEFT's format, or a state dict with PEFT's keys.
        config: PEFT's configuration of a state dict: a mapping, `LoRAConfig` or PEFT's object.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the adapter is damaged, not LoRA, does not fit the pool, or holds values that
            are not finite; the message names the key, the module or the option.
        TypeError: a tensor or an option has the wrong type.
    """
    if isinstance(source, Mapping):
        options = _options(config)
        where = "config"
        factors, rest = split_weights(_checked(source))
    else:
        if config is not None:
            raise ValueError("config: was given beside a directory, expected None")
        folder = check_directory(source, "source")
        options = read_config(folder / CONFIG_FILE)
        where = str(folder / CONFIG_FILE)
        path = weights_file(folder)
        factors, rest = read_weights(path)
    with naming(Path(where)):
        made = LoRAConfig.from_peft_dict(options)
        unknown = check_config(options)
        if unknown:
            raise ValueError(f"{', '.join(unknown)}: not known here")
        if made.use_dora:
            raise ValueError("use_dora: got True, expected False: a pool serves LoRA only")
        for option in ("modules_to_save", "trainable_token_indices"):
            if asked := options.get(option):
                raise ValueError(
                    f"{option}: got {asked!r}, which is not supported: the adapters of a pool "
                    "share all other weights"
                )
    where = "state" if isinstance(source, Mapping) else str(path)
    with naming(Path(where)):
        other = [key for key, t in rest.items() if not _is_base(key, t, spec)]
        _rename_factors(factors, spec)
        other += drop_other_kinds(factors, ("A", "B"))
        if other:
            raise ValueError(
                f"{first_few(sorted(other))}: not supported, expected lora_A and lora_B"
            )
        check_factors(made, factors)
        _check_modules(made, factors, spec, some_layers=bool(options.get("layers_to_transform")))
        return AdapterState(
            {n: _paged(n, factors[n], made, spec) for n in spec.modules_of(factors)}
        )


def _options(config: object) -> dict[str, Any]:
    if isinstance(config, LoRAConfig):
        return config.to_peft_dict()
    if not isinstance(config, Mapping) and hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config: got {type(config).__name__}, expected the state dict's PEFT configuration"
        )
    return dict(config)


def _checked(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for key, t in state.items():
        if not isinstance(key, str) or not isinstance(t, Tensor):
            raise TypeError(f"{key!r}: got {type(t).__name__}, expected a name and its tensor")
        if t.is_meta and split_key(key):
            raise ValueError(f"{key}: is on the meta device, expected values")
    return state


def _rename_factors(factors: dict[str, Factors], spec: PoolSpec) -> None:
    """Name an embedding's factors A and B too; ValueError if they are a linear layer's."""
    for name in spec.embeddings & set(factors):
        pair = factors[name]
        if not set(pair) <= set(EMBEDDING.values()):
            odd = next(kind for kind in pair if kind not in EMBEDDING.values())
            raise ValueError(
                f"{key_of(name, odd)}: is for a linear layer, {name} is an embedding: expected "
                f"{key_of(name, EMBEDDING['A'])}"
            )
        factors[name] = {f: pair[kind] for f, kind in EMBEDDING.items() if kind in pair}


def _is_base(key: str, copy: Tensor, spec: PoolSpec) -> bool:
    """Whether a tensor is a copy of the model's own weight, as PEFT saves it with an adapted output
    layer or a resized vocabulary. ValueError if it is a copy of another model's weight."""
    own = spec.saved.get(key)
    if own is None:
        return False
    own = own.detach()
    if copy.shape != own.shape or not torch.equal(copy.to(own.device, own.dtype), own):
        raise ValueError(f"{key}: is not the weight of the pool's model, expected the same base")
    return True


def _check_modules(
    config: LoRAConfig, factors: Mapping[str, Factors], spec: PoolSpec, *, some_layers: bool
) -> None:
    """Check that the adapter's modules are in the pool and are those its configuration names."""
    if not factors:
        raise ValueError("holds no adapter, expected lora_A and lora_B of one module or more")
    unknown = [key_of(name, "A") for name in factors if name not in spec.modules]
    if unknown:
        raise ValueError(
            f"{first_few(unknown)}: the pool has no such module, expected some of "
            f"{first_few(list(spec.modules))}"
        )
    if config.all_linear:
        expected = set(spec.all_linear) or set(factors)
    else:
        # Names that fit no module are ignored, as in PEFT.
        expected = {n for n in spec.modules if named_by(config.target_modules, n)}
    expected = {n for n in expected if not is_excluded(config, n)}
    extra = sorted(set(factors) - expected)
    if extra:
        raise ValueError(
            f"{first_few([key_of(n, 'A') for n in extra])}: not expected, target_modules is "
            f"{config.target_modules!r}"
        )
    missing = sorted(expected - set(factors))
    if missing and not some_layers:
        keys = [key_of(n, f) for n in missing for f in "AB"]
        raise ValueError(f"{first_few(keys)}: missing, target_modules is {config.target_modules!r}")


def _paged(name: str, pair: Factors, config: LoRAConfig, spec: PoolSpec) -> PagedFactors:
    a, b = pair["A"], pair["B"]
    r = a.shape[0]
    if r > spec.max_rank:
        raise ValueError(
            f"{key_of(name, 'A')}: got rank {r}, expected max_rank={spec.max_rank} or less"
        )
    k, n = spec.modules[name]
    for factor, t, shape in (("A", a, (r, k)), ("B", b, (n, r))):
        if tuple(t.shape) != shape:
            raise ValueError(
                f"{key_of(name, factor)}: got shape {list(t.shape)}, expected {list(shape)}"
            )
    scale = config.alpha_of(name) / (math.sqrt(r) if config.use_rslora else r)
    if abs(scale) > torch.finfo(torch.float32).max:
        raise ValueError(f"{name}: got scale {scale}, expected one that float32 holds")
    paged = PagedFactors(_host_copy(a, spec), _host_copy(b.T, spec), scale)
    for factor, t in (("A", paged.a), ("B", paged.b)):
        if not bool(torch.isfinite(t).all()):
            raise ValueError(f"{key_of(name, factor)}: overflows the pool's {names([spec.dtype])}")
    return paged


def _host_copy(t: Tensor, spec: PoolSpec) -> Tensor:
    """A copy in the pool's dtype; in pinned memory for CUDA, so that the host need not wait."""
    with torch.inference_mode(False):
        pinned = spec.device.type == "cuda"
        own = torch.empty(t.shape, dtype=spec.dtype, device="cpu", pin_memory=pinned)
        return own.copy_(t.detach())
