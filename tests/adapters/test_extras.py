"""What trains beside the adapters and has no place in their file; resized vocabularies."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_kernels.adapters import apply_lora, load_adapter, merge_and_unload, save_adapter
from lora_kernels.testing import assert_within_budget
from tests.adapters.heads import learn
from tests.adapters.models import llama, logits, mlp

WEIGHTS = "adapter_model.safetensors"


quiet = pytest.mark.filterwarnings(
    "ignore:the vocabulary has", "ignore:Setting `save_emb", "ignore:Model has `tie_word"
)


def adapted(model=None, **options):
    model = llama() if model is None else model
    apply_lora(model, r=2, **{"target_modules": ["q_proj"]} | options)
    return model


UNFROZEN = {
    "a norm": ("model.norm", ["model.norm.weight"], ["model.norm"]),
    "two norms": (
        "model.layers.1",
        ["model.layers.1.input_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"],
        ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm"],
    ),
    "the head": ("lm_head", ["lm_head.weight"], ["lm_head"]),
}


@pytest.mark.parametrize("case", UNFROZEN)
@pytest.mark.parametrize("wrap", [None, checkpoint_wrapper, nn.DataParallel])
def test_what_was_unfrozen_by_hand_is_refused_by_name_and_saved_when_named(case, wrap, tmp_path):
    module, names, modules = UNFROZEN[case]
    model = adapted(target_modules="all-linear")
    part = model.get_submodule(module)
    for name, p in part.named_parameters():
        if name.endswith("weight") and "proj" not in name:
            p.requires_grad_(True)
    learn(model)
    expected = logits(model)
    if wrap is not None:
        model = nn.DataParallel(model) if wrap is nn.DataParallel else _wrapped(model, wrap)
    with pytest.raises(ValueError, match="would not be saved with the adapters") as error:
        save_adapter(model, tmp_path)
    assert all(name in str(error.value) for name in names)
    assert f"modules_to_save={modules!r} of save_adapter" in str(error.value)
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path, modules_to_save=modules)
    other = llama()
    assert set(load_adapter(other, tmp_path).modules_to_save) == set(modules)
    assert torch.equal(logits(other), expected)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    assert_within_budget(expected, logits(copy.deepcopy(theirs).double()), logits(theirs))


def _wrapped(model, wrap):
    for i, layer in enumerate(model.model.layers):
        model.model.layers[i] = wrap(layer)
    return model


def test_a_tied_weight_that_was_unfrozen_stays_one(tmp_path):
    model = adapted(llama(tie_word_embeddings=True))
    model.model.embed_tokens.requires_grad_(True)
    expected = logits(learn(model))
    with pytest.raises(ValueError, match=r"modules_to_save=\['lm_head', 'model.embed_tokens'\]"):
        save_adapter(model, tmp_path)
    save_adapter(model, tmp_path, modules_to_save=["embed_tokens"])
    other = llama(tie_word_embeddings=True)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    theirs = PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path)
    assert_within_budget(expected, logits(copy.deepcopy(theirs).double()), logits(theirs))


@quiet
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_resized_after_apply_lora(tied, tmp_path):
    """Of a model that was loaded from nowhere."""
    model = adapted(llama(tie_word_embeddings=tied))
    model.resize_token_embeddings(104)
    learn(model.eval().requires_grad_(False))
    save_adapter(model, tmp_path)
    other = llama(tie_word_embeddings=tied)
    other.resize_token_embeddings(104)
    load_adapter(other.eval(), tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_what_has_no_place_at_all(tmp_path):
    model = adapted()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    model.register_parameter("temperature", nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"no place for temperature, .*q_proj.weight: model.state"):
        save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="modules_to_save: 'nope' is the end of no module"):
        save_adapter(model, tmp_path, modules_to_save=["nope"])
    with pytest.raises(ValueError, match=r"modules_to_save: model has adapters inside, on layers"):
        save_adapter(model, tmp_path, modules_to_save=["model"])
    with pytest.raises(TypeError, match="modules_to_save: got 'norm', expected"):
        save_adapter(model, tmp_path, modules_to_save="norm")
    model.requires_grad_(False)
    save_adapter(model, tmp_path)
    plain = mlp()
    apply_lora(plain, r=2, target_modules=["up"])
    plain.up.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"model: up.bias trains.*no place for up.bias"):
        save_adapter(plain, tmp_path)


def test_peft_s_own_model_is_pointed_to_peft(tmp_path):
    theirs = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has PEFT's adapters; its save_pretrained writes them"):
        save_adapter(theirs, tmp_path)


@pytest.fixture(params=[False, True], ids=["apart", "tied"])
def base(request, tmp_path):
    """A folder with a model of 100 tokens."""
    llama(tie_word_embeddings=request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def resized(base, size=104):
    model = type(llama()).from_pretrained(base)
    torch.manual_seed(size)
    model.resize_token_embeddings(size)
    return model.eval()  # a new layer is in training mode


RESIZED = {
    "embeddings as they are": {},
    "both train whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "one trains whole": {"modules_to_save": ["embed_tokens"]},
    "new tokens train": {"trainable_token_indices": [100, 101]},
    "the head is adapted": {"target_modules": ["q_proj", "lm_head"]},
}


@quiet
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_is_saved(case, base, tmp_path):
    """The new rows are random: without them an adapter cannot be loaded."""
    model = adapted(resized(base), **RESIZED[case], exclude_modules=[])
    ids = torch.arange(104)[None]
    with torch.no_grad():
        expected = learn(model)(ids).logits
    save_adapter(model, tmp_path / "ours")
    torch.manual_seed(7)
    other = type(model).from_pretrained(base)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(104\) comes before loading"):
        load_adapter(other, tmp_path / "ours")
    other.resize_token_embeddings(104)
    other.eval()
    load_adapter(other, tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(other(ids).logits, expected)
        again = adapted(resized(base, 104), **RESIZED[case], exclude_modules=[])
        load_adapter(again, tmp_path / "ours")
        assert torch.equal(again(ids).logits, expected)
        plain = type(model).from_pretrained(base)
        plain.resize_token_embeddings(104)
        theirs = PeftModel.from_pretrained(plain, tmp_path / "ours")
        exact = copy.deepcopy(theirs).double()(ids).logits
        assert_within_budget(expected, exact, theirs(ids).logits)


@quiet
@pytest.mark.parametrize("case", RESIZED)
def test_a_resized_vocabulary_from_peft(case, base, tmp_path):
    options = {"target_modules": ["q_proj"]} | RESIZED[case]
    theirs = learn(get_peft_model(resized(base), LoraConfig(r=2, **options)).eval())
    theirs.save_pretrained(tmp_path / "theirs")
    model = resized(base)  # the same new rows: PEFT keeps not all of them
    load_adapter(model, tmp_path / "theirs")
    ids = torch.arange(104)[None]
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(ids).logits
        assert_within_budget(model(ids).logits, exact, theirs(ids).logits)


@quiet
def test_a_resized_head_in_4_bits(base, tmp_path):
    options = {"target_modules": ["q_proj", "lm_head"], "exclude_modules": [], "quantize": "nf4"}
    ids = torch.arange(104)[None]
    model = adapted(resized(base), **options)
    with torch.no_grad():
        expected = learn(model)(ids).logits
    save_adapter(model, tmp_path / "ours")
    again = adapted(resized(base), **options)
    load_adapter(again, tmp_path / "ours")
    other = resized(base, 104)
    load_adapter(other, tmp_path / "ours")  # dense, with the values of the 4-bit head
    with torch.no_grad():
        assert torch.equal(again(ids).logits, expected)
    if not model.config.tie_word_embeddings:
        head = model.lm_head.weight.dequantize()
        assert torch.equal(other.lm_head.weight, head)


@quiet
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_many_adapters_over_a_resized_vocabulary(base, tmp_path, targets):
    from lora_kernels.adapters import LoRAConfig
    from lora_kernels.training import AdapterJob, MultiLoRATrainer

    rows = torch.tensor([[100, 3, 103, 7]])
    batches = [{"input_ids": rows, "labels": rows}] * 4

    def trainer(model):
        config = LoRAConfig(r=2, target_modules=targets, exclude_modules=())
        return MultiLoRATrainer(model, {"a": AdapterJob(config, batches, lr=1e-2)})

    run = trainer(resized(base))
    run.train(2)
    run.save(tmp_path / "run")
    again = trainer(resized(base))
    again.resume(tmp_path / "run")
    assert run.train() == again.train()
    run.save(tmp_path / "end")
    fresh = type(llama()).from_pretrained(base)
    fresh.resize_token_embeddings(104)
    load_adapter(fresh.eval(), tmp_path / "end" / "a")
    single = resized(base)
    load_adapter(single, tmp_path / "end" / "a")
    with torch.no_grad():
        assert torch.equal(fresh(rows).logits, single(rows).logits)


def test_a_resized_vocabulary_is_said(base, tmp_path):
    model = adapted(resized(base))
    with pytest.warns(UserWarning, match="the vocabulary has 104 tokens, that of .*base 100"):
        save_adapter(model, tmp_path / "a")
    keys = load_file(tmp_path / "a" / WEIGHTS).keys()
    assert {k for k in keys if "lora" not in k} == {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    }
    merged = merge_and_unload(model)
    merged.save_pretrained(tmp_path / "merged")
    assert len(type(merged).from_pretrained(tmp_path / "merged").lm_head.weight) == 104


def test_a_vocabulary_as_it_was_is_not_saved(base, tmp_path):
    save_adapter(adapted(type(llama()).from_pretrained(base)), tmp_path / "a")
    assert all("lora" in key for key in load_file(tmp_path / "a" / WEIGHTS))


def test_a_folder_without_a_configuration_says_nothing_of_the_vocabulary(tmp_path):
    """One with a GGUF: transformers would give the class's default size, 32000."""
    folder = tmp_path / "gguf"
    folder.mkdir()
    model = llama()
    model.config._name_or_path = str(folder)
    apply_lora(model)
    save_adapter(model, tmp_path / "adapter")
    names = load_file(tmp_path / "adapter" / WEIGHTS)
    assert names and all("lora_" in name for name in names)
    model.resize_token_embeddings(104)
    save_adapter(model, tmp_path / "resized")
    assert any("embed_tokens" in n for n in load_file(tmp_path / "resized" / WEIGHTS))
