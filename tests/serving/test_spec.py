"""What a pool is made from, and what it costs."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.nn import NF4Linear
from lora_kernels.serving import AdapterPool
from tests.adapters.models import LLAMA_LAYERS, llama, mlp
from tests.serving.adapters import SHAPES, make_pool


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_thousand_adapters_use_what_the_arithmetic_says(dtype):
    shapes = {"q": (64, 48), "v": (64, 16)}
    pool = AdapterPool(shapes, slots=1000, pages=1000, max_rank=16, dtype=dtype, device="cpu")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q", "v"]}
    from lora_kernels.integrations.peft import key_of

    state = {}
    for name, (k, n) in shapes.items():
        state |= {key_of(name, "A"): torch.ones(8, k), key_of(name, "B"): torch.ones(n, 8)}
    for i in range(1000):
        pool.load(str(i), state, config)
    stats = pool.stats()
    assert (stats.loaded, stats.pages_used, stats.pages_free) == (1000, 2000, 0)
    pages = 1000 * sum(16 * (k + n) * dtype.itemsize for k, n in shapes.values())
    tables = 2 * 1000 * (4 + 4 + 4)
    assert stats.device_bytes == stats.used_bytes == pages + tables
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for name in shapes
        for t in pool.pages(name)
    }
    assert sum(found.values()) == pages + tables
    assert stats.host_bytes == 1000 * 8 * sum(k + n for k, n in shapes.values()) * dtype.itemsize
    pool.unload("3")
    one = sum(16 * (k + n) * dtype.itemsize for k, n in shapes.values())
    assert pool.stats().used_bytes == pages + tables - one


def test_memory_gives_the_number_of_pages():
    tables = 2 * 3 * (4 * 3 + 8)
    page = sum(16 * (k + n) * 4 for k, n in SHAPES.values())
    pool = make_pool(pages=None, memory=tables + 5 * page + page - 1)
    assert pool.pages("up").a.shape[0] == 5
    assert pool.stats().device_bytes == tables + 5 * page
    with pytest.raises(ValueError, match=rf"memory: got {tables} bytes, expected at least"):
        make_pool(pages=None, memory=tables)


def test_a_pool_of_a_model():
    model = llama(torch.bfloat16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pool = AdapterPool(model, slots=2, pages=4)
    assert len(pool.modules) == LLAMA_LAYERS
    assert pool.modules["model.layers.0.mlp.up_proj"] == (64, 96)
    with pytest.warns(DeprecationWarning, match="AdapterPool.form is now spec"):
        assert pool.form is pool.spec
    assert (pool.spec.dtype, pool.device.type) == (torch.bfloat16, "cpu")
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    pool = AdapterPool(model, slots=2, pages=4, target_modules=["q_proj", "lm_head"])
    assert list(pool.modules)[-1] == "lm_head" and len(pool.modules) == 3
    layers = mlp()
    layers.up = NF4Linear.from_linear(layers.up)
    assert AdapterPool(layers, slots=1, pages=1).modules["up"] == (64, 96)


def test_bitsandbytes_layers_count_by_their_features():
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    layers = mlp()
    layers.up = bnb.nn.Linear4bit(64, 96, quant_type="nf4")
    pool = AdapterPool(layers, slots=1, pages=1)
    assert pool.modules["up"] == (64, 96)


BAD_POOLS = {
    "slots: got 0": {"slots": 0},
    "slots: got True": {"slots": True},
    "pages: got None and memory=None": {"pages": None},
    "pages: got 6 and memory=1000": {"memory": 1000},
    "pages: got 0": {"pages": 0},
    "max_rank: got 0": {"max_rank": 0},
    "max_rank: got 2.5": {"max_rank": 2.5},
    "dtype: got dtype int8": {"dtype": torch.int8},
    "device: got meta": {"device": "meta"},
    "host_bytes: got -1": {"host_bytes": -1},
}


@pytest.mark.parametrize("message", BAD_POOLS)
def test_bad_options_are_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        make_pool(**BAD_POOLS[message])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, "model: got no module"),
        ({"a": (3,)}, r"model\['a'\]: got \(3,\)"),
        ({"a": (3, 0)}, "a.out_features: got 0"),
        ({"": (3, 3)}, "model: got '' as a module's name"),
        ([("a", 3)], "model: got list"),
    ],
)
def test_bad_shapes_are_named(shapes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AdapterPool(shapes, slots=1, pages=1)
