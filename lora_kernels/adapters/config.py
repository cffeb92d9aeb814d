"""LoRAConfig: what an adapter is, apart from its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kernels.integrations.peft import (
    ALL_LINEAR,
    check_config,
    check_to_apply,
    pattern_value,
)
from lora_kernels.nn.lora import check_adapter_options
from lora_kernels.ops.common.kinds import describe


@dataclass(frozen=True)
class LoRAConfig:
    """The options of an adapter over a model; names and defaults as in `apply_lora`.

    Attributes:
        ensure_weight_tying: an embedding and an output layer that share a weight go on sharing it
            when one is in `modules_to_save`. If False, the named one gets a weight of its own.

    Raises:
        TypeError, ValueError: an option is of the wrong type or out of its range.

    Examples:
        >>> config = lk.LoRAConfig(r=8, alpha=16, rank_pattern={"q_proj": 32})
        >>> config.rank_of("layers.0.self_attn.q_proj"), config.rank_of("layers.0.self_attn.v_proj")
        (32, 8)
        >>> config.to_peft_dict()["lora_alpha"]
        16
    """

    r: int = 16
    alpha: float = 32
    dropout: float = 0.05
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] = ("lm_head",)
    init: str = "kaiming"
    use_dora: bool = False
    modules_to_save: tuple[str, ...] | None = None
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        check_adapter_options(self.r, self.alpha, self.dropout, self.init)
        for name in ("target_modules", "exclude_modules"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, _patterns(name, getattr(self, name)))
        if self.modules_to_save is not None:
            if isinstance(self.modules_to_save, str):
                raise TypeError(
                    f"modules_to_save: got {self.modules_to_save!r}, expected a list of names"
                )
            modules = _names("modules_to_save", self.modules_to_save)
            object.__setattr__(self, "modules_to_save", modules)
        tokens = _tokens(self.trainable_token_indices)
        object.__setattr__(self, "trainable_token_indices", tokens)
        if not self.target_modules:
            raise ValueError("target_modules: got nothing, expected names or a regular expression")
        for pattern, r in self.rank_pattern.items():
            _check_option("rank_pattern", pattern, r, self.alpha)
        for pattern, alpha in self.alpha_pattern.items():
            _check_option("alpha_pattern", pattern, self.r, alpha)

    @property
    def all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def rank_of(self, module: str) -> int:
        """The rank for a module of this name."""
        return pattern_value(self.rank_pattern, module, self.r)

    def alpha_of(self, module: str) -> float:
        """The alpha for a module of this name."""
        return pattern_value(self.alpha_pattern, module, self.alpha)

    def to_peft_dict(
        self, *, base_model: str | None = None, task_type: str | None = None
    ) -> dict[str, Any]:
        """The content of PEFT's `adapter_config.json`.

        Args:
            base_model: where the base model was loaded from.
            task_type: PEFT's name of the task, such as "CAUSAL_LM".
        """
        return {
            "peft_type": "LORA",
            "task_type": task_type,
            "base_model_name_or_path": base_model,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": _plain(self.target_modules),
            "exclude_modules": _plain(self.exclude_modules) or None,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "init_lora_weights": True if self.init == "kaiming" else self.init,
            "bias": "none",
            "fan_in_fan_out": False,
            "lora_bias": False,
            "use_dora": self.use_dora,
            "modules_to_save": list(self.modules_to_save) if self.modules_to_save else None,
            "trainable_token_indices": _plain_tokens(self.trainable_token_indices),
            "ensure_weight_tying": self.ensure_weight_tying,
            "layers_to_transform": None,
            "layers_pattern": None,
        }

    @classmethod
    def from_peft_dict(cls, config: Mapping[str, Any]) -> LoRAConfig:
        """Read the content of PEFT's `adapter_config.json`.

        Raises:
            ValueError: the configuration is neither LoRA nor DoRA; the message names the option.
            TypeError: an option has the wrong type.
        """
        check_config(config)
        missing = [k for k in ("r", "target_modules") if config.get(k) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)}: missing from the adapter's configuration")
        return cls(
            r=config["r"],
            alpha=config.get("lora_alpha", 8),
            dropout=config.get("lora_dropout", 0.0),
            target_modules=config["target_modules"],
            use_rslora=bool(config.get("use_rslora", False)),
            rank_pattern=config.get("rank_pattern") or {},
            alpha_pattern=config.get("alpha_pattern") or {},
            exclude_modules=config.get("exclude_modules") or (),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            use_dora=bool(config.get("use_dora", False)),
            modules_to_save=config.get("modules_to_save"),
            trainable_token_indices=config.get("trainable_token_indices"),
            ensure_weight_tying=bool(config.get("ensure_weight_tying", False)),
        )

    @classmethod
    def from_peft(cls, config: Any) -> LoRAConfig:
        """Read PEFT's own `LoraConfig`, to make new adapters.

        Raises:
            TypeError: `config` is something else.
            ValueError: it asks for something that is not supported; the message names the option.
        """
        options = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(options, Mapping):
            raise TypeError(
                f"config: got {describe(config)}, expected LoRAConfig or PEFT's LoraConfig"
            )
        unknown = check_config(options)
        check_to_apply(options, unknown)
        return cls.from_peft_dict(options)


def _names(option: str, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str):
        _check_regex(option, value)
        return value
    names = tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"{option}: got {value!r}, expected a string or a list of names")
    # A set has no order of its own, and a saved configuration must not change from run to run.
    return tuple(sorted(names)) if isinstance(value, set | frozenset) else names


def _tokens(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    option = "trainable_token_indices"
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not all(isinstance(name, str) and name for name in value):
            raise TypeError(f"{option}: got {value!r}, expected names of embeddings")
        return {name: _token_list(f"{option}[{name!r}]", of) for name, of in value.items()} or None
    return _token_list(option, value)


def _token_list(option: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence | set | frozenset):
        raise TypeError(f"{option}: got {value!r}, expected a list of token ids")
    tokens = tuple(sorted(value)) if isinstance(value, set | frozenset) else tuple(value)
    if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens):
        raise TypeError(f"{option}: got {value!r}, expected token ids of at least 0")
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError(f"{option}: got {value!r}, expected one token or more, each once")
    return tokens


def _plain_tokens(tokens: Any) -> Any:
    if isinstance(tokens, Mapping):
        return {name: list(of) for name, of in tokens.items()}
    return None if tokens is None else list(tokens)


def _plain(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _patterns(option: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{option}: got {value!r}, expected a mapping from names to values")
    for pattern in value:
        _check_regex(option, pattern)
    return dict(value)


def _check_regex(option: str, pattern: Any) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"{option}: got {pattern!r}, expected a string")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option}: {pattern!r} is no regular expression: {error}") from error


def _check_option(option: str, pattern: str, r: int, alpha: float) -> None:
    try:
        check_adapter_options(r, alpha, 0.0, "kaiming")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{option}[{pattern!r}]: {error}") from error
