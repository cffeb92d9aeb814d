"""MultiLoRALinear and the routes it follows."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lora_kernels import NF4Weight, apply_lora
from lora_kernels.nn import NF4Linear
from lora_kernels.serving import (
    AdapterPool,
    MultiLoRALinear,
    attach_pool,
    attached_pool,
    detach_pool,
)
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama, logits, mlp
from tests.serving.adapters import SHAPES, adapter, contribution, make_pool

K, N = SHAPES["up"]
SCALES = {"a": 2.0, "b": 6 / 17}


def loaded(**options) -> AdapterPool:
    pool = make_pool(**options)
    pool.load("a", *adapter(1))
    pool.load("b", *adapter(2, r=17))
    return pool


STATES = {"a": adapter(1)[0], "b": adapter(2, r=17)[0]}


def base_layer(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    linear = nn.Linear(K, N, bias=kind != "no bias").to(dtype)
    if kind == "nf4":
        return NF4Linear.from_linear(linear, double_quant=False)
    if kind == "bitsandbytes":
        bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
        layer = bnb.nn.Linear4bit(K, N, quant_type="nf4", compute_dtype=dtype)
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu").train()  # in eval mode it repacks its weight
    return linear


bases = pytest.mark.parametrize("kind", ["dense", "no bias", "nf4", "bitsandbytes"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@bases
@dtypes
@pytest.mark.parametrize("grad", [False, True])
def test_each_row_has_its_own_adapter(kind, dtype, grad):
    base = base_layer(kind, dtype).requires_grad_(False)
    pool = loaded()
    layer = MultiLoRALinear(base, pool, "up")
    rows = ["b", None, "a", "b", ""]
    x = torch.randn(5, 4, K, dtype=dtype).requires_grad_(grad)
    alone = base(x)
    assert torch.equal(layer(x), alone)  # no route
    with pool.route(rows):
        y = layer(x)
    assert y.dtype == dtype and y.requires_grad == grad
    assert torch.equal(y[[1, 4]], alone[[1, 4]])
    weight = getattr(base, "weight", None)
    if kind == "bitsandbytes":
        from lora_kernels.integrations.bitsandbytes import weight_from_linear4bit

        weight = weight_from_linear4bit(base)
    if isinstance(weight, NF4Weight):
        weight = weight.dequantize(dtype)

    def expression(dtype):
        bias = None if base.bias is None else base.bias.to(dtype)
        y = F.linear(x.detach().to(dtype), weight.to(dtype), bias)
        for i, name in enumerate(rows):
            if name:
                y[i] += contribution(x[i].detach(), "up", STATES[name], SCALES[name], dtype)
        return y

    assert_within_budget(y.detach(), expression(torch.float64), expression(dtype))


def test_gradients_flow_through_the_adapters():
    pool = loaded()
    layer = MultiLoRALinear(nn.Linear(K, N).requires_grad_(False), pool, "up")
    x = torch.randn(2, K, requires_grad=True)
    with pool.route(["a", None]):
        layer(x).sum().backward()
    a, b = (STATES["a"][k] for k in STATES["a"] if ".up." in k)
    weight = layer.weight + torch.stack([2.0 * b @ a, torch.zeros(N, K)])
    assert_within_budget(x.grad, weight.double().sum(1), weight.sum(1))


def test_shapes_of_slots():
    pool = loaded()
    layer = MultiLoRALinear(nn.Linear(K, N), pool, "up").requires_grad_(False)
    x = torch.randn(2, 3, K)
    per_token = torch.tensor([[0, -1, 1], [1, 1, 0]], dtype=torch.int32)
    with pool.route(per_token):
        y = layer(x)
        assert torch.equal(layer(x.view(6, K)), y.view(6, N))  # folded
        with pytest.raises(ValueError, match=r"up: slots: got shape \[2, 3\], expected \[3, 2\]"):
            layer(x.transpose(0, 1))
    with pool.route(per_token.view(-1)):
        assert torch.equal(layer(x), y)
    with pool.route(["a", "b"]):
        assert layer(x).shape == (2, 3, N) and layer(x[:, :0]).shape == (2, 0, N)
        assert layer(x[:, 0]).shape == (2, N)
        with pytest.raises(ValueError, match=r"got shape \[2\], expected \[6\].*for each token"):
            layer(x.view(6, K))
        with pytest.raises(ValueError, match=r"got shape \[2\], expected \[1, 3\]"):
            layer(x[:1])
        with pytest.raises(ValueError, match=r"got shape \[2\], expected \[\]"):
            layer(x[0, 0])
    with pool.route([]):
        assert layer(x[:0]).shape == (0, 3, N)


def test_autocast():
    pool = loaded()
    layer = MultiLoRALinear(nn.Linear(K, N), pool, "up").requires_grad_(False)
    x = torch.randn(3, K)
    with torch.autocast("cpu", torch.bfloat16), pool.route(["a", None, "b"]):
        y, alone = layer(x), layer.base(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[1], alone[1]) and not torch.equal(y[[0, 2]], alone[[0, 2]])


def test_an_inner_route_hides_the_outer_one_until_it_ends():
    pool, other = loaded(), loaded()
    with pool.route(["a"]) as outer:
        with pool.route(["b"]) as inner:
            assert pool.active_slots() is inner
            assert other.active_slots() is None
        with pool.route([None]):
            assert pool.active_slots() is None  # its layers are their bases, at no cost
        assert pool.active_slots() is outer
    assert pool.active_slots() is None


def test_threads_and_tasks_do_not_see_each_others_routes():
    pool = loaded()
    with pool.route(["a"]), ThreadPoolExecutor(1) as executor:
        assert executor.submit(pool.active_slots).result() is None

    async def task(name: str) -> list[int]:
        with pool.route([name]):
            await asyncio.sleep(0)
            return pool.active_slots().tolist()

    async def both() -> list[list[int]]:
        return await asyncio.gather(task("a"), task("b"))

    assert asyncio.run(both()) == [[0], [1]]


def test_attach_and_detach():
    model = llama()
    keys, plain = list(model.state_dict()), logits(model)
    pool = AdapterPool(model, slots=1, pages=1, target_modules=["q_proj", "up_proj"])
    names = attach_pool(model, pool)
    assert names == tuple(pool.modules) and len(names) == 4
    layer = model.get_submodule(names[0])
    assert isinstance(layer, MultiLoRALinear) and attached_pool(model) is pool
    assert layer.weight is layer.base.weight and layer.bias is None
    assert "name='model.layers.0.self_attn.q_proj'" in repr(layer)
    assert torch.equal(logits(model), plain)
    twin = copy.deepcopy(model)
    assert attached_pool(twin) is pool
    for again in (lambda: attach_pool(model, pool), lambda: AdapterPool(model, slots=1, pages=1)):
        with pytest.raises(ValueError, match=r"q_proj has a pool already; serving.detach_pool"):
            again()
    assert detach_pool(model) == names
    assert list(model.state_dict()) == keys and torch.equal(logits(model), plain)
    assert detach_pool(model) == ()
    with pytest.raises(ValueError, match="has no pool; call attach_pool first"):
        attached_pool(model)


def test_a_layer_in_two_places_is_one():
    model = mlp()
    model.twin = model.up
    pool = AdapterPool(model, slots=1, pages=1, target_modules=["up"])
    attach_pool(model, pool)
    assert model.twin is model.up and isinstance(model.up, MultiLoRALinear)
    detach_pool(model)
    assert model.twin is model.up and type(model.up) is nn.Linear


def test_attach_says_what_does_not_fit():
    def pool_of(shapes):
        return AdapterPool(shapes, slots=1, pages=1, device="cpu")

    model = mlp()
    for shapes, message in (
        ({"up": (64, 96), "x": (64, 96)}, "model: has no layer 'x'"),
        ({"x": (64, 96)}, "target_modules: 'x' matches no layer"),
        ({"down": (96, 64), "up": (64, 95)}, "up: has in_features=64, out_features=96, the pool's"),
    ):
        with pytest.raises(ValueError, match=message):
            attach_pool(model, pool_of(shapes))
    with pytest.raises(ValueError, match=r"up: is on meta, the pool's pages are on cpu"):
        attach_pool(mlp().to("meta"), pool_of({"up": (64, 96)}))
    adapted = mlp()
    apply_lora(adapted, r=2)
    for call in (
        lambda: attach_pool(adapted, pool_of({"up": (64, 96)})),
        lambda: AdapterPool(adapted, slots=1, pages=1),
    ):
        with pytest.raises(ValueError, match="model: Mlp has adapters on 3 layers already"):
            call()
    encoder = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16))
    with pytest.raises(ValueError, match=r"nn.TransformerEncoderLayer reads its layers' weights"):
        attach_pool(encoder, pool_of({"0.linear1": (8, 16)}))
    assert not any(isinstance(m, MultiLoRALinear) for m in (*model.modules(), *encoder.modules()))


def test_compiled_layers_follow_the_route():
    pool = loaded()
    layer = MultiLoRALinear(nn.Linear(K, N), pool, "up").requires_grad_(False)
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(2, K)
    for rows in (["a", None], ["b", "a"], ["a", "b"]):
        with pool.route(rows):
            assert torch.equal(compiled(x), layer(x))
        assert torch.equal(compiled(x), layer.base(x))
