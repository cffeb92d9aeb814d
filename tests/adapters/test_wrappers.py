"""Models of which modules are wrapped: names, patterns, files and pools are those of the model."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.optim.swa_utils import AveragedModel

from lora_kernels import serving
from lora_kernels.adapters import (
    adapter_layers,
    apply_lora,
    load_adapter,
    merge_and_unload,
    model_report,
    save_adapter,
    unload,
)
from lora_kernels.adapters.layers import get_module, named_modules
from tests.adapters.heads import learn
from tests.adapters.models import llama, logits, tokens, wake


def _layers(wrap):
    def wrapped(model):
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return wrapped


def _each_linear(model):
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(m, CheckpointImpl.NO_REENTRANT),
        check_fn=lambda m: isinstance(m, nn.Linear),
    )
    return model


def _twice(model):
    return _layers(lambda m: offload_wrapper(checkpoint_wrapper(m)))(model)


WRAPPERS = {
    "checkpointed layers": _layers(checkpoint_wrapper),
    "checkpointed linears": _each_linear,
    "offloaded layers": _layers(offload_wrapper),
    "wrapped twice": _twice,
    "parallel layers": _layers(nn.DataParallel),
    "compiled layers": _layers(lambda m: torch.compile(m, backend="eager")),
    "averaged": AveragedModel,
    "parallel": nn.DataParallel,
}
BEFORE = {name: wrap for name, wrap in WRAPPERS.items() if name != "compiled layers"}
every = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
before = pytest.mark.parametrize("wrap", BEFORE.values(), ids=BEFORE)
# A pattern for the end of a name, one for its beginning, and an expression for all of it.
TARGETS = ["all-linear", ["layers.1.self_attn.q_proj"], r"model\.layers\.0\.mlp\.(up|down)_proj"]


def _adapted(model, targets="all-linear"):
    apply_lora(model, 4, 8, target_modules=targets, rank_pattern={r"layers\.0\.mlp\..*": 2})
    return wake(model)


@every
def test_names_are_those_of_the_model(wrap):
    plain = llama()
    names = [name for name, _ in plain.named_modules()]
    wrapped = wrap(copy.deepcopy(plain))
    assert [name for name, _ in named_modules(wrapped)] == names
    for name in names:
        assert type(get_module(wrapped, name)) is type(plain.get_submodule(name))
    with pytest.raises(AttributeError, match=r"has no module 'model\.layers\.7'"):
        get_module(wrapped, "model.layers.7")


@every
def test_files_of_a_model_that_was_wrapped_afterwards(wrap, tmp_path):
    plain = _adapted(llama())
    save_adapter(plain, tmp_path / "plain")
    wrapped = wrap(copy.deepcopy(plain))
    save_adapter(wrapped, tmp_path / "wrapped")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped" / name).read_bytes() == (
            tmp_path / "plain" / name
        ).read_bytes()

    other = wrap(_adapted(llama()))
    for _, layer in adapter_layers(other):
        nn.init.zeros_(layer.lora_B)
    load_adapter(other, tmp_path / "plain")
    assert torch.equal(logits(other), logits(plain))
    assert str(model_report(other)) == str(model_report(plain))


@every
def test_what_trains_beside_the_adapters_of_a_model_that_was_wrapped(wrap, tmp_path):
    options = {"modules_to_save": ["lm_head", "1.input_layernorm"], "trainable_token_indices": [3]}
    plain = llama()
    apply_lora(plain, 4, 8, target_modules=["q_proj"], **options)
    learn(plain)
    save_adapter(plain, tmp_path / "plain")
    wrapped = wrap(copy.deepcopy(plain))
    for part in ("lm_head",) if isinstance(getattr(wrapped, "lm_head", None), nn.Linear) else ():
        setattr(wrapped, part, checkpoint_wrapper(getattr(wrapped, part)))
    save_adapter(wrapped, tmp_path / "wrapped")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files = [(tmp_path / kind / name).read_bytes() for kind in ("wrapped", "plain")]
        assert files[0] == files[1]
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.zero_()
    load_adapter(wrapped, tmp_path / "plain")
    assert torch.equal(logits(wrapped), logits(plain))
    unload(wrapped)
    assert torch.equal(logits(wrapped), logits(llama()))


@before
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_adapters_on_a_model_that_was_wrapped_before(wrap, targets, quantize, tmp_path):
    options = {"target_modules": targets, "quantize": quantize}
    plain, wrapped = llama(), wrap(llama())
    reports = []
    for model in (plain, wrapped):
        torch.manual_seed(3)
        reports.append(apply_lora(model, 4, 8, **options))
        wake(model)
    for field in ("modules", "quantized", "skipped", "trainable_parameters", "layers"):
        assert getattr(reports[0], field) == getattr(reports[1], field)
    assert torch.equal(logits(wrapped), logits(plain))
    save_adapter(wrapped, tmp_path)
    fresh = llama()
    load_adapter(fresh, tmp_path, quantize=quantize)
    loaded = load_file(tmp_path / "adapter_model.safetensors")
    assert loaded and not any("module" in key.split(".")[2:] for key in loaded)
    assert [n for n, _ in adapter_layers(fresh)] == [n for n, _ in adapter_layers(plain)]
    merge_and_unload(wrapped)
    assert next(adapter_layers(wrapped), None) is None


@before
def test_a_pool_on_a_wrapped_model(wrap, tmp_path):
    single = _adapted(llama())
    save_adapter(single, tmp_path)
    model = wrap(llama())
    pool = serving.AdapterPool(model, slots=2, pages=64)
    pool.register("one", tmp_path)
    serving.attach_pool(model, pool)
    with torch.no_grad(), pool.route(["one", None]):
        both = model(tokens()).logits
    assert torch.equal(both[1], logits(llama())[1])
    assert not torch.equal(both[0], logits(llama())[0])
    serving.detach_pool(model)
    assert torch.equal(logits(model), logits(llama()))
