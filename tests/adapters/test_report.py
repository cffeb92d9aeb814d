"""model_report: every layer of ours, and the backend it takes."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import explain, use_backend
from lora_kernels.adapters import adapter_layers, apply_lora, merge_adapters, model_report
from lora_kernels.adapters.report import group_rows, layer_row, table
from lora_kernels.nn import NF4Linear
from tests.adapters.models import llama, mlp


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_the_path_is_the_one_that_runs(quantize):
    model = llama()
    apply_lora(model, r=4, quantize=quantize, target_modules=["q_proj"])
    report = model_report(model, rows=18)
    assert len(report.layers) == (14 if quantize else 2)
    modules = dict(model.named_modules())
    for row in report.layers:
        layer = modules[row.name].eval()
        x = torch.randn(18, layer.in_features)
        ran = [e.chosen for e in explain(layer, x) if e.op.endswith("linear_fwd")]
        assert ran == [row.path]
        assert row.shape == (layer.out_features, layer.in_features)
        assert (row.r == 4) == hasattr(layer, "lora_A")


def test_use_backend_is_followed():
    model = mlp()
    apply_lora(model, r=2, quantize="nf4")
    with use_backend("reference"):
        assert {row.path for row in model_report(model).layers} == {"reference"}


def test_merged_dense_layers_are_plain_pytorch():
    model = mlp()
    apply_lora(model, r=2, quantize="nf4")
    merge_adapters(model)
    assert {row.path for row in model_report(model).layers} == {"-"}
    with torch.device("meta"):
        meta = mlp()
    apply_lora(meta, r=2)
    assert {row.path for row in model_report(meta).layers} == {"meta device"}


def test_counts():
    model = mlp()
    parameters = sum(p.numel() for p in model.parameters())
    apply_lora(model, r=2, quantize="nf4")
    adapter = sum(a.lora_A.numel() + a.lora_B.numel() for _, a in adapter_layers(model))
    report = model_report(model)
    assert report.trainable_parameters == adapter
    assert report.total_parameters == parameters + adapter
    assert report.bytes == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def test_the_table():
    model = llama(torch.bfloat16)
    apply_lora(model, r=4, quantize="nf4", rank_pattern={"layers.0.mlp.up_proj": 8})
    lines = str(model_report(model, dtype=torch.float32)).splitlines()
    assert lines[0].split() == ["layer", "count", "N", "x", "K", "base", "r", "alpha", "path"]
    assert len(lines) == 1 + 8 + 1
    assert any(line.split()[:2] == ["up_proj", "1"] and " 8 " in line for line in lines)
    assert "M=512 rows of float32" in lines[-1]
    assert len({line.index("nf4/64") for line in lines[1:-1]}) == 1


def test_one_layer_and_none():
    row = layer_row("a.b", NF4Linear(32, 8))
    assert table([row]).splitlines()[1].split() == [
        "a.b",
        "8",
        "x",
        "32",
        "nf4/64",
        "nested",
        "-",
        "-",
    ]
    assert group_rows([row, row])[0].count == 2 and group_rows([row])[0].name == "b"
    assert str(model_report(mlp())) == "no layer of lora_kernels in this model"


def test_bad_arguments():
    with pytest.raises(ValueError, match="rows: got -1"):
        model_report(mlp(), rows=-1)
    with pytest.raises(TypeError, match="dtype: got int8"):
        model_report(mlp(), dtype=torch.int8)
