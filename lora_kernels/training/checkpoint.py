"""Saving the adapters of a training run, one directory each, and resuming from them."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import nn

from lora_kernels.adapters.extras import Extras, resized_ends
from lora_kernels.adapters.reading import read_weights
from lora_kernels.adapters.saving import save_layers
from lora_kernels.integrations.peft import WEIGHTS_FILE, key_of
from lora_kernels.training.run import AdapterRun

STATE_FILE = "training_state.pt"


def check_name(name: object) -> None:
    """Raise unless an adapter's name can be the name of a directory."""
    if not isinstance(name, str):
        raise TypeError(f"jobs: got {name!r} as a name, expected a string")
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"jobs: got {name!r} as a name, expected one that a directory can have")


def save_run(model: nn.Module, run: AdapterRun, folder: Path) -> Path:
    """Write an adapter's directory in PEFT's format, with its training state beside the weights.

    It is written under a temporary name and renamed when it is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / run.name
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        whole = staging / "whole"
        extras = Extras(resized_ends(model, ()), (), {})
        save_layers(model, run.layers, run.job.config, whole, extras)
        torch.save(run.state(), whole / STATE_FILE)
        if place.exists():
            place.rename(staging / "replaced")
        os.replace(whole, place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return place


@torch.no_grad()
def load_run(model: nn.Module, run: AdapterRun, folder: Path) -> None:
    """Resume from what `save_run` wrote. The base is not loaded: embeddings that were saved because
    the vocabulary was resized have to equal the model's.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the adapter has other layers or ranks, or the base differs.
    """
    place = folder / run.name
    factors, other = read_weights(place / WEIGHTS_FILE)
    own = resized_ends(model, ())
    for key, t in other.items():
        if key in own and not torch.equal(own[key].to(t.device, t.dtype), t):
            raise ValueError(f"{place / WEIGHTS_FILE}: {key}: is not the model's own")
    expected = {key_of(n, f) for n, _ in run.layers for f in "AB"}
    got = {key_of(n, f) for n, pair in factors.items() for f in pair}
    got |= {key for key in other if key not in own}
    if got != expected:
        odd = sorted(got ^ expected)
        raise ValueError(f"{place / WEIGHTS_FILE}: {odd[0]}: expected the layers of {run.name!r}")
    pairs = [
        (key_of(name, factor), parameter, factors[name][factor])
        for name, layer in run.layers
        for factor, parameter in (("A", layer.lora_A), ("B", layer.lora_B))
    ]
    for key, parameter, value in pairs:
        if parameter.shape != value.shape:
            raise ValueError(
                f"{place / WEIGHTS_FILE}: {key}: got shape {list(value.shape)}, expected "
                f"{list(parameter.shape)}"
            )
    # A generator's state has to be on the host; load_state_dict moves the rest to the device.
    state = torch.load(place / STATE_FILE, map_location="cpu", weights_only=True)
    for _, parameter, value in pairs:
        parameter.copy_(value)
    run.restore(state)
