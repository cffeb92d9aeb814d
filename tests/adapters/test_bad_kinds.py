"""Functions over models, pools and training: an argument of the wrong kind is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import adapter_layers
from lora_kernels.nn import NF4Linear, QLoRALinear
from lora_kernels.serving import AdapterPool, attach_pool, detach_pool, generate_batch
from lora_kernels.training import AdapterJob, MultiLoRATrainer
from tests.adapters.models import llama, mlp

WEIGHT = torch.ones(4, 64)
MODEL_CALLS = {
    "apply_lora": lk.apply_lora,
    "load_adapter": lambda model: lk.load_adapter(model, "."),
    "save_adapter": lambda model: lk.save_adapter(model, "nowhere"),
    "merge_adapters": lk.merge_adapters,
    "unmerge_adapters": lk.unmerge_adapters,
    "merge_and_unload": lk.merge_and_unload,
    "model_report": lk.model_report,
    "fuse_loss": lk.fuse_loss,
    "fuse_projections": lk.fuse_projections,
    "unfuse_projections": lk.unfuse_projections,
    "disable_adapters": lambda model: lk.disable_adapters(model).__enter__(),
    "AdapterPool": lambda model: AdapterPool(model, slots=1, pages=1),
    "attach_pool": lambda model: attach_pool(model, _pool()),
    "detach_pool": detach_pool,
    "generate_batch": lambda model: generate_batch(model, None, ["a"], [None]),
    "MultiLoRATrainer": lambda model: MultiLoRATrainer(model, {"a": _job()}),
    "adapter_layers": lambda model: list(adapter_layers(model)),
}


def _pool(**options):
    return AdapterPool(mlp(), **dict(slots=1, pages=1) | options)


def _job():
    ids = torch.ones(1, 4, dtype=torch.int64)
    return AdapterJob(lk.LoRAConfig(r=2), [{"input_ids": ids, "labels": ids}])


def _trainer(**options):
    return MultiLoRATrainer(**dict(model=llama(), jobs={"a": _job()}) | options)


@pytest.mark.parametrize(
    "model", ["a/name", None, np.ones(3), WEIGHT, type(mlp())], ids=lambda m: type(m).__name__
)
@pytest.mark.parametrize("call", MODEL_CALLS.values(), ids=MODEL_CALLS)
def test_a_model_that_is_none(call, model):
    with pytest.raises(TypeError, match=r"^model: got .*, expected a torch.nn.Module"):
        call(model)


CASES = [
    (lambda v: lk.apply_lora(mlp(), quantize=v), "quantize", ["int4", 4, True, b"nf4"]),
    (lambda v: lk.apply_lora(mlp(), double_quant=v, quantize="nf4"), "double_quant", ["no", None]),
    (lambda v: lk.apply_lora(mlp(), use_dora=v), "use_dora", ["no", None, "dora"]),
    (lambda v: lk.apply_lora(mlp(), use_rslora=v), "use_rslora", ["no", None]),
    (lambda v: lk.apply_lora(mlp(), adapter_dtype=v), "adapter_dtype", ["bf16", 16, np.float32]),
    (lambda v: lk.apply_lora(mlp(), progress=v), "progress", ["no", 2.5]),
    (lambda v: lk.apply_lora(mlp(), r=v), "r", ["8", 8.0, None, np.ones(1)]),
    (lambda v: lk.apply_lora(mlp(), target_modules=v), "target_modules", [None, 3, [3], [None]]),
    (lambda v: lk.apply_lora(mlp(), exclude_modules=v), "exclude_modules", [None, 3, [3]]),
    (lambda v: lk.apply_lora(mlp(), rank_pattern=v), "rank_pattern", ["up", [("up", 2)], 3]),
    (lambda v: lk.apply_lora(mlp(), quantize="nf4", block_size=v), "block_size", ["64", None]),
    (lambda v: lk.load_adapter(mlp(), v), "directory", [None, 3, {}, WEIGHT]),
    (lambda v: lk.load_adapter(mlp(), ".", strict=v), "strict", ["no", None]),
    (lambda v: lk.save_adapter(_adapted(), v), "directory", [None, 3, {}, WEIGHT]),
    (lambda v: lk.NF4Weight.quantize(WEIGHT, v), "block_size", ["64", None, 64.5]),
    (lambda v: lk.NF4Weight.quantize(WEIGHT, double_quant=v), "double_quant", ["no", None]),
    (NF4Linear.from_weight, "weight", [WEIGHT, None, nn.Linear(2, 2)]),
    (QLoRALinear.from_weight, "weight", [WEIGHT, None, nn.Linear(2, 2)]),
    (lambda v: _pool(slots=v), "slots", ["4", 4.0, None]),
    (lambda v: _pool(pages=v), "pages", ["4", 4.0]),
    (lambda v: _pool(dtype=v), "dtype", ["bf16", np.float32]),
    (lambda v: _pool(device=v), "device", [WEIGHT, []]),
    (lambda v: _pool().load("a", v), "source", [None, 3, WEIGHT]),
    (lambda v: _pool().register("a", v), "directory", [None, 3, WEIGHT]),
    (lambda v: attach_pool(mlp(), v), "pool", [None, mlp(), "pool"]),
    (lambda v: generate_batch(llama(), None, v, [None]), "prompts", [None, 3, [3]]),
    (lambda v: generate_batch(llama(), None, ["a"], v), "adapters", [None, 3, [3]]),
    (lambda v: _trainer(jobs=v), "jobs", [None, [_job()], {"a": lk.LoRAConfig()}]),
    (lambda v: _trainer(quantize=v), "quantize", ["int4", 4]),
    (lambda v: _trainer(adapter_dtype=v), "adapter_dtype", ["bf16", 16]),
    (lambda v: _trainer(pad_id=v), "pad_id", ["0", None, 0.5]),
    (lambda v: _trainer(loss=v), "loss", ["mean", None]),
]


def _adapted():
    model = mlp()
    lk.apply_lora(model)
    return model


@pytest.mark.parametrize(("call", "name", "values"), CASES)
def test_the_argument_is_named(call, name, values):
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[.*\])?: got .*expected"):
            call(value)
            pytest.fail(f"took {value!r}")


def test_an_adapters_name_on_a_hub_is_no_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call, name in (
        (lambda v: lk.load_adapter(mlp(), v), "directory"),
        (lambda v: _pool().register("a", v), "directory"),
        (lambda v: _pool().load("a", v), "source"),
    ):
        with pytest.raises(FileNotFoundError) as error:
            call("someone/an-adapter")
        assert str(error.value) == (
            f"{name}: got 'someone/an-adapter', which is no directory here; expected one that "
            "holds adapter_config.json and adapter_model.safetensors "
            "(huggingface_hub.snapshot_download fetches one from the hub)"
        )
