"""The table of layer kinds: every kind is told from the others, and says what its layer holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_kernels.adapters import apply_lora
from lora_kernels.adapters.layer_kinds import KINDS, LayerKind, kind_of
from lora_kernels.adapters.layers import get_module
from lora_kernels.nn import LoRALinear, NF4Linear, QLoRALinear
from lora_kernels.nn.multi_lora_training import RouteHolder, TrainableMultiLoRALinear
from lora_kernels.serving import AdapterPool, attach_pool
from tests.adapters.models import llama, mlp


class Head(nn.Linear):
    """A subclass without a forward of its own."""


def linear4bit() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return bnb.nn.Linear4bit(64, 32, quant_type="nf4")


def conv1d() -> nn.Module:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is missing")
    return utils.Conv1D(32, 64)


def with_rows(name: str) -> nn.Module:
    model = llama(tie_word_embeddings=True)
    apply_lora(model, r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    return get_module(model, name)


def pooled(name: str) -> nn.Module:
    model = llama()
    pool = AdapterPool(model, slots=1, pages=1, target_modules=["q_proj", "embed_tokens"])
    attach_pool(model, pool)
    return get_module(model, name)


def in_training() -> nn.Module:
    return TrainableMultiLoRALinear(nn.Linear(64, 32), 1, RouteHolder(), "up")


EXAMPLES = {
    "Dense": lambda: Head(64, 32),
    "NF4": lambda: NF4Linear(64, 32),
    "Linear4bit": linear4bit,
    "Adapted": lambda: LoRALinear(64, 32, r=2),
    "Adapted4bit": lambda: QLoRALinear(64, 32, r=2),
    "Pooled": lambda: pooled("model.layers.0.self_attn.q_proj"),
    "Pooled embedding": lambda: pooled("model.embed_tokens"),
    "InTraining": in_training,
    "TokenLinear": lambda: with_rows("lm_head"),
    "TokenEmbedding": lambda: with_rows("model.embed_tokens"),
    "Conv1D": conv1d,
    "Embedding": lambda: nn.Embedding(8, 4),
    "LayerKind": mlp,
}


def test_every_kind_has_an_example():
    named = {name.split()[0] for name in EXAMPLES}
    assert named == {type(kind).__name__ for kind in KINDS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_layer_is_of_its_kind(name):
    layer = EXAMPLES[name]()
    kind = kind_of(layer)
    assert type(kind).__name__ == name.split()[0]
    ours = type(layer).__module__.startswith("lora_kernels")
    assert kind.ours == ours
    assert kind.linear == (isinstance(layer, nn.Linear | NF4Linear))
    assert kind.embedding == isinstance(layer, nn.Embedding)
    assert kind.adapted == hasattr(layer, "lora_A")
    assert kind.trains_rows == hasattr(layer, "trainable_tokens_delta")


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_kind_takes_is_what_it_does_not_refuse(name):
    """A layer without a refusal gets an adapter; any other raises and stays what it was."""
    layer = EXAMPLES[name]()
    kind = kind_of(layer)
    options = {"r": 2, "alpha": 4}
    if kind.refusal(layer) is None:
        kind.check(layer, quantize=False)
        adapted = kind.with_adapter(layer, options, {})
        assert kind_of(adapted).adapted and kind_of(adapted).four_bit == kind.four_bit
        base = kind_of(adapted).base_layer(adapted)
        assert kind_of(base).linear and not kind_of(base).adapted
        assert kind_of(base).features(base) == (64, 32)
    else:
        before = type(layer), dict(layer.state_dict(keep_vars=True))
        with pytest.raises((TypeError, ValueError)):
            kind.check(layer, quantize=False)
        after = dict(layer.state_dict(keep_vars=True))
        assert (type(layer), after.keys()) == (before[0], before[1].keys())


@pytest.mark.parametrize("name", ["Dense", "NF4", "Adapted", "Adapted4bit"])
def test_elements_are_counted_once(name):
    layer = EXAMPLES[name]()
    kind = kind_of(layer)
    weight = layer._parameters.get("weight")
    stored = 0 if weight is None else weight.numel()
    assert stored + kind.uncounted_elements(layer) == 64 * 32
    own = kind.own_weights(layer)
    assert own["weight"].shape == (32, 64) and own["weight"].is_floating_point()
    assert own.keys() == {"weight", "bias"}


def test_a_module_of_no_kind():
    kind = kind_of(nn.ReLU())
    assert type(kind) is LayerKind
    assert kind.refusal(nn.ReLU()) == "is a ReLU, not torch.nn.Linear"
    assert kind.own_weights(nn.ReLU()) == {} and not list(kind.uncounted_tensors(nn.ReLU()))
    with pytest.raises(TypeError, match="layer: is a ReLU"):
        kind.with_adapter(nn.ReLU(), {}, {})
    with pytest.raises(TypeError, match="layer: got ReLU, expected a dense linear layer"):
        kind.to_nf4(nn.ReLU(), {})


@pytest.mark.parametrize("name", ["Adapted", "Adapted4bit"])
@pytest.mark.parametrize("requantize", [False, True])
def test_a_merged_layer_has_no_adapter(name, requantize):
    layer = EXAMPLES[name]()
    with torch.no_grad():
        layer.lora_B.normal_()
    merged = kind_of(layer).merged_layer(layer, requantize=requantize)
    expected = NF4Linear if requantize and name == "Adapted4bit" else nn.Linear
    assert type(merged) is expected
