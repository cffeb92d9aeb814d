"""Layers whose weight is read and never called, or whose forward is the instance's own."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from torch import nn

from lora_kernels import QLoRALinear, apply_lora, merge_adapters
from lora_kernels.adapters import adapter_layers, merge_and_unload
from lora_kernels.nn import LoRALinear, NF4Linear
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import AllDouble, mlp, wake

SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, pad_token_id=0)
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
SSM = dict(state_size=8, expand=2, conv_kernel=4, time_step_rank=4)
MAMBA2 = dict(num_heads=4, head_dim=16, n_groups=1, chunk_size=8)
PERIOD = dict(attn_layer_period=2, attn_layer_offset=1)
ZAMBA = dict(mamba_d_state=8, mamba_dt_rank=4, n_mamba_heads=2, num_hidden_layers=5)
ZAMBA |= dict(layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid"])
# name in transformers, options, a layer that is read only, one that some code reads
MODELS = [
    ("Mamba", SSM, "dt_proj", "x_proj"),
    ("FalconMamba", SSM, "dt_proj", "x_proj"),
    ("Mamba2", SSM | MAMBA2, None, "out_proj"),
    (
        "Jamba",
        HEADS | dict(mamba_d_state=8, mamba_dt_rank=4, num_experts=2, **PERIOD),
        "dt_proj",
        None,
    ),
    ("Zamba", HEADS | ZAMBA, None, None),
    (
        "Bamba",
        HEADS | dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, attn_layer_indices=[1]),
        None,
        "mamba.out_proj",
    ),
    (
        "RecurrentGemma",
        HEADS | dict(lru_width=32, attention_window_size=8, head_dim=8, num_hidden_layers=3),
        None,
        None,
    ),
]
KINDS = [pytest.param(*model, id=model[0]) for model in MODELS]


def _model(kind, options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | options)
    config._experts_implementation = "eager"  # the grouped one takes no fp64
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    # Some start with zeros, through which no gradient flows.
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def _ids():
    return torch.randint(1, 60, (2, 9), generator=torch.Generator().manual_seed(1))


def _logits(model):
    with torch.no_grad():
        return model(_ids(), use_cache=False).logits


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("kind", "options", "read", "mixed"), KINDS)
def test_every_adapter_of_a_state_space_model_learns_and_merges(
    kind, options, read, mixed, quantize
):
    model = _model(kind, options)
    base = _logits(model.eval())
    report = apply_lora(model, r=2, dropout=0.0, quantize=quantize)
    wake(model)
    model.train()
    model(_ids(), labels=_ids(), use_cache=False).loss.backward()
    for name, layer in adapter_layers(model):
        assert layer.lora_A.grad is not None, name
        assert layer.lora_B.grad.abs().max() > 0, name
    adapted = _logits(model.eval())
    assert not torch.equal(adapted, base)
    merge_adapters(model)
    merged = _logits(model)
    exact = _model(kind, options).double().eval()
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            exact.get_submodule(name).weight = nn.Parameter(layer.weight.dequantize().double())
    for name, layer in adapter_layers(model):
        a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
        whole = exact.get_submodule(name)  # of several layers that share a weight, one
        whole.weight = nn.Parameter(whole.weight + layer.scale * b @ a)
    plain = _logits(copy.deepcopy(exact).float())
    with AllDouble():
        assert_within_budget(merged, _logits(exact), plain)
    for layer in (read, mixed):
        if layer is not None:
            left = dict(report.skipped)
            names = [n for n, m in model.named_modules() if n.endswith(f".{layer}")]
            assert names and all("without calling it" in left[n] for n in names)
            assert all(type(model.get_submodule(n)) is nn.Linear for n in names)


@pytest.mark.parametrize(("kind", "options", "read", "mixed"), [k for k in KINDS if k.values[2]])
def test_a_layer_that_is_only_read_is_refused_by_name(kind, options, read, mixed):
    model = _model(kind, options)
    before = dict(model.state_dict())
    with pytest.raises(ValueError, match=rf"^target_modules: .*{read} \(.*without calling it\)"):
        apply_lora(model, target_modules=["in_proj", read])
    assert model.state_dict().keys() == before.keys()
    report = apply_lora(model, r=2, target_modules=["in_proj"], quantize="nf4")
    names = [n for n, _ in model.named_modules() if n.endswith(f".{read}")]
    assert names and not set(names) & {*report.modules, *report.quantized}
    _logits(model)


def test_a_layer_that_some_code_reads_is_adapted_when_named_and_stays_dense():
    model = _model("Mamba", SSM).eval()
    with pytest.warns(UserWarning, match=r"no effect on .*x_proj \(MambaMixer.forward reads"):
        report = apply_lora(model, r=2, target_modules=["x_proj"], quantize="nf4")
    assert {type(layer) for _, layer in adapter_layers(model)} == {LoRALinear}
    assert not [n for n in report.quantized if n.endswith("x_proj")]
    base = _logits(model)
    wake(model)
    assert not torch.equal(_logits(model), base)


class Reads(nn.Module):
    """Every way to read a layer that its source shows, beside some that are no read."""

    def __init__(self, slices=1):
        super().__init__()
        self.slices = slices
        self.plain, self.aliased, self.by_bias = (nn.Linear(8, 8) for _ in range(3))
        self.called, self.sliced, self.renamed = (nn.Linear(8, 8) for _ in range(3))
        self.listed = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.looped = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.nested = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.inner = nn.Module()
        self.inner.deep = nn.Linear(8, 8)

    def forward(self, x):
        x = self.renamed(self.called(x.to(self.called.weight.dtype)))
        assert isinstance(self.called.weight, torch.Tensor) and self.called.bias is not None
        x = nn.functional.linear(x, self.plain.weight) + self.by_bias.bias
        other = self.aliased
        x = nn.functional.linear(x, other.weight)
        if self.slices > 1:
            return x @ self.sliced.weight
        x = self.sliced(x) @ self.inner.deep.weight
        return self.further(x)

    def further(self, x):
        renamed = self.nested
        for layer in self.looped:
            x = layer(x)
        return renamed(x @ torch.cat([layer.weight for layer in self.listed])[:8])


def test_reads_are_found_in_the_source():
    model = Reads()
    report = apply_lora(model, r=2)
    assert report.modules == ("called", "sliced", "renamed", "looped.0", "looped.1", "nested.0")
    reasons = dict(report.skipped)
    read = ["plain", "aliased", "by_bias", "listed.0", "listed.1", "inner.deep"]
    assert list(reasons) == read
    assert reasons["plain"] == "Reads.forward reads its weight without calling it"
    assert reasons["by_bias"] == "Reads.forward reads its bias without calling it"
    assert reasons["listed.1"] == "Reads.further reads its weight without calling it"
    with pytest.raises(ValueError, match=r"listed.0 \(Reads.further reads"):
        apply_lora(Reads(), target_modules="listed.0")
    assert "sliced" in dict(apply_lora(Reads(slices=2), r=2).skipped)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_a_forward_of_the_instance_is_kept(quantize):
    model = mlp()
    seen = []

    def forward(self, x):
        seen.append(x.shape)
        return nn.functional.linear(x, self.weight, self.bias)

    model.down.forward = types.MethodType(forward, model.down)
    report = apply_lora(model, r=2, quantize=quantize)
    assert "forward is set on the instance" in dict(report.skipped)["down"]
    model(torch.randn(3, 64))
    assert seen == [(3, 96)] and "down" not in report.quantized
    other = mlp()
    other.down.forward = types.MethodType(forward, other.down)
    with pytest.raises(ValueError, match=r"down \(linear: its forward is set on the instance"):
        apply_lora(other, target_modules=["down"])
    for make in (LoRALinear, NF4Linear, QLoRALinear):
        with pytest.raises(TypeError, match=r"^linear: its forward is set on the instance"):
            make.from_linear(other.down)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_hooks_go_over_to_the_layer_in_a_layers_place(quantize):
    model, seen = mlp(), []
    model.up.register_forward_pre_hook(lambda *_: seen.append("before"))
    last = model.up.register_forward_hook(lambda *_: seen.append("after"))
    apply_lora(model, r=2, target_modules=["down"] if quantize else ["up"], quantize=quantize)
    model(torch.randn(3, 64))
    assert seen == ["before", "after"]
    last.remove()
    model(torch.randn(3, 64))
    assert seen == ["before", "after", "before"]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_accelerates_hook_goes_over_too(quantize):
    hooks = pytest.importorskip("accelerate.hooks")
    model, seen = mlp(), []
    for layer in (model.up, model.down):
        hook = hooks.AlignDevicesHook(torch.device("cpu"), io_same_device=True)
        hooks.add_hook_to_module(layer, hook)
    hook.post_forward = lambda module, output: seen.append(module) or output
    apply_lora(model, r=2, target_modules=["up", "down"], quantize=quantize)
    assert type(model.up) is type(model.down) is (QLoRALinear if quantize else LoRALinear)
    model(torch.randn(3, 64)).sum().backward()
    assert seen == [model.down] and model.up.lora_B.grad.abs().max() > 0
    hooks.remove_hook_from_module(model, recurse=True)
    merge_and_unload(model)
    assert apply_lora(model, r=2).modules == ("up", "down", "head")


def test_a_layer_that_accelerate_offloads_is_left_alone():
    hooks = pytest.importorskip("accelerate.hooks")
    model = mlp().eval()
    x = torch.randn(3, 64)
    before, exact = model(x), mlp().double()(x.double())
    hooks.add_hook_to_module(model.down, hooks.AlignDevicesHook(torch.device("cpu"), offload=True))
    report = apply_lora(model, r=2)
    assert "accelerate has offloaded its weight" in dict(report.skipped)["down"]
    assert_within_budget(model(x), exact, before)


def test_a_computed_bias_is_refused_before_any_change():
    model = mlp()
    nn.utils.parametrize.register_parametrization(model.up, "bias", nn.Tanh())
    report = apply_lora(model, r=2)
    assert "bias of this ParametrizedLinear is computed" in dict(report.skipped)["up"]
    model(torch.randn(3, 64))
