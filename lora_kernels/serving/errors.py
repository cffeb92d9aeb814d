"""Errors of a pool that depend on what else it holds."""

from __future__ import annotations

from collections.abc import Sequence


class AdapterPoolFull(RuntimeError):
    """Evicting all that may be evicted makes too little room. The pool is unchanged.

    Attributes:
        pinned: names of the adapters that are pinned.
        in_use: names of those that a route holds.

    Examples:
        >>> pool = lk.serving.AdapterPool({"q_proj": (64, 32)}, slots=1, pages=1)
        >>> state = {
        ...     "base_model.model.q_proj.lora_A.weight": torch.randn(8, 64),
        ...     "base_model.model.q_proj.lora_B.weight": torch.randn(32, 8),
        ... }
        >>> config = lk.LoRAConfig(r=8, target_modules=["q_proj"])
        >>> pool.load("french", state, config, pin=True)
        0
        >>> try:
        ...     pool.load("german", state, config)
        ... except lk.serving.AdapterPoolFull as error:
        ...     error.pinned
        ('french',)
    """

    def __init__(self, message: str, pinned: Sequence[str] = (), in_use: Sequence[str] = ()):
        super().__init__(message)
        self.pinned, self.in_use = tuple(pinned), tuple(in_use)


class AdapterInUse(RuntimeError):
    """The adapter is pinned or held by a route, so it may not be changed.

    Examples:
        >>> pool = lk.serving.AdapterPool({"q_proj": (64, 32)}, slots=2, pages=2)
        >>> state = {
        ...     "base_model.model.q_proj.lora_A.weight": torch.randn(8, 64),
        ...     "base_model.model.q_proj.lora_B.weight": torch.randn(32, 8),
        ... }
        >>> config = lk.LoRAConfig(r=8, target_modules=["q_proj"])
        >>> pool.load("french", state, config, pin=True)
        0
        >>> try:
        ...     pool.evict("french")
        ... except lk.serving.AdapterInUse:
        ...     pool.unpin("french")
    """
