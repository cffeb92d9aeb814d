"""LoRAQKV, LoRAGateUp and LoRAMLP against their layers called one by one, and when they do that."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels import functional as F
from lora_kernels.nn import LoRALinear, QLoRALinear
from lora_kernels.testing import assert_within_budget

K, INNER = 40, 24
SIZES = {
    "qkv": {"q_proj": (K, 64), "k_proj": (K, 24), "v_proj": (K, 8)},
    "gate-up": {"gate_proj": (K, INNER), "up_proj": (K, INNER)},
    "mlp": {"gate_proj": (K, INNER), "up_proj": (K, INNER), "down_proj": (INNER, 10)},
}
CLASSES = {"qkv": lk.LoRAQKV, "gate-up": lk.LoRAGateUp, "mlp": lk.LoRAMLP}
RANKS = (1, 3, 16)
BASES = ("lora", "qlora", "mixed")
packs = pytest.mark.parametrize("pack", CLASSES)
bases = pytest.mark.parametrize("base", BASES)


def make_layers(pack, base="lora", dtype=torch.float32, **options):
    made = {}
    for i, (name, (k, n)) in enumerate(SIZES[pack].items()):
        cls = QLoRALinear if base == "qlora" or (base == "mixed" and i == 1) else LoRALinear
        linear = nn.Linear(k, n, bias=i != 1, dtype=dtype)
        made[name] = cls.from_linear(linear, r=RANKS[i], alpha=8 + i, **options)
        nn.init.normal_(made[name].lora_B, std=0.3)
    return made


def make(pack, base="lora", dtype=torch.float32, **options):
    return CLASSES[pack].from_layers(**make_layers(pack, base, dtype, **options))


def one_by_one(module, x):
    layers = [layer for _, layer in module.named_children()]
    if isinstance(module, lk.LoRAMLP):
        gate, up, down = layers
        return (down(F.gated_activation(gate(x), up(x), module.activation)),)
    return tuple(layer(x) for layer in layers)


def outputs(y):
    return (y,) if isinstance(y, torch.Tensor) else y


def step(fn, module, x):
    """Outputs and the gradients of x and of every adapter."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = outputs(fn(x))
    sum(v.float().square().sum() for v in y).backward()
    adapters = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
    return {f"y{i}": v.detach() for i, v in enumerate(y)} | {"x": x.grad} | adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@bases
@packs
def test_is_the_layers_one_by_one(pack, base, dtype):
    """The outputs bit for bit; a gradient of x is summed in another order, so through the budget,
    with the layers in fp64 for an oracle."""
    module = make(pack, base, dtype)
    assert module.why_not_packed() is None
    x = torch.randn(2, 33, K, dtype=dtype)
    packed = step(module, module, x)
    apart = step(lambda x: one_by_one(module, x), module, x)
    for name in packed:
        if name.startswith("y"):
            assert torch.equal(packed[name], apart[name]), name
        else:
            assert packed[name].dtype == apart[name].dtype
    wide = copy.deepcopy(module).double()
    for (_, layer), (_, exact) in zip(module.named_children(), wide.named_children(), strict=True):
        if isinstance(layer, QLoRALinear):  # its weight is decoded to x's dtype, then rounded
            dense = LoRALinear(layer.in_features, layer.out_features, layer.bias is not None, r=1)
            dense.weight = nn.Parameter(layer.weight.dequantize(dtype).double(), False)
            for name in ("bias", "lora_A", "lora_B"):
                setattr(dense, name, getattr(exact, name))
            dense.r, dense.alpha = exact.r, exact.alpha
            setattr(wide, _, dense)
    oracle = step(lambda x: one_by_one(wide, x), wide, x.double())
    for name in packed:
        assert_within_budget(packed[name], oracle[name], apart[name], name)


@packs
def test_training_draws_one_seed_and_a_mask_for_each_layer(pack):
    module = make(pack, dropout=0.5)
    x = torch.randn(6, K)
    torch.manual_seed(3)
    y = outputs(module(x))
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64)
    layers = [layer for _, layer in module.named_children()]
    arguments = (
        [layer.weight for layer in layers],
        [layer.lora_A for layer in layers],
        [layer.lora_B for layer in layers],
    )
    options = {
        "scales": [layer.scale for layer in layers],
        "biases": [layer.bias for layer in layers],
        "dropout_p": 0.5,
        "seed": seed,
    }
    fn = F.lora_mlp if pack == "mlp" else F.lora_packed_linear
    assert all(map(torch.equal, y, outputs(fn(x, *arguments, **options))))
    # Stream 0 is that of a layer on its own, which draws the same seed.
    if pack != "mlp":
        torch.manual_seed(3)
        assert torch.equal(layers[0](x), y[0])
    module.eval()
    assert all(map(torch.equal, outputs(module(x)), one_by_one(module, x)))
    assert not torch.equal(outputs(module(x))[0], y[0])


@bases
@packs
def test_state_dict_is_the_layers_own(pack, base):
    """A checkpoint of a model with the layers under the same names loads, and the other way."""
    layers = make_layers(pack, base)
    module = CLASSES[pack].from_layers(**layers)
    apart = nn.ModuleDict(make_layers(pack, base))
    assert list(module.state_dict()) == list(apart.state_dict())
    apart.load_state_dict(module.state_dict())
    x = torch.randn(3, K)
    other = CLASSES[pack].from_layers(**dict(apart.items()))
    assert all(map(torch.equal, outputs(other(x)), outputs(module(x))))
    for name, layer in layers.items():
        assert getattr(module, name) is layer


REASONS = {
    "disabled": (lambda m: setattr(m, "adapter_enabled", False), "its adapter is disabled"),
    "merged": (lambda m: m.merge(), "its adapter is merged"),
    "dropout": (lambda m: setattr(m, "dropout", 0.5), "has dropout 0.5, {first} has 0.0"),
    "mode": (lambda m: m.train(), "has training True, {first} has False"),
    "hook": (lambda m: m.register_forward_hook(lambda *_: None), "has hooks"),
    "patched": (lambda m: setattr(m, "forward", m._base_forward), "has a forward of its own"),
}


@pytest.mark.parametrize("why", REASONS)
@pytest.mark.parametrize("base", ["lora", "qlora"])
@packs
def test_calls_the_layers_one_by_one_and_says_why(pack, base, why):
    module = make(pack, base).eval()
    change, says = REASONS[why]
    first = next(iter(SIZES[pack]))
    change(module.up_proj if pack != "qkv" else module.k_proj)
    changed = "k_proj" if pack == "qkv" else "up_proj"
    expected = f"{changed}: {says.format(first=first)}"
    assert module.why_not_packed() == expected
    assert f"not packed: {expected}" in repr(module)
    x = torch.randn(3, K)
    ran = [e.op for e in lk.explain(lambda: module(x))]
    assert "lora_packed_fwd" not in ran
    module.eval()
    assert all(map(torch.equal, outputs(module(x)), one_by_one(module, x)))


@packs
def test_packs_again_once_the_reason_is_gone(pack):
    module = make(pack).eval()
    layer = next(iter(module.children()))
    layer.merge()
    assert "merged" in module.why_not_packed()
    layer.unmerge()
    assert module.why_not_packed() is None and "packed" in repr(module)
    (ran, *_) = [e.op for e in lk.explain(lambda: module(torch.randn(3, K)))]
    assert ran == "lora_packed_fwd"


def test_other_dtypes_and_layers_are_not_packed():
    layers = make_layers("qkv")
    layers["v_proj"] = LoRALinear(K, 8, r=2, adapter_dtype=torch.bfloat16)
    module = lk.LoRAQKV.from_layers(**layers)
    assert module.why_not_packed() == (
        "v_proj: has adapter dtype torch.bfloat16, q_proj has torch.float32"
    )
    module.v_proj = LoRALinear(K, 8, r=2, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    assert module.why_not_packed() == (
        "v_proj: has base dtype torch.bfloat16, q_proj has torch.float32"
    )
    module.v_proj = LoRALinear(K, 8, r=2, use_dora=True)
    assert module.why_not_packed() == "v_proj: its adapter has a magnitude (DoRA)"
    module.v_proj = nn.Linear(K, 8)
    says = "v_proj: is a Linear, expected LoRALinear or QLoRALinear"
    assert module.why_not_packed() == says
    x = torch.randn(3, K)
    assert torch.equal(module(x)[2], module.v_proj(x))


@bases
@packs
def test_copies_are_equal_and_apart(pack, base):
    module = make(pack, base).eval()
    x = torch.randn(3, K)
    y = outputs(module(x))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, outputs(other(x)), y))
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert all(map(torch.equal, outputs(module(x)), y))


@packs
def test_evaluation_between_steps_changes_nothing(pack):
    module = make(pack, "qlora")
    x = torch.randn(4, K)
    before = step(module, module, x)
    module.eval()
    with torch.inference_mode():
        module(x)
    module.train()
    after = step(module, module, x)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("base", ["lora", "qlora"])
@packs
def test_compile(pack, base):
    """Whole graphs; dropout's seed is drawn inside."""
    module = make(pack, base, dropout=0.3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    step(compiled, module, torch.randn(29, K))
    # Dynamo compiles the first call twice, as for one layer: it takes alpha for a variable first.
    frames = counter.frame_count
    for rows in (37, 51, 43):
        x = torch.randn(rows, K)
        results = []
        for fn in (module, compiled):
            torch.manual_seed(5)
            results.append(step(fn, module, x))
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert counter.frame_count == frames


@pytest.mark.parametrize("reentrant", [False, True])
@packs
def test_checkpointing_repeats_the_dropout(pack, reentrant):
    module = make(pack, dropout=0.3)
    x = torch.randn(5, K)
    results = []
    for fn in (module, lambda x: checkpoint(module, x, use_reentrant=reentrant)):
        torch.manual_seed(7)
        results.append(step(fn, module, x))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_activations(activation):
    module = lk.LoRAMLP.from_layers(**make_layers("mlp"), activation=activation).eval()
    x = torch.randn(3, K)
    assert torch.equal(module(x), one_by_one(module, x)[0])
    assert f"activation={activation}" in repr(module)


@pytest.mark.parametrize("base", ["lora", "qlora"])
@packs
def test_autocast(pack, base):
    module = make(pack, base)
    with torch.autocast("cpu", torch.bfloat16):
        result = step(module, module, torch.randn(4, K))
    assert {v.dtype for n, v in result.items() if n.startswith("y")} == {torch.bfloat16}
    assert {v.dtype for n, v in result.items() if not n.startswith("y")} == {torch.float32}


def test_bad_layers():
    layers = make_layers("qkv")
    with pytest.raises(TypeError, match=r"^k_proj: got Linear, expected LoRALinear or QLoRALinear"):
        lk.LoRAQKV.from_layers(**layers | {"k_proj": nn.Linear(K, 4)})
    with pytest.raises(ValueError, match=r"^v_proj: has in_features 4, expected 40 as q_proj"):
        lk.LoRAQKV.from_layers(**layers | {"v_proj": LoRALinear(4, 8)})
    with pytest.raises(ValueError, match=r"^layers: got 0, expected 3: q_proj, k_proj, v_proj"):
        lk.LoRAQKV()
    mlp = make_layers("mlp")
    with pytest.raises(ValueError, match=r"^up_proj: has out_features 8, expected 24 as gate_proj"):
        lk.LoRAMLP.from_layers(**mlp | {"up_proj": LoRALinear(K, 8)})
    with pytest.raises(ValueError, match=r"^down_proj: has in_features 8, expected 24 as gate_"):
        lk.LoRAMLP.from_layers(**mlp | {"down_proj": LoRALinear(8, K)})
    with pytest.raises(ValueError, match="activation: got 'relu'"):
        lk.LoRAMLP.from_layers(**mlp, activation="relu")
