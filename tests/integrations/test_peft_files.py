"""Files that PEFT writes and loads: an adapted output layer, names that nothing answers to, ..."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lora_kernels.adapters import apply_lora, load_adapter, quantize_model, save_adapter, unload
from lora_kernels.serving import AdapterPool, attach_pool
from lora_kernels.testing import assert_within_budget
from tests.adapters.heads import learn
from tests.adapters.models import llama, logits, tokens

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.model.lm_head.base_layer.weight"
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:Setting `save_emb")
ties = pytest.mark.parametrize("tied", [False, True])


def saved(folder: Path, *, tied: bool = False, base=None, dtype=torch.float32, **options):
    """What PEFT saves, and its model."""
    base = llama(dtype, tie_word_embeddings=tied) if base is None else base
    config = LoraConfig(r=4, **{"target_modules": ["q_proj", "lm_head"]} | options)
    theirs = learn(get_peft_model(base, config).eval())
    theirs.save_pretrained(folder)
    return theirs


def assert_like(ours: nn.Module, theirs: nn.Module) -> None:
    assert_within_budget(logits(ours), logits(copy.deepcopy(theirs).double()), logits(theirs))


def edit(folder: Path, **changes: object) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@ties
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_output_layer(tmp_path, tied, dtype, dora):
    theirs = saved(tmp_path, tied=tied, dtype=dtype, use_dora=dora)
    assert BASE in load_file(tmp_path / WEIGHTS)
    model = llama(dtype, tie_word_embeddings=tied)
    result = load_adapter(model, tmp_path)
    assert_like(model, theirs)
    assert result.base_weights == ("lm_head.weight",) and not result.unexpected_keys
    again = llama(dtype, tie_word_embeddings=tied)
    options = {"target_modules": ["q_proj", "lm_head"], "exclude_modules": [], "use_dora": dora}
    apply_lora(again, r=4, alpha=8, **options)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    save_adapter(model, tmp_path / "ours")
    back = PeftModel.from_pretrained(llama(dtype, tie_word_embeddings=tied), tmp_path / "ours")
    assert_like(model, back)


@ties
def test_an_output_layer_of_another_base(tmp_path, tied):
    """PEFT puts the file's own weight in."""
    base = llama(tie_word_embeddings=tied)
    with torch.no_grad():
        base.lm_head.weight.add_(torch.randn_like(base.lm_head.weight), alpha=0.1)
    saved(tmp_path, base=base)
    theirs = PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path)
    model = llama(tie_word_embeddings=tied)
    load_adapter(model, tmp_path)
    assert_like(model, theirs)
    pool = AdapterPool(llama(), slots=1, pages=1, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"base_layer.weight: is not the weight of the pool's"):
        pool.load("a", tmp_path)


def test_an_output_layer_in_4_bits(tmp_path):
    theirs = saved(tmp_path)
    model = llama()
    load_adapter(model, tmp_path, quantize="nf4")
    expected = logits(model)
    again = llama()
    quantize_model(again, exclude_modules=())
    options = {"target_modules": ["q_proj", "lm_head"], "exclude_modules": [], "quantize": "nf4"}
    apply_lora(again, r=4, alpha=8, **options)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[BASE] = tensors[BASE] * 1.5
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"base_layer.weight: is not the base weight that"):
        load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected) and theirs is not None


@ties
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_names_that_the_model_lacks(tmp_path, tied, quantize):
    """PEFT passes over names in a list that nothing answers to."""
    theirs = saved(tmp_path, tied=tied, target_modules=["q_proj", "c_attn", "query"])
    assert {"c_attn", "query"} <= set(json.loads((tmp_path / CONFIG).read_text())["target_modules"])
    PeftModel.from_pretrained(llama(tie_word_embeddings=tied), tmp_path)
    model = llama(tie_word_embeddings=tied)
    load_adapter(model, tmp_path, quantize=quantize)
    if quantize is None:
        assert_like(model, theirs)
    base = llama(tie_word_embeddings=tied)
    pool = AdapterPool(base, slots=1, pages=1, target_modules=["q_proj"])
    pool.load("a", tmp_path)
    attach_pool(base, pool)
    with torch.no_grad(), pool.route(["a", "a"]):
        got = base(tokens()).logits
    assert_within_budget(got, logits(copy.deepcopy(theirs).double()), logits(theirs))
    edit(tmp_path, target_modules=["c_attn"])
    with pytest.raises(ValueError, match=r"\('c_attn',\) matches no layer|\['c_attn'\] matches no"):
        load_adapter(llama(tie_word_embeddings=tied), tmp_path)
    edit(tmp_path, target_modules=["q_proj", "k_proj", "c_attn"])
    with pytest.raises(ValueError, match="4 tensors missing from"):
        load_adapter(llama(tie_word_embeddings=tied), tmp_path)


@pytest.mark.parametrize("head", [False, True])
def test_pickled_files(tmp_path, head):
    targets = ["q_proj", "lm_head"] if head else ["q_proj"]
    theirs = get_peft_model(llama(), LoraConfig(r=4, target_modules=targets)).eval()
    learn(theirs).save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file() and not (tmp_path / WEIGHTS).exists()
    model = llama()
    load_adapter(model, tmp_path)
    assert_like(model, theirs)
    base = llama()
    pool = AdapterPool(base, slots=1, pages=1, target_modules=targets)
    pool.register("a", tmp_path)
    attach_pool(base, pool)
    with torch.no_grad(), pool.route(["a", "a"]):
        got = base(tokens()).logits
    assert_within_budget(got, logits(copy.deepcopy(theirs).double()), logits(theirs))


def test_a_pool_over_a_resized_vocabulary(tmp_path):
    """The embeddings in the file are the model's own: they are passed over."""
    theirs = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    learn(theirs).save_pretrained(tmp_path, save_embedding_layers=True)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"} <= keys
    base = llama()
    pool = AdapterPool(base, slots=1, pages=1, target_modules=["q_proj"])
    pool.load("a", tmp_path)
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    pool = AdapterPool(other, slots=1, pages=1, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"embed_tokens.weight: is not the weight of the pool's"):
        pool.load("a", tmp_path)


@pytest.mark.parametrize(
    ("option", "value"), [("modules_to_save", ["lm_head"]), ("trainable_token_indices", [1])]
)
def test_a_pool_has_one_base(tmp_path, option, value):
    saved(tmp_path, target_modules=["q_proj"], **{option: value})
    pool = AdapterPool(llama(), slots=1, pages=1, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=f"{option}: got .*share all other weights"):
        pool.load("a", tmp_path)


def test_an_nf4_base_for_a_pool(tmp_path):
    saved(tmp_path, target_modules=["q_proj"])
    base = llama()
    report = quantize_model(base)
    assert report.quantized and not report.modules and "adapters on" not in str(report)
    before = logits(base)
    pool = AdapterPool(base, slots=1, pages=1, target_modules=["q_proj"])
    pool.load("a", tmp_path)
    attach_pool(base, pool)
    with torch.no_grad(), pool.route(["a", None]):
        got = base(tokens()).logits
    assert torch.equal(got[1], before[1]) and not torch.equal(got[0], before[0])
    single = llama()
    load_adapter(single, tmp_path, quantize="nf4")
    alone = logits(single)
    assert_within_budget(got[0], logits(copy.deepcopy(single).double())[0], alone[0])
    unload(single)
    assert torch.equal(logits(single), before)
