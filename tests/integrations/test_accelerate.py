"""accelerate's hooks, which keep a model's weights elsewhere and bring them for each call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from torch import nn

from lora_kernels import apply_lora
from tests.adapters.models import llama, tokens


def _dispatch(model: nn.Module, folder: Path, **options: Any) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {name: "cpu" for name in ("model.norm", "model.rotary_emb", "lm_head")}
    dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True, **options
    )


WAYS: dict[str, Callable[..., None]] = {
    "cpu": lambda m, folder, **o: cpu_offload(m, execution_device="cpu", **o),
    "disk": lambda m, folder, **o: disk_offload(m, folder, execution_device="cpu", **o),
    "dispatch": _dispatch,
    "hook": lambda m, folder, **o: attach_align_device_hook(
        m, execution_device="cpu", offload=True, **o
    ),
}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4", "merged"])
def test_offloaded_layers_give_the_same(quantize, use_dora, way, buffers, tmp_path) -> None:
    """Adapters and 4-bit components come and go with the rest, and are there again afterwards."""
    model = llama()
    apply_lora(
        model,
        r=4,
        quantize="nf4" if quantize == "merged" else quantize,
        double_quant=not use_dora,
        use_dora=use_dora,
    )
    layer = model.model.layers[1].mlp.up_proj
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.1)
    model.eval()
    if quantize == "merged":
        layer.merge()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        expected = model(tokens()).logits
        WAYS[way](model, tmp_path, offload_buffers=buffers)
        assert layer.lora_A.is_meta
        for _ in range(2):
            assert torch.equal(model(tokens()).logits, expected)
        remove_hook_from_submodules(model)
        assert torch.equal(model(tokens()).logits, expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(t, before[name]) for name, t in after.items())
