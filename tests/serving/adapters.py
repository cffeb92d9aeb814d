"""Small adapters in PEFT's format, and what they should give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_kernels.functional import gather_lora
from lora_kernels.integrations.peft import key_of
from lora_kernels.serving import AdapterPool
from lora_kernels.testing import assert_within_budget

SHAPES = {"up": (20, 33), "mid.down": (33, 12)}
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up", "down"]}


def adapter(
    seed: int = 0, r: int = 3, ranks: Mapping[str, int] | None = None, **config: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, configuration): rank r at every module but where `ranks` says otherwise."""
    g = torch.Generator().manual_seed(seed)
    ranks = ranks or {}
    state = {}
    for name, (k, n) in SHAPES.items():
        rank = ranks.get(name, r)
        state[key_of(name, "A")] = torch.randn(rank, k, generator=g) / k**0.5
        state[key_of(name, "B")] = torch.randn(n, rank, generator=g)
    return state, {**CONFIG, "r": r, "rank_pattern": dict(ranks), **config}


def save(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: t.contiguous() for k, t in state.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_pool(**options: Any) -> AdapterPool:
    """Pages start as NaN: what was never written cannot pass for an adapter."""
    settings = {"slots": 3, "pages": 6, "max_rank": 40, "dtype": torch.float32, "device": "cpu"}
    pool = AdapterPool(SHAPES, **(settings | options))
    for name in SHAPES:
        pool.pages(name).a.fill_(float("nan"))
        pool.pages(name).b.fill_(float("nan"))
    return pool


def contribution(
    x: Tensor, module: str, state: Mapping[str, Tensor], scale: float, dtype: torch.dtype
) -> Tensor:
    a, b = (state[key_of(module, f)].to(dtype) for f in "AB")
    return scale * (x.to(dtype) @ a.T @ b.T)


def assert_serves(
    pool: AdapterPool, name: str, state: Mapping[str, Tensor], alpha: float = 6.0
) -> None:
    """The pool's pages give what the adapter's own A and B do, at every module."""
    with pool.route([name, None]) as slots:
        for module, (k, _) in SHAPES.items():
            scale = alpha / state[key_of(module, "A")].shape[0]
            # Tokens enough to judge errors by: those of one token's outputs go together.
            x = torch.randn(2, 64, k, generator=torch.Generator().manual_seed(9))
            y = gather_lora(x, pool.pages(module), slots)
            exact = contribution(x, module, state, scale, torch.float64)
            plain = contribution(x, module, state, scale, torch.float32)
            assert_within_budget(y[0], exact[0], plain[0], f"{name} at {module}")
            assert not y[1].any()


def snapshot(pool: AdapterPool) -> list[Any]:
    """All that a pool holds, to the bit."""
    tensors = [t.clone().view(torch.int32) for name in SHAPES for t in pool.pages(name)]
    return [pool.stats(), pool.names(), tensors]


def assert_unchanged(pool: AdapterPool, before: list[Any]) -> None:
    after = snapshot(pool)
    assert after[:2] == before[:2]
    assert all(map(torch.equal, after[2], before[2]))
