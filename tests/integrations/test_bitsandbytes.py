"""4-bit layers go to bitsandbytes and come back from it, byte for byte."""

from __future__ import annotations

import gc
import weakref

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from lora_kernels.adapters import adapter_layers, apply_lora
from lora_kernels.integrations.bitsandbytes import to_linear4bit, weight_from_quant_state
from lora_kernels.nn import NF4Linear, QLoRALinear
from tests.adapters.models import LLAMA_LAYERS, llama, logits

K, N = 128, 64
FORMATS = [
    pytest.param(quant_type, nested, storage, id=f"{quant_type}-{nested}-{storage}")
    for quant_type in ("nf4", "fp4")
    for nested in (True, False)
    for storage in (torch.uint8, torch.bfloat16, torch.float32)
]
formats = pytest.mark.parametrize(("quant_type", "nested", "storage"), FORMATS)


def linear4bit(quant_type="nf4", nested=True, storage=torch.uint8, quantise=True, bias=True):
    torch.manual_seed(0)
    dense = nn.Linear(K, N, bias=bias)
    layer = bnb.nn.Linear4bit(
        K,
        N,
        bias=bias,
        compute_dtype=torch.float32,
        compress_statistics=nested,
        quant_type=quant_type,
        quant_storage=storage,
    )
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu") if quantise else layer


def decoded(layer: nn.Module) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@formats
@pytest.mark.parametrize("cls", [NF4Linear, QLoRALinear])
def test_from_linear4bit(cls, quant_type, nested, storage):
    theirs = linear4bit(quant_type, nested, storage)
    layer = cls.from_linear4bit(theirs)
    assert layer.bias is theirs.bias and not layer.bias.requires_grad
    weight = layer.weight
    assert (weight.quant_type, weight.is_nested, weight.dtype) == (
        quant_type,
        nested,
        torch.float32,
    )
    assert weight.packed.data_ptr() == theirs.weight.data_ptr()
    assert torch.equal(weight.dequantize(), decoded(theirs))


@formats
def test_to_linear4bit(quant_type, nested, storage):
    ours = NF4Linear.from_linear(
        nn.Linear(K, N).bfloat16(), quant_type=quant_type, double_quant=nested
    )
    theirs = to_linear4bit(ours, torch.bfloat16, storage)
    assert theirs.weight.dtype == storage and theirs.bias is ours.bias
    assert theirs.weight.data_ptr() == ours.packed.data_ptr()
    assert torch.equal(decoded(theirs), ours.weight.dequantize())
    back = NF4Linear.from_linear4bit(theirs).weight
    for name, t in ours.weight.tensors().items():
        assert torch.equal(t, back.tensors()[name]), name
    x = torch.randn(3, K, dtype=torch.bfloat16, requires_grad=True)
    assert theirs.train()(x).shape == (3, N)


@formats
def test_our_state_dict_is_read_by_bitsandbytes(quant_type, nested, storage):
    ours = QLoRALinear.from_linear(nn.Linear(K, N), quant_type=quant_type, double_quant=nested)
    state = ours.state_dict()
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k.startswith("weight.")}
    data = state["weight"].view(-1).view(storage).view(-1, 1)
    theirs = bnb.nn.Params4bit.from_prequantized(data, stats, device="cpu")
    assert torch.equal(
        bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), ours.weight.dequantize()
    )


@formats
def test_their_state_dict_is_read_by_us(quant_type, nested, storage):
    theirs = linear4bit(quant_type, nested, storage)
    ours = NF4Linear(K, N)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight.dequantize(), decoded(theirs))
    assert torch.equal(ours.bias, theirs.bias)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    adapted = QLoRALinear(K, N)
    adapted.load_state_dict(theirs.state_dict())
    assert torch.equal(adapted.weight.dequantize(), decoded(theirs))


@formats
def test_quantising_gives_their_bytes(quant_type, nested, storage):
    theirs = linear4bit(quant_type, nested, storage).state_dict()
    torch.manual_seed(0)
    ours = NF4Linear.from_linear(
        nn.Linear(K, N), quant_type=quant_type, double_quant=nested
    ).state_dict()
    assert torch.equal(ours["weight"].view(-1), theirs["weight"].view(-1).view(torch.uint8))
    if not nested:
        assert torch.equal(ours["weight.absmax"], theirs["weight.absmax"])


def test_a_layer_that_is_not_quantised_yet():
    theirs = linear4bit(quantise=False)
    ours = NF4Linear.from_linear4bit(theirs)
    assert torch.equal(ours.packed, linear4bit().weight.data.view(-1))
    with pytest.raises(ValueError, match="without a quantisation state"):
        NF4Linear.from_linear4bit(bnb.nn.Linear4bit(K, N, device="meta"))


def test_a_repacked_layer_is_refused():
    theirs = linear4bit()
    # What bitsandbytes does itself in eval mode, on CPUs with AVX512-BF16.
    convert = bnb.functional._convert_weight_packed_for_cpu
    theirs.weight.data, theirs.weight.quant_state = convert(
        theirs.weight.data, theirs.weight.quant_state
    )
    for take in (NF4Linear.from_linear4bit, QLoRALinear.from_linear4bit):
        with pytest.raises(ValueError, match=r"layer.weight: .*repacked it in place"):
            take(theirs)
    model = nn.Sequential(nn.Linear(K, K), theirs)
    with pytest.raises(ValueError, match=r"1.weight: .*repacked it in place"):
        apply_lora(model)
    assert not list(adapter_layers(model))


def test_layers_that_are_not_quantised_yet_are_freed_one_by_one():
    model = nn.Sequential(*(linear4bit(quantise=False) for _ in range(3)))
    alive = [weakref.ref(layer) for layer in model]
    seen = []

    def watch(done: int, total: int, name: str) -> None:
        gc.collect()
        seen.append(sum(ref() is not None for ref in alive))

    apply_lora(model, r=4, progress=watch)
    assert seen == [3, 2, 1, 0]


def test_a_layer_that_cannot_be_converted_is_met_before_any_change():
    model = nn.Sequential(nn.Linear(K, K), linear4bit(), linear4bit(quantise=False))
    layers = list(model)
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"^2: weight: holds 1 non-finite"):
        apply_lora(model, r=4)
    model[2] = layers[2] = bnb.nn.Linear4bit(K, N, quant_type="int4")
    with pytest.raises(ValueError, match=r"^2: quant_type: got 'int4'"):
        apply_lora(model, r=4)
    assert list(model) == layers
    assert all(p.requires_grad for p in model[0].parameters())


def test_what_is_no_4_bit_layer():
    with pytest.raises(TypeError, match=r"got Linear, expected bitsandbytes.nn.Linear4bit"):
        NF4Linear.from_linear4bit(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="got Linear, expected NF4Linear"):
        to_linear4bit(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="from_linear4bit"):
        QLoRALinear.from_linear(linear4bit())
    with pytest.raises(ValueError, match=r"quant_storage: got torch.float32"):
        to_linear4bit(NF4Linear(3, 2, bias=False), quant_storage=torch.float32)


def test_the_results_of_quantize_4bit():
    w = torch.randn(N, K)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    assert torch.equal(
        weight_from_quant_state(packed, state).dequantize(),
        bnb.functional.dequantize_4bit(packed, state),
    )


@pytest.fixture
def loaded_in_4_bits(tmp_path):
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    llama(torch.bfloat16).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )


def test_a_model_that_transformers_loaded_in_4_bits(loaded_in_4_bits, tmp_path):
    model = loaded_in_4_bits
    dense = sum(p.numel() for p in llama().parameters())
    up = decoded(model.model.layers[0].mlp.up_proj)
    report = apply_lora(model, r=4, target_modules=["q_proj", "v_proj"])
    assert len(report.modules) == 4
    kinds = [type(m) for m in model.modules() if isinstance(m, NF4Linear)]
    assert kinds.count(QLoRALinear) == 4 and kinds.count(NF4Linear) == LLAMA_LAYERS - 4
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight.dequantize(), up)
    assert report.total_parameters == dense + report.trainable_parameters
    for mark in ("is_quantized", "hf_quantizer", "is_loaded_in_4bit"):
        assert not getattr(model, mark, False), mark
    assert not hasattr(model.config, "quantization_config")
    ours = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    apply_lora(ours, r=4, target_modules=["q_proj", "v_proj"], quantize="nf4")
    assert torch.equal(logits(model), logits(ours))


def test_gradients_after_eval(loaded_in_4_bits):
    """bitsandbytes itself loses them on a CPU."""
    model = loaded_in_4_bits
    apply_lora(model, r=4)
    model.eval()
    logits(model)
    model.train()
    embeddings = torch.randn(1, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    model(inputs_embeds=embeddings).logits.float().sum().backward()
    assert embeddings.grad is not None and embeddings.grad.any()
    assert all(layer.lora_B.grad is not None for _, layer in adapter_layers(model))


def test_excluded_layers_stay_theirs(loaded_in_4_bits):
    model = loaded_in_4_bits
    apply_lora(model, r=4, target_modules=["q_proj"], exclude_modules=["down_proj"])
    assert type(model.model.layers[0].mlp.down_proj) is bnb.nn.Linear4bit
    assert type(model.model.layers[0].mlp.up_proj) is NF4Linear
    assert model.is_quantized
