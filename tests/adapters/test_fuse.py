"""fuse_projections: which layers run as one, that the result is theirs, and is never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.adapters import adapter_layers
from lora_kernels.adapters.fuse import fused_report
from lora_kernels.nn import open_calls
from lora_kernels.testing import assert_within_budget
from tests.adapters.fused import LONE, PACKED, assert_equal, attention, inputs, pair, ran, step
from tests.adapters.models import llama, mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_is_what_the_layers_are_alone(quantize, dtype):
    apart, fused = pair(quantize=quantize, dtype=dtype)
    x = inputs(dtype)
    assert ran(lambda: fused(x)) == [PACKED, LONE]
    assert ran(lambda: apart(x)) == [LONE] * 4
    with torch.no_grad():
        assert torch.equal(fused(x), apart(x))
    exact = copy.deepcopy(apart)
    for name, layer in adapter_layers(exact):  # each weight as the layer decodes it, in fp64
        if quantize:
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense.weight.data = layer.weight.dequantize(dtype).double()
            dense.bias = layer.bias
            wide = lk.LoRALinear.from_linear(dense, layer.r, layer.alpha)
            wide.lora_A, wide.lora_B = layer.lora_A, layer.lora_B
            setattr(exact, name, wide)
    oracle = step(exact.double(), x.double())
    got, plain = step(fused, x), step(apart, x)
    for name in got:
        assert_within_budget(got[name], oracle[name], plain[name], name)


def test_the_report_says_what_runs_as_one_and_why_not():
    model = llama()
    lk.apply_lora(model, 4, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "o_proj"])
    report = lk.fuse_projections(model)
    assert report.groups[0] == tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qv")
    assert len(report.groups) == 4
    assert [name for name, _ in report.alone] == [
        f"model.layers.{i}.self_attn.o_proj" for i in range(2)
    ]
    assert str(report).splitlines() == [
        "run as one: 2 x q_proj + v_proj, 2 x gate_proj + up_proj",
        "one by one (no sibling with an adapter takes the same input): "
        "model.layers.0.self_attn.o_proj, model.layers.1.self_attn.o_proj",
    ]
    table = str(lk.model_report(model)).splitlines()
    assert table[0].endswith("run as one") and table[1].split()[-1] == "q_proj+v_proj"
    lk.unfuse_projections(model)
    assert "run as one" not in str(lk.model_report(model))
    empty = lk.fuse_projections(mlp())
    assert (empty.groups, empty.alone, str(empty)) == ((), (), "run as one: none")


REASONS = {
    "hook": (lambda k: k.register_forward_hook(lambda *_: None), "has hooks"),
    "before": (lambda k: k.register_forward_pre_hook(lambda *_: None), "has hooks"),
    "backward": (lambda k: k.register_full_backward_hook(lambda *_: None), "has hooks"),
    "disabled": (lambda k: setattr(k, "adapter_enabled", False), "its adapter is disabled"),
    "merged": (lambda k: k.merge(), "its adapter is merged"),
    "dropout": (lambda k: setattr(k, "dropout", 0.5), "has dropout 0.5, q has 0.0"),
    "mode": (lambda k: k.train(), "has training True, q has False"),
    "patched": (lambda k: setattr(k, "forward", k._base_forward), "has a forward of its own"),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("why", REASONS)
def test_a_layer_that_cannot_run_with_others_runs_alone(why, late):
    """Asked at each call: also in the middle of one, after its output was computed."""
    apart, fused = (m.eval() for m in pair())
    change, says = REASONS[why]
    change(apart.k)
    if late:
        fused.between = lambda x: change(fused.k)
    else:
        change(fused.k)
    found, x = [], inputs()
    k_alone = [] if why in ("disabled", "merged", "patched") else [LONE]
    assert ran(lambda: found.append(fused(x))) == [PACKED, *k_alone, LONE]
    assert torch.equal(found[0], apart(x))
    report = fused_report(fused)
    assert report.groups == (("q", "v"),) and ("k", says) in report.alone


def test_runs_as_one_again_once_the_reason_is_gone():
    _, fused = pair()
    handle = fused.q.register_forward_hook(lambda *_: None)
    assert ran(lambda: fused(inputs())) == [LONE, PACKED, LONE]
    handle.remove()
    lk.merge_adapters(fused.eval())
    assert ran(lambda: fused(inputs())) == []
    lk.unmerge_adapters(fused)
    assert ran(lambda: fused(inputs())) == [PACKED, LONE]
    with lk.disable_adapters(fused):
        assert ran(lambda: fused(inputs())) == []


def test_hooks_of_a_layer_see_and_change_what_they_would():
    results = []
    for model in pair():
        seen = []
        model.k.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        model.v.register_forward_hook(lambda m, args, y, seen=seen: seen.append(y) or y + 1)
        model.q.register_full_backward_hook(lambda m, i, o, seen=seen: seen.append(i[0]))
        results.append(step(model, inputs()) | {str(i): t for i, t in enumerate(seen)})
    assert_equal(*results)


@pytest.mark.parametrize("grad", [False, True])
def test_an_input_that_is_changed_between_the_calls(grad):
    """By code that reading the forward does not show."""
    results = []
    for model in pair():
        model.between = lambda x: x.mul_(2)
        with torch.set_grad_enabled(grad):
            results.append(model(inputs()))
    assert torch.equal(*results)


def test_another_tensor_is_computed_alone():
    results = []
    for model in pair():
        seen = []
        model.between = lambda x, m=model, seen=seen: seen.extend([m.k(x.clone()), m.v(x[:1])])
        y = model(inputs())
        results.append([y, *seen])
    assert all(map(torch.equal, *results))
    assert ran(lambda: model(inputs())) == [PACKED] + [LONE] * 5


MODES = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_that_change_between_the_calls(mode):
    """v is then what it is in the new mode."""
    found = []
    for model in pair():

        def between(x, model=model):
            with MODES[mode]():
                found.append(model.v(x))

        model.between = between
        model(inputs())
    alone, together = found
    assert torch.equal(alone, together) and alone.dtype == together.dtype
    assert alone.requires_grad == together.requires_grad
    assert alone.is_inference() == together.is_inference()


def test_a_layer_alone_is_not_in_a_call():
    apart, fused = pair()
    fused(inputs())
    assert ran(lambda: fused.q(inputs())) == [LONE]
    assert torch.equal(fused.k(inputs()), apart.k(inputs()))


@pytest.mark.parametrize("used", ["q", "k", "v"])
def test_gradients_when_one_output_is_used(used):
    """Those of the others are zero, or none."""
    apart, fused = pair()

    def only(model):
        def forward(x):
            projections = {"q": model.q(x), "k": model.k(x), "v": model.v(x)}
            return projections[used]

        model.forward = forward
        return step(model, inputs())

    alone, together = only(apart), only(fused)
    assert ran(lambda: fused(inputs())) == [PACKED]
    for name, grad in together.items():
        assert torch.equal(grad, alone.get(name, torch.zeros_like(grad))), name
    expected = {"y", "x", f"{used}.lora_A", f"{used}.lora_B"}
    assert {name for name, grad in together.items() if grad.any()} == expected


def test_a_layer_that_nothing_trains_gets_no_gradient():
    apart, fused = pair()
    for model in (apart, fused):
        model.k.requires_grad_(False)
    found = []
    for model in (apart, fused):
        model.out.forward = lambda t: t
        model.k.register_forward_hook(lambda m, a, y: None).remove()
        y = model(inputs())
        y.sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_equal(*found)
    assert ran(lambda: fused(inputs())) == [PACKED, LONE]  # k
    assert ran(lambda: fused(inputs().requires_grad_())) == [PACKED]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_call(reentrant, dropout):
    _, fused = pair(dropout=dropout)
    whole = step(fused, inputs())
    again = step(fused, inputs(), forward=lambda x: checkpoint(fused, x, use_reentrant=reentrant))
    assert_equal(whole, again)


def test_dropout_has_one_seed_and_a_mask_for_each():
    apart, fused = pair(dropout=0.5)
    x, found = inputs(), []
    fused.between = lambda x: found.append(fused.k(x))
    q = []
    handle = fused.out.register_forward_pre_hook(lambda m, a: q.append(a[0]))
    torch.manual_seed(7)
    fused(x)
    handle.remove()
    layers = [apart.q, apart.k, apart.v]
    torch.manual_seed(7)
    expected = lk.functional.lora_packed_linear(
        x,
        [m.weight for m in layers],
        [m.lora_A for m in layers],
        [m.lora_B for m in layers],
        scales=[m.scale for m in layers],
        biases=[m.bias for m in layers],
        dropout_p=0.5,
    )
    assert torch.equal(found[0], expected[1])
    torch.manual_seed(7)
    assert torch.equal(apart.q(x), expected[0])  # the first drops what it drops alone
    assert not torch.equal(apart.k(x), expected[1])
    assert torch.equal(fused.eval()(x), apart.eval()(x))


def test_autocast():
    results = []
    for model in pair():
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model(inputs()))
    assert results[0].dtype == torch.bfloat16 and torch.equal(*results)


def test_layers_that_are_wrapped_run_alone():
    """A checkpointed projection has to find its own tensors again."""
    apart, fused = pair()
    for model in (apart, fused):
        model.q, model.k = checkpoint_wrapper(model.q), checkpoint_wrapper(model.k)
    lk.unfuse_projections(fused)
    report = lk.fuse_projections(fused)
    assert report.groups == () and ("k", "is inside a CheckpointWrapper") in report.alone
    assert_equal(step(apart, inputs()), step(fused, inputs()))


def test_dora_and_other_dtypes_run_alone():
    model = attention(use_dora=True)
    assert {why for _, why in lk.fuse_projections(model).alone} == {
        "its adapter has a magnitude (DoRA)",
        "no sibling with an adapter takes the same input",
    }
    assert PACKED not in ran(lambda: model(inputs()))
    model = attention()
    model.v.lora_A.data, model.v.lora_B.data = model.v.lora_A.bfloat16(), model.v.lora_B.bfloat16()
    report = lk.fuse_projections(model)
    assert ("v", "has adapter dtype torch.bfloat16, q has torch.float32") in report.alone
    assert ran(lambda: model(inputs())) == [PACKED, LONE, LONE]


def test_an_error_is_the_layers_own():
    for model in pair():
        with pytest.raises(TypeError, match=r"^weight: got dtype float32, expected float64"):
            model(inputs().double())
        with pytest.raises(TypeError, match=r"x: got .*list"):
            model([1.0])
    assert not open_calls._open.calls
