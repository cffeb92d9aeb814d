"""use_dora=True: what LoRALinear and QLoRALinear do beyond plain LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels.dispatch import use_backend
from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear
from lora_kernels.testing import assert_call_within_budget, assert_within_budget
from tests.nn.dora_layers import (
    MAGNITUDE,
    assert_magnitude_is_the_norm,
    make,
    merged,
    plain,
    plain_args,
)
from tests.nn.layers import KINDS, K, N, R, assert_checkpointing_repeats, dense_weight

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_new_adapter_changes_nothing(kind, dtype):
    linear = nn.Linear(K, N, dtype=dtype)
    layer = KINDS[kind].from_linear(linear, r=R, use_dora=True)
    assert layer.use_dora and layer.lora_magnitude_vector.dtype == torch.float32
    assert_magnitude_is_the_norm(layer)
    x = torch.randn(7, K, dtype=dtype)
    w = dense_weight(layer, dtype)
    with torch.no_grad():
        args = (x, w, layer.bias)
        assert_call_within_budget(lambda *_: layer(x), nn.functional.linear, args)


@kinds
def test_without_the_flag_there_is_no_magnitude(kind):
    layer = KINDS[kind](K, N, r=R)
    assert layer.lora_magnitude_vector is None and not layer.use_dora
    assert MAGNITUDE not in layer.state_dict() and MAGNITUDE not in dict(layer.named_parameters())
    assert "dora" not in repr(layer) and "use_dora=True" in repr(make(kind))


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(K,), (0, K), (1, K), (3, 5, K)])
def test_forward_is_that_of_the_merged_weight(kind, bias, dtype, shape):
    layer = make(kind, dtype, bias)
    x = torch.randn(shape, dtype=dtype)
    # By way of W', as the paper defines it: another order of the same sums.
    assert_call_within_budget(lambda x, *_: layer(x).detach(), plain, plain_args(layer, x))


@kinds
def test_only_the_adapter_trains(kind):
    layer = make(kind)
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    assert names == ["lora_A", "lora_B", MAGNITUDE]
    layer(torch.randn(2, K)).sum().backward()
    assert layer.lora_magnitude_vector.grad is not None and layer.bias.grad is None
    half = make(kind, torch.bfloat16)
    half(torch.randn(2, K).bfloat16()).sum().backward()
    assert half.lora_magnitude_vector.grad.dtype == torch.float32


@kinds
def test_the_scale_follows_alpha(kind):
    layer = make(kind, use_rslora=True)
    x = torch.randn(4, K)
    before = layer(x)
    layer.alpha = 2 * layer.alpha
    assert not torch.equal(layer(x), before)
    assert_call_within_budget(lambda x, *_: layer(x).detach(), plain, plain_args(layer, x))


# --- a weight that changes -----------------------------------------------------------------------


def _in_place(layer):
    if isinstance(layer, LoRALinear):
        layer.weight.mul_(2)
    else:
        layer.absmax.add_(1)


def _unseen(layer):
    """Without a new version, as fused and 8-bit optimisers write."""
    if isinstance(layer, LoRALinear):
        layer.weight.data.mul_(3)
    else:
        layer.packed.data.bitwise_xor_(0x22)


def _other_data(layer):
    if isinstance(layer, LoRALinear):
        layer.weight.data = layer.weight.data * 2
    else:
        layer.packed = layer.packed.clone().bitwise_xor_(0x11)


def _load(layer):
    other = KINDS["lora" if isinstance(layer, LoRALinear) else "qlora"](K, N, r=R, use_dora=True)
    layer.load_state_dict(other.state_dict())


def _assign(layer):
    other = KINDS["lora" if isinstance(layer, LoRALinear) else "qlora"](K, N, r=R, use_dora=True)
    layer.load_state_dict(other.state_dict(), assign=True)


CHANGES = [
    _in_place,
    _unseen,
    _other_data,
    _load,
    _assign,
    lambda m: m.bfloat16(),
    lambda m: m.double(),
]


@kinds
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_seen(kind, change):
    layer = make(kind).eval()
    layer(torch.randn(2, K))
    with torch.no_grad():
        change(layer)
    base = layer.weight.base if isinstance(layer, QLoRALinear) else [layer.weight]
    x = torch.randn(5, K, dtype=layer.lora_A.dtype)
    if base[0].dtype == torch.float64 or x.dtype == torch.float64:
        layer(x)
    else:
        with torch.no_grad(), use_backend("native"):
            y = layer(x)
        assert_call_within_budget(lambda *_: y, plain, plain_args(layer, x))


@kinds
@pytest.mark.parametrize("change", CHANGES[:4])
def test_a_changed_weight_is_seen_in_a_compiled_graph(kind, change):
    layer = make(kind).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, K)
    before = compiled(x).detach()
    with torch.no_grad():
        change(layer)
    after = compiled(x)
    assert torch.equal(after, layer(x)) and not torch.equal(after, before)


def test_a_weight_that_a_fused_optimiser_trains():
    layer = LoRALinear(K, N, r=R, use_dora=True)
    layer.weight.requires_grad_()
    optimiser = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    x = torch.randn(5, K)
    for _ in range(3):
        optimiser.zero_grad()
        layer(x).square().sum().backward()
        optimiser.step()
    assert_call_within_budget(lambda *_: layer(x).detach(), plain, plain_args(layer, x))


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compile(kind, dropout):
    layer = make(kind, torch.bfloat16, dropout=dropout)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 9):
        x = torch.randn(rows, K).bfloat16()
        results = []
        for fn in (layer, compiled):
            layer.zero_grad()
            torch.manual_seed(4)
            y = fn(x)
            y.float().square().sum().backward()
            results.append([y.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_compiled_layer_whose_base_trains_reads_it_each_time():
    layer = make("lora", bias=False)
    layer.weight.requires_grad_(True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, K)
    compiled(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    assert torch.equal(compiled(x), layer(x))


# --- merging --------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merge_and_unmerge(kind, dtype):
    layer = make(kind, dtype).eval()
    x = torch.randn(5, K, dtype=dtype)
    before, y = copy.deepcopy(layer.state_dict()), layer(x)
    layer.merge()
    _, w, a, b, m, _, scale = plain_args(layer, x.float())
    exact = merged(w.double(), a.double(), b.double(), m.double(), scale)
    got = layer._merged_weight
    assert_within_budget(got, exact, merged(w, a, b, m, scale).to(dtype))
    assert torch.equal(layer(x), nn.functional.linear(x, got, layer.bias))
    assert torch.equal(layer.to_linear().weight, got)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer.unmerge()
    assert torch.equal(layer(x), y)


def test_merging_into_4_bits():
    layer = make("qlora").eval()
    weight = layer.merged_weight()
    layer.merge(requantize=True)
    linear = nn.Linear(K, N, bias=False)
    linear.weight = nn.Parameter(weight)
    assert torch.equal(layer._stored("merged_").packed, NF4Linear.from_linear(linear).packed)


@kinds
def test_a_merged_layer_does_not_train(kind):
    layer = make(kind).train()
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    layer.merge()
    with pytest.raises(RuntimeError, match=r"call unmerge\(\)"):
        layer(torch.randn(2, K))
    layer.lora_magnitude_vector.requires_grad_(False)
    layer(torch.randn(2, K))


@kinds
def test_a_row_of_zeros_is_finite(kind):
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight[3:5] = 0
    layer = KINDS[kind].from_linear(linear, r=R, use_dora=True)
    x = torch.randn(4, K)
    layer(x).square().sum().backward()
    for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        assert p.grad.isfinite().all()
    assert layer.lora_B.grad[3].any() and not layer.lora_magnitude_vector.grad[3]
    assert torch.equal(layer.merged_weight()[3], torch.zeros(K))
    with torch.no_grad():
        layer.lora_B[3] = 0.1  # the step that the gradient allows
    layer.zero_grad()
    layer(x).square().sum().backward()
    layer(x).sum().backward()
    assert layer.lora_magnitude_vector.grad[3] != 0  # which now learns as well


# --- training -------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_repeats_the_dropout(kind, reentrant):
    assert_checkpointing_repeats(make(kind, dropout=0.3), reentrant)


@kinds
def test_autocast(kind):
    layer = make(kind)
    x = torch.randn(4, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == layer.lora_magnitude_vector.grad.dtype == torch.float32
    assert layer.lora_magnitude_vector.grad.isfinite().all()


@kinds
def test_it_learns(kind):
    target = nn.Linear(K, N)
    layer = KINDS[kind](K, N, r=R, alpha=8, use_dora=True, dropout=0.1)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(64, K)
    losses = []
    for _ in range(30):
        loss = (layer(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
