"""Small models for the tests of whole-model functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from lora_kernels.adapters import adapter_layers, apply_lora, save_adapter

VOCABULARY = 100
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def llama(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A random Llama with two layers of width 64, in eval mode, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {"tie_word_embeddings": False} | config
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            **config,
        )
    )
    return model.to(dtype).eval()


LLAMA_LAYERS = 14  # linear layers without lm_head


def tokens() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens()).logits


def assert_training_moves_trainable_only(model: Any, steps: int) -> None:
    """After some steps of AdamW the loss is lower, every trainable parameter has changed, and no
    other one has."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


class Mlp(nn.Module):
    """up, down and an output head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64, bias=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(torch.relu(self.up(x))))


def _nothing(x: Tensor) -> None:
    return None


class Attention(nn.Module):
    """q, k and v of one input, and an output layer; `between` runs between the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(40, 64), nn.Linear(40, 24, bias=False), nn.Linear(40, 24)
        self.out = nn.Linear(24, 40)
        self.between: Callable[[Tensor], object] = _nothing

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.between(x)
        k, v = self.k(x), self.v(x)
        return self.out(torch.tanh(q[..., :24]) * k + v)


def mlp() -> Mlp:
    torch.manual_seed(0)
    return Mlp()


def wake(model: nn.Module) -> nn.Module:
    """Give every adapter a B that is not zero."""
    generator = torch.Generator().manual_seed(2)
    for _, layer in adapter_layers(model):
        with torch.no_grad():
            layer.lora_B.normal_(std=0.1, generator=generator)
    return model


class AllDouble(TorchFunctionMode):
    """Makes code that casts to fp32 whatever it is given cast to fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        args, kwargs = tree_map(
            lambda x: torch.float64 if x is torch.float32 else x, (args, kwargs or {})
        )
        return func(*args, **kwargs)


def save_mlp(folder: Path) -> Path:
    """Save an adapter of rank 2 (down: 3) on `mlp`; returns the folder."""
    model = mlp()
    apply_lora(model, r=2, alpha=6, rank_pattern={"down": 3}, target_modules=["up", "down"])
    return save_adapter(wake(model), folder)


def factors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
