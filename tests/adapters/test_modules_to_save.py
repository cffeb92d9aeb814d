"""Modules that train whole beside the adapters: saved, loaded, merged, in PEFT and here."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from lora_kernels.adapters import (
    LoRAConfig,
    apply_lora,
    disable_adapters,
    load_adapter,
    merge_adapters,
    merge_and_unload,
    quantize_model,
    save_adapter,
    unload,
    unmerge_adapters,
)
from lora_kernels.integrations.fused_loss import fuse_loss
from lora_kernels.testing import assert_within_budget
from tests.adapters.heads import MODELS, inputs, learn, make, predictions, targets
from tests.adapters.models import llama, logits, mlp, tokens

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
models = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Model has `tie_word", "ignore:.*trained, so its weight"
)


def adapted(name: str, **options):
    model = make(name)
    report = apply_lora(model, r=2, target_modules=targets(model), **options)
    return model, report


def assert_like_peft(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    like = make(name)
    plain = predictions(theirs, like)
    exact = predictions(copy.deepcopy(theirs).double(), like) if name != "vit image" else None
    got = predictions(ours, like)
    if exact is None:  # its pixels are fp32
        exact = _exact_image(theirs, like)
    assert_within_budget(got, exact, plain)


def _exact_image(model: nn.Module, like: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = copy.deepcopy(model).double()(pixel_values=inputs(like)["pixel_values"].double())
    return out.logits.flatten()


@models
def test_a_new_head_trains_by_default(name):
    heads = MODELS[name][1]
    model, report = adapted(name)
    assert report.modules_to_save == heads
    for head in heads:
        assert f"{head}" in str(report).split("train whole, saved with them: ")[1].split("\n")[0]
        assert all(p.requires_grad for p in model.get_submodule(head).parameters())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.startswith(heads) for n in trained)
    assert not any("lora_" in n and n.startswith(heads) for n in trained)


@models
def test_a_head_is_never_quantised(name):
    model, report = adapted(name, quantize="nf4")
    assert report.quantized
    for head in MODELS[name][1]:
        assert all(p.is_floating_point() for p in model.get_submodule(head).parameters())
        assert not any(n.startswith(head) for n in report.quantized)


@models
def test_ours_loads_here_and_in_peft(name, tmp_path):
    model, _ = adapted(name)
    before = predictions(model)
    expected = predictions(learn(model))
    assert not torch.equal(expected, before)
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    assert written["task_type"] == MODELS[name][2]
    other = make(name)
    result = load_adapter(other, tmp_path)
    assert torch.equal(predictions(other), expected)
    assert set(result.modules_to_save) == set(MODELS[name][1])
    assert_like_peft(model, PeftModel.from_pretrained(make(name), tmp_path), name)
    again, _ = adapted(name)
    load_adapter(again, tmp_path)
    assert torch.equal(predictions(again), expected)


@models
def test_peft_loads_here(name, tmp_path):
    base = make(name)
    heads, task = MODELS[name][1:]
    config = LoraConfig(
        r=2, target_modules=targets(base), task_type=task, modules_to_save=list(heads)
    )
    theirs = learn(get_peft_model(base, config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = make(name)
    load_adapter(model, tmp_path / "theirs")
    assert_like_peft(model, theirs, name)
    save_adapter(model, tmp_path / "ours")
    a, b = (load_file(tmp_path / d / WEIGHTS) for d in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


@models
def test_peft_s_configuration(name):
    """As PEFT's task types make them, whatever else is named."""
    base, model = make(name), make(name)
    heads, task = MODELS[name][1:]
    config = LoraConfig(r=2, target_modules=targets(base), task_type=task)
    report = apply_lora(model, copy.deepcopy(config), quantize="nf4")
    assert report.modules_to_save == heads
    if task is not None:
        theirs = get_peft_model(base, config)
        trained = {
            n.replace("modules_to_save.default.", "").removeprefix("base_model.model.")
            for n, p in theirs.named_parameters()
            if p.requires_grad and "modules_to_save" in n
        }
        ours = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
        assert ours == trained


@pytest.mark.parametrize("name", ["roberta sequence", "vit image", "llama questions"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_without_and_merged(name, quantize):
    base = make(name)
    if quantize:
        quantize_model(base, quantize)
    untrained = predictions(base)
    model, _ = adapted(name, quantize=quantize)
    trained = predictions(learn(model))
    with disable_adapters(model):
        assert torch.equal(predictions(model), untrained)
        with disable_adapters(model):
            assert torch.equal(predictions(model), untrained)
    assert torch.equal(predictions(model), trained)
    merge_adapters(model)
    assert not torch.equal(predictions(model), untrained)
    unmerge_adapters(model)
    assert torch.equal(predictions(model), trained)
    copied = copy.deepcopy(model)
    merged = merge_and_unload(copied)
    for head in MODELS[name][1]:
        for a, b in zip(
            merged.get_submodule(head).parameters(),
            model.get_submodule(head).parameters(),
            strict=True,
        ):
            assert torch.equal(a, b) and not a.requires_grad
    assert not any("lora" in n for n, _ in merged.named_parameters())
    unload(model)
    assert torch.equal(predictions(model), untrained)
    assert not any(p.requires_grad for p in model.parameters())


def test_saving_and_taking_off_while_it_is_off(tmp_path):
    model, base = adapted("bert sequence")[0], make("bert sequence")
    expected = predictions(learn(model))
    twin = copy.deepcopy(model)
    with disable_adapters(model):
        save_adapter(model, tmp_path)
        copied = copy.deepcopy(model)
        merge_and_unload(copied)
        unload(model)
    assert torch.equal(predictions(model), predictions(base))
    load_adapter(model, tmp_path)
    assert torch.equal(predictions(model), expected)
    assert torch.equal(predictions(copied), predictions(merge_and_unload(twin)))


def test_without_between_forward_and_backward():
    """A reference model's logits (DPO) are taken while the policy's graph waits."""
    model, _ = adapted("bert sequence")
    learn(model)
    score = model(**inputs(model)).logits.sum()
    expected = torch.autograd.grad(score, model.classifier.weight)[0]
    score = model(**inputs(model)).logits.sum()
    with disable_adapters(model), torch.no_grad():
        model(**inputs(model))
    score.backward()
    assert torch.equal(model.classifier.weight.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("names", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("ensure", [False, True])
def test_embeddings_and_heads(tmp_path, dtype, tied, names, ensure):
    """What shares a weight trains apart, or together where that is asked for."""
    model, base = (llama(dtype, tie_word_embeddings=tied) for _ in range(2))
    options = {"modules_to_save": names, "ensure_weight_tying": ensure}
    apply_lora(model, r=2, target_modules=["q_proj"], **options)
    with disable_adapters(model):
        assert torch.equal(logits(model), logits(base))
    shares = model.lm_head.weight is model.model.embed_tokens.weight
    assert shares == (tied and ensure)
    expected = logits(learn(model))
    save_adapter(model, tmp_path / "ours")
    other = llama(dtype, tie_word_embeddings=tied)
    load_adapter(other, tmp_path / "ours")
    assert torch.equal(logits(other), expected)
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == shares
    theirs = PeftModel.from_pretrained(llama(dtype, tie_word_embeddings=tied), tmp_path / "ours")
    assert_within_budget(expected, logits(copy.deepcopy(theirs).double()), logits(theirs))
    theirs.save_pretrained(tmp_path / "theirs")
    other = llama(dtype, tie_word_embeddings=tied)
    load_adapter(other, tmp_path / "theirs")
    assert torch.equal(logits(other), expected)
    with disable_adapters(other):
        assert torch.equal(logits(other), logits(base))
    merged = merge_and_unload(copy.deepcopy(other))
    merged.save_pretrained(tmp_path / "merged")
    plain = type(merged).from_pretrained(tmp_path / "merged").to(dtype)
    assert torch.equal(logits(plain), logits(merged))
    other.tie_weights()  # as much of transformers does on the way: nothing is lost
    assert torch.equal(logits(other), expected)
    unload(other)
    assert torch.equal(logits(other), logits(base))
    assert (other.lm_head.weight is other.model.embed_tokens.weight) == tied
    assert other.config.tie_word_embeddings == tied


def test_a_norm_and_buffers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    plain = copy.deepcopy(model).eval()
    apply_lora(model, r=2, target_modules=["0"], modules_to_save=["1"])
    model.train()
    x = torch.randn(16, 8)
    for _ in range(3):
        model(x)
    learn(model.eval())
    expected = model(x)
    save_adapter(model, tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert "base_model.model.1.running_mean" in saved
    assert saved["base_model.model.1.num_batches_tracked"] == 3
    other = copy.deepcopy(plain)
    load_adapter(other, tmp_path)
    assert torch.equal(other(x), expected)
    with disable_adapters(other):
        assert torch.equal(other(x), plain(x))


def test_casting_and_copies():
    model, base = llama(), llama()
    apply_lora(model, r=2, modules_to_save=["lm_head", "norm"])
    learn(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    twin.bfloat16()
    unload(twin)
    assert torch.equal(logits(twin), logits(base.bfloat16()))
    assert torch.equal(model.lm_head.weight, copy.deepcopy(model).lm_head.weight)


def test_the_fused_loss_trains_the_head():
    reference = llama()
    apply_lora(reference, r=2, dropout=0.0, modules_to_save=["lm_head"])
    model = copy.deepcopy(reference)
    assert fuse_loss(model)
    for m in (reference, model):
        m.train()
        m(tokens(), labels=tokens()).loss.backward()
    a, b = (m.lm_head.weight.grad for m in (reference, model))
    assert b is not None and b.any()
    exact = copy.deepcopy(reference).double()
    exact.zero_grad()
    exact(tokens(), labels=tokens()).loss.backward()
    assert_within_budget(b, exact.lm_head.weight.grad, a)


def test_names_match_as_in_peft():
    model = mlp()
    apply_lora(model, r=2, target_modules=["up"], modules_to_save=["ad"])  # the end of "head"
    assert model.head.weight.requires_grad and not model.down.weight.requires_grad
    for name, match in (("tail", "'tail' is the end of no module's name in Mlp.*up, down, head"),):
        with pytest.raises(ValueError, match=match):
            apply_lora(mlp(), r=2, modules_to_save=[name])
    with pytest.raises(TypeError, match="modules_to_save: got 'head', expected a list"):
        apply_lora(mlp(), r=2, modules_to_save="head")
    fresh = mlp()
    report = apply_lora(fresh, r=2, modules_to_save=["down", "head"])
    assert report.modules == ("up",) and report.modules_to_save == ("down", "head")
    with pytest.raises(ValueError, match="matches only down, which modules_to_save trains whole"):
        apply_lora(mlp(), r=2, target_modules=["down"], modules_to_save=["down"])


def test_files_that_do_not_fit(tmp_path):
    model = mlp()
    apply_lora(model, r=2, target_modules=["up"], modules_to_save=["head"])
    save_adapter(learn(model), tmp_path)
    without = mlp()
    apply_lora(without, r=2, target_modules=["up"])
    with pytest.raises(ValueError, match=r"2 tensors not expected in .*head.weight"):
        load_adapter(without, tmp_path)
    more = mlp()
    apply_lora(more, r=2, target_modules=["up"], modules_to_save=["head", "down"])
    with pytest.raises(ValueError, match=r"1 tensors missing from .*down.weight"):
        load_adapter(more, tmp_path)
    wide = mlp()
    wide.head = nn.Linear(64, 11)
    with pytest.raises(ValueError, match=r"got shape \[10(, 64)?\], the model's has \[11"):
        load_adapter(wide, tmp_path)
    assert type(wide.up) is nn.Linear
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"head.bias: holds non-finite values"):
        load_adapter(mlp(), tmp_path)


def test_a_file_without_the_head_is_said(tmp_path):
    model, _ = adapted("bert sequence", modules_to_save=[])
    save_adapter(learn(model), tmp_path)
    with pytest.warns(UserWarning, match="holds no weights of classifier: predictions are those"):
        load_adapter(make("bert sequence"), tmp_path)


@pytest.mark.parametrize("options", [{"modules_to_save": ["down"]}, {}])
def test_a_safe_merge_looks_at_all_that_has_learned(options):
    model = mlp()
    model.embed_tokens = nn.Embedding(4, 4)
    rows = {} if options else {"trainable_token_indices": [2]}
    apply_lora(model, r=2, target_modules=["up"], **options, **rows)
    place = model.down.weight if options else model.embed_tokens.trainable_tokens_delta
    with torch.no_grad():
        place[0, 0] = float("inf")
    with pytest.raises(ValueError, match="holds non-finite values; nothing was changed"):
        merge_and_unload(model, safe=True)
    assert type(model.up) is not nn.Linear
    merge_and_unload(model)


def test_peft_s_configuration_names_what_there_is_not():
    """PEFT adds both names for a task, to the configuration that it is given."""
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["score", "classifier"])
    report = apply_lora(make("bert sequence"), config)
    assert report.modules_to_save == ("classifier",)


def test_a_pickled_model(tmp_path):
    model, _ = adapted("bert sequence", trainable_token_indices=[1, 2])
    expected = predictions(learn(model))
    torch.save(model, tmp_path / "model.pt")
    other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(predictions(other), expected)
    unload(other)
    assert torch.equal(predictions(other), predictions(make("bert sequence")))


def test_an_offloaded_head_is_refused():
    from accelerate import cpu_offload

    model = make("bert sequence")
    cpu_offload(model.classifier)
    with pytest.raises(ValueError, match="modules_to_save: accelerate has offloaded classifier"):
        apply_lora(model, r=2, target_modules=["query"])


def test_a_head_replaced_after_apply_lora(tmp_path):
    model = mlp()
    apply_lora(model, r=2, target_modules=["up"], modules_to_save=["head"])
    model.head = nn.Linear(64, 12).requires_grad_(False)
    with pytest.raises(ValueError, match="modules_to_save: head was replaced since apply_lora"):
        save_adapter(model, tmp_path)


def test_many_adapters_have_no_whole_modules():
    from lora_kernels.training import AdapterJob, MultiLoRATrainer

    ids = torch.ones(1, 4, dtype=torch.int64)
    config = LoRAConfig(r=2, modules_to_save=["lm_head"])
    job = AdapterJob(config, [{"input_ids": ids, "labels": ids}])
    with pytest.raises(ValueError, match=r"modules_to_save: got \('lm_head',\)"):
        MultiLoRATrainer(llama(), {"a": job})
