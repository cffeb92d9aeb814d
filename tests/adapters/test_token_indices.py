"""Rows of an embedding that train by themselves: trained, saved, loaded, merged, as in PEFT."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lora_kernels.adapters import (
    apply_lora,
    disable_adapters,
    load_adapter,
    merge_and_unload,
    save_adapter,
    unload,
)
from lora_kernels.nn.token_rows import TokenEmbedding, TokenLinear
from lora_kernels.testing import assert_within_budget
from tests.adapters.heads import learn
from tests.adapters.models import llama, logits, tokens

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LIST = [int(t) for t in tokens().unique()[:3]] + [99]
INDICES = {
    "list": LIST,
    "embedding": {"embed_tokens": LIST},
    "head": {"lm_head": [3, 7]},
    "alike": {"model.embed_tokens": [3, 50], "lm_head": [3, 50]},
    "unlike": {"embed_tokens": LIST, "lm_head": [3, 7]},
}
indices = pytest.mark.parametrize("which", INDICES)
ties = pytest.mark.parametrize("tied", [False, True])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
pytestmark = pytest.mark.filterwarnings("ignore:.*trained, so its weight")


def adapted(which: str, tied: bool, dtype: torch.dtype = torch.float32, **options):
    model = llama(dtype, tie_word_embeddings=tied)
    report = apply_lora(
        model,
        r=2,
        alpha=8,
        target_modules=["q_proj"],
        trainable_token_indices=INDICES[which],
        **options,
    )
    return model, report


def peft(which: str, tied: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=INDICES[which])
    return get_peft_model(llama(dtype, tie_word_embeddings=tied), config).eval()


def assert_like(ours: nn.Module, theirs: nn.Module) -> None:
    assert_within_budget(logits(ours), logits(copy.deepcopy(theirs).double()), logits(theirs))


@indices
@ties
@dtypes
def test_ours_loads_here_and_in_peft(which, tied, dtype, tmp_path):
    model, report = adapted(which, tied, dtype)
    base = logits(llama(dtype, tie_word_embeddings=tied))
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    expected = logits(learn(model))
    with disable_adapters(model):
        assert torch.equal(logits(model), base)
    assert "rows of" in str(report)
    save_adapter(model, tmp_path)
    other = llama(dtype, tie_word_embeddings=tied)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)
    again, _ = adapted(which, tied, dtype)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    theirs = PeftModel.from_pretrained(llama(dtype, tie_word_embeddings=tied), tmp_path)
    assert_like(model, theirs)


@indices
@ties
@dtypes
def test_peft_loads_here(which, tied, dtype, tmp_path):
    theirs = learn(peft(which, tied, dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    model = llama(dtype, tie_word_embeddings=tied)
    load_adapter(model, tmp_path / "theirs")
    assert_like(model, theirs)
    save_adapter(model, tmp_path / "ours")
    a, b = (load_file(tmp_path / d / WEIGHTS) for d in ("theirs", "ours"))
    assert a.keys() == b.keys() and all(torch.equal(t, b[k]) for k, t in a.items())


@indices
@ties
def test_what_trains_is_what_peft_trains(which, tied):
    """The gradient of the rows, and nothing else of the embedding."""
    torch.manual_seed(0)
    model, _ = adapted(which, tied, dropout=0.0)
    theirs = peft(which, tied)
    learn(theirs)
    ours = [p for n, p in model.named_parameters() if "trainable_tokens" in n]
    rest = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert all("trainable_tokens_delta" in n for n in rest)
    others = [p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n]
    assert len(ours) == len(others)
    for own, other in zip(ours, others, strict=True):
        own.data.copy_(other)
    lora = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.copy_(lora[f"base_model.model.{name}.default.weight"])

    def loss(m):
        return m(tokens(), labels=tokens()).loss

    exact = copy.deepcopy(theirs).double()
    deltas = [p for n, p in exact.named_parameters() if "trainable_tokens_delta" in n]
    grads = torch.autograd.grad(loss(model), ours)
    plain = torch.autograd.grad(loss(theirs), others)
    right = torch.autograd.grad(loss(exact), deltas)
    for got, want, usual in zip(grads, right, plain, strict=True):
        assert_within_budget(got, want, usual)


@indices
@ties
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merging_and_taking_off(which, tied, quantize, tmp_path):
    model, _ = adapted(which, tied, quantize=quantize)
    learn(model)
    with disable_adapters(model):
        base = logits(model)
    expected = {n: m.rows().detach() for n, m in model.named_modules() if hasattr(m, "rows")}
    assert expected
    rest = copy.deepcopy(model)
    merged = merge_and_unload(rest)
    for name, rows in expected.items():
        module = merged.get_submodule(name)
        assert type(module) in (nn.Embedding, nn.Linear)
        assert torch.equal(module.weight[model.get_submodule(name).token_indices], rows)
    plain = copy.deepcopy(model)
    theirs = _merged_by_hand(plain, expected)
    assert torch.equal(logits(merged), logits(theirs))
    shared = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert shared == (tied and which in ("list", "embedding", "alike"))
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path)), logits(merged))
    unload(model)
    assert torch.equal(logits(model), base)
    assert type(model.model.embed_tokens) is nn.Embedding and type(model.lm_head) is nn.Linear
    assert not any("token" in n.rpartition(".")[2] for n in model.state_dict())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def _merged_by_hand(model, rows):
    """The adapters merged, and the rows written into weights of their own."""
    indices = {n: model.get_submodule(n).token_indices.clone() for n in rows}
    unloaded = copy.deepcopy(model)
    for name in rows:
        module = unloaded.get_submodule(name)
        module.trainable_tokens_delta = nn.Parameter(module.weight[indices[name]].clone())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *a, **k: None)
        merge_and_unload(unloaded)
    for name, values in rows.items():
        module = unloaded.get_submodule(name)
        weight = module.weight.detach().clone()
        weight[indices[name]] = values
        module.weight = nn.Parameter(weight)
    return unloaded


class Scaled(nn.Embedding):
    """As Gemma's: what the lookup gives, scaled."""

    def forward(self, ids):
        return super().forward(ids) * 8


class Own(nn.Embedding):
    def forward(self, ids):
        return F.embedding(ids, self.weight)


class Tiny(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed_tokens, self.up = embedding, nn.Linear(8, 8)

    def forward(self, ids):
        return self.up(self.embed_tokens(ids))


def test_embeddings_that_do_more():
    model = Tiny(Scaled(10, 8))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model.embed_tokens(ids)
    apply_lora(model, r=2, target_modules=["up"], trainable_token_indices=[2, 5])
    assert isinstance(model.embed_tokens, TokenEmbedding | Scaled)
    with torch.no_grad():
        model.embed_tokens.trainable_tokens_delta += 1
        assert torch.equal(model.embed_tokens(ids)[:, ::2], plain[:, ::2])
        got = model.embed_tokens(ids)[0, 1]
        assert torch.equal(got, (model.embed_tokens.weight[2] + 1) * 8)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.embed_tokens(ids), model.embed_tokens(ids))
    merge_and_unload(twin)
    assert type(twin.embed_tokens) is Scaled
    assert torch.equal(twin.embed_tokens(ids), model.embed_tokens(ids))
    with pytest.raises(TypeError, match="embed_tokens is a Own, whose forward does not go through"):
        apply_lora(Tiny(Own(10, 8)), r=2, trainable_token_indices=[2])
    hooked = Tiny(nn.Embedding(10, 8))
    hooked.embed_tokens.forward = lambda ids: torch.zeros(*ids.shape, 8)
    with pytest.raises(TypeError, match="embed_tokens has a forward that is set on the instance"):
        apply_lora(hooked, r=2, trainable_token_indices=[2])
    for option in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        with pytest.raises(ValueError, match=f"embed_tokens has {next(iter(option))}="):
            apply_lora(Tiny(nn.Embedding(10, 8, **option)), r=2, trainable_token_indices=[2])


def test_the_padding_gets_no_gradient_and_a_bias_stays():
    indices = {"embed_tokens": [2, 5], "up": [1]}
    both = nn.Sequential(Tiny(nn.Embedding(10, 8, padding_idx=2)), nn.Linear(8, 8))
    apply_lora(both, r=2, target_modules=["1"], trainable_token_indices=indices)
    ids = torch.tensor([[2, 5, 6]])
    assert isinstance(both[0].up, TokenLinear)
    both(ids).sum().backward()
    grad = both[0].embed_tokens.trainable_tokens_delta.grad
    assert not grad[0].any() and grad[1].any()
    with torch.no_grad():
        both[0].up.trainable_tokens_delta.zero_()
        assert torch.equal(both[0](ids)[..., 1], both[0].up.bias[1].expand(1, 3))


def test_state_and_copies():
    model, _ = adapted("list", True)
    learn(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    other, _ = adapted("list", True)
    other.load_state_dict(state)
    assert torch.equal(logits(other), expected)
    other.load_state_dict(
        {k: v for k, v in state.items() if "trainable_tokens" not in k and "lora_" not in k}
    )  # the base's own checkpoint, strictly
    half = copy.deepcopy(model).bfloat16()
    assert half.model.embed_tokens.trainable_tokens_delta.dtype == torch.bfloat16
    logits(half)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled), expected)


def test_a_model_without_values_yet(tmp_path):
    model, _ = adapted("list", True)
    save_adapter(learn(model), tmp_path)
    state = model.state_dict()
    with torch.device("meta"):
        other = llama(tie_word_embeddings=True)
    apply_lora(
        other,
        r=2,
        alpha=8,
        target_modules=["q_proj"],
        trainable_token_indices=LIST,
        modules_to_save=["norm"],
    )
    with pytest.raises(ValueError, match="is on the meta device, expected values"):
        save_adapter(other, tmp_path / "meta")
    other.to_empty(device="cpu")
    other.load_state_dict(state)
    for name, buffer in llama().named_buffers():
        other.get_buffer(name).copy_(buffer)
    assert torch.equal(logits(other), logits(model))


REFUSED = {
    "embed_tokens has 100 rows": {"trainable_token_indices": [100]},
    "'wte' is the end of no module": {"trainable_token_indices": {"wte": [1]}},
    "expected one token or more, each once": {"trainable_token_indices": [1, 1]},
    "expected token ids of at least 0": {"trainable_token_indices": [-1]},
    "is in modules_to_save, which trains all of it": {
        "trainable_token_indices": [1],
        "modules_to_save": ["embed_tokens"],
    },
    "lm_head gets an adapter": {
        "trainable_token_indices": {"lm_head": [1]},
        "target_modules": ["lm_head"],
        "exclude_modules": [],
    },
    "is a LlamaMLP, expected torch.nn.Embedding": {"trainable_token_indices": {"0.mlp": [1]}},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_train_is_named_and_changes_nothing(message):
    model = llama()
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises((TypeError, ValueError), match=f"trainable_token_indices: .*{message}"):
        apply_lora(model, r=2, **REFUSED[message])
    assert {n: type(m) for n, m in model.named_modules()} == before
    assert all(p.requires_grad for p in model.parameters())


def test_files_that_do_not_fit(tmp_path):
    model, _ = adapted("list", False)
    save_adapter(learn(model), tmp_path)
    other = llama()
    apply_lora(other, r=2, target_modules=["q_proj"], trainable_token_indices=LIST[:2])
    with pytest.raises(ValueError, match=r"trainable_token_indices: the adapter has \["):
        load_adapter(other, tmp_path)
    plain = llama()
    apply_lora(plain, r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"1 tensors not expected in .*token_adapter"):
        load_adapter(plain, tmp_path)
    path = tmp_path / CONFIG
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"trainable_token_indices": [1, 2]}))
    with pytest.raises(ValueError, match=r"trainable_tokens_delta: got shape \[4, 64\]"):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_resized_afterwards(tied, tmp_path):
    model, _ = adapted("list", tied)
    expected = logits(learn(model))
    model.resize_token_embeddings(104)
    assert torch.equal(logits(model)[..., :100], expected)
    with torch.no_grad():
        assert model(torch.tensor([[103]])).logits.isfinite().all()
    with pytest.warns(UserWarning, match="the vocabulary has 104 tokens"):
        save_adapter(model, tmp_path)
    other = llama(tie_word_embeddings=tied)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(104\) comes before loading"):
        load_adapter(other, tmp_path)
    other.resize_token_embeddings(104)
    load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))
    model.model.embed_tokens = nn.Embedding(104, 64).requires_grad_(False)
    model.lm_head = nn.Linear(64, 104, bias=False).requires_grad_(False)
    with pytest.raises(ValueError, match="the embedding was replaced since apply_lora"):
        save_adapter(model, tmp_path)
