"""Models that fold batch and tokens before a layer: each row keeps its own adapter."""

from __future__ import annotations

import copy

import pytest
import torch

from lora_kernels.adapters import LoRAConfig
from lora_kernels.adapters.targets import find_targets
from lora_kernels.integrations.peft import key_of
from lora_kernels.nn.multi_lora import MultiLoRALinear, fit_slots
from lora_kernels.serving import AdapterPool, attach_pool, detach_pool, generate_batch
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import AllDouble
from tests.serving.adapters import CONFIG

SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
MODELS = {
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=16, max_position_embeddings=64),
    "Qwen2Moe": dict(
        num_key_value_heads=2,
        intermediate_size=64,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts_per_tok=2,
    ),
    "DeepseekV3": dict(
        intermediate_size=64,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
}


def _model(kind):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | MODELS[kind])
    config._experts_implementation = "eager"  # the grouped one takes no fp64
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def _adapters(model, names):
    """By name: random A and B of every linear layer."""
    g = torch.Generator().manual_seed(3)
    targets = find_targets(model, LoRAConfig()).names
    return {
        name: {
            t: (
                torch.randn(4, model.get_submodule(t).in_features, generator=g) / 4,
                torch.randn(model.get_submodule(t).out_features, 4, generator=g) / 4,
            )
            for t in targets
        }
        for name in names
    }


def _pooled(model, adapters):
    model = copy.deepcopy(model)
    pool = AdapterPool(model, slots=4, pages=4, exclude_modules=["lm_head"])
    attach_pool(model, pool)
    for name, layers in adapters.items():
        state = {
            key_of(t, f): m for t, pair in layers.items() for f, m in zip("AB", pair, strict=True)
        }
        targets = list(layers)
        pool.load(name, state, CONFIG | {"r": 4, "lora_alpha": 4, "target_modules": targets})
    return model, pool


def _alone(model, layers):
    """The model with one adapter, in plain PyTorch."""
    model = copy.deepcopy(model)
    for name, (a, b) in layers.items():
        model.get_submodule(name).register_forward_hook(
            lambda _, x, y, a=a, b=b: y + x[0] @ a.to(y.dtype).T @ b.to(y.dtype).T
        )
    return model


def _logits(model, *ids, **named):
    with torch.no_grad():
        return model(*ids, use_cache=False, **named).logits


@pytest.mark.parametrize("length", [1, 3, 7])  # 3: as many tokens as rows
@pytest.mark.parametrize("kind", MODELS)
def test_each_row_has_its_own_adapter(kind, length):
    model = _model(kind)
    adapters = _adapters(model, ["a", "b"])
    pooled, pool = _pooled(model, adapters)
    ids = torch.randint(3, 60, (3, length), generator=torch.Generator().manual_seed(1))
    rows = ["b", None, "a"]
    with pool.route(rows) as slots:
        got = _logits(pooled, ids)
    with pool.route(slots[:, None].expand(3, length).contiguous()):
        assert torch.equal(_logits(pooled, ids), got)
    with pool.route(rows):
        assert torch.equal(_logits(pooled, input_ids=ids), got)
    plain, exact = [], []
    for i, name in enumerate(rows):
        alone = _alone(model, {} if name is None else adapters[name])
        plain.append(_logits(alone, ids)[i])
        with AllDouble():
            exact.append(_logits(alone.double(), ids)[i])
    assert_within_budget(got, torch.stack(exact), torch.stack(plain))


class Tokenizer:
    pad_token_id = 0

    def __call__(self, texts):
        return {"input_ids": [[3 + ord(c) % 50 for c in text] for text in texts]}

    def decode(self, tokens, skip_special_tokens):
        return " ".join(map(str, tokens.tolist()))


def test_opt_answers_a_batch_of_adapters():
    model = _model("OPT")
    adapters = _adapters(model, ["a", "b"])
    pooled, _ = _pooled(model, adapters)
    prompts, rows = ["one", "and two", "three, too"], ["b", None, "a"]
    options = dict(max_new_tokens=6, do_sample=False)
    got = generate_batch(pooled, Tokenizer(), prompts, rows, **options).tokens
    beams = generate_batch(pooled, Tokenizer(), prompts, rows, num_beams=2, **options).tokens
    assert len(beams) == 3
    for prompt, name, tokens in zip(prompts, rows, got, strict=True):
        alone = _alone(model, {} if name is None else adapters[name])
        ids = torch.tensor(Tokenizer()([prompt])["input_ids"])
        out = alone.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        assert out[0, ids.shape[1] :].tolist() == tokens.tolist()


class _Router:
    def __init__(self, tokens):
        self.tokens = tokens

    def active_tokens(self):
        return self.tokens


SLOTS = torch.tensor([4, 5, 6], dtype=torch.int32)


@pytest.mark.parametrize(
    ("slots", "lead", "tokens", "name", "expected"),
    [
        (SLOTS, (3,), (3, 1), "fc", [4, 5, 6]),
        (SLOTS, (6,), (3, 2), "fc", [4, 4, 5, 5, 6, 6]),
        (SLOTS, (1, 6), (3, 2), "fc", [[4, 4, 5, 5, 6, 6]]),
        (SLOTS, (6,), (3, 2), "shared_expert.fc", [4, 4, 5, 5, 6, 6]),
        (SLOTS, (6,), (3, 2), "experts.0.fc", [4, 4, 5, 5, 6, 6]),  # all of them
        (SLOTS, (3,), (3, 1), "experts.0.fc", [4, 5, 6]),
        (SLOTS, (3,), (3, 2), "experts.0.fc", None),  # as many as rows, and others
        (SLOTS, (3,), None, "experts.0.fc", None),
        (SLOTS, (3,), (3, 2), "pooler", [4, 5, 6]),  # one token of each row
        (SLOTS, (1, 3), (3, 3), "position", None),  # what all rows share
        (SLOTS, (2, 3), (3, 2), "fc", None),  # tokens first
        (SLOTS, (6,), None, "fc", None),
        (SLOTS, (6,), (3, 3), "fc", None),
        (SLOTS, (9,), (2, 3), "fc", None),
    ],
)
def test_slots_fit_or_are_refused(slots, lead, tokens, name, expected):
    x, picks = torch.zeros(*lead, 8), MultiLoRALinear.picks_tokens(name)
    if expected is None:
        with pytest.raises(ValueError, match=rf"^{name}: slots: got shape \[3\], expected \["):
            fit_slots(name, slots, x, _Router(tokens), picks=picks)
        return
    assert fit_slots(name, slots, x, _Router(tokens), picks=picks).tolist() == expected


def test_a_detached_model_has_no_hook_of_the_pool():
    model = _model("OPT")
    pooled, _ = _pooled(model, {})
    assert pooled._forward_pre_hooks
    detach_pool(pooled)
    assert not pooled._forward_pre_hooks and not pooled._forward_pre_hooks_with_kwargs
