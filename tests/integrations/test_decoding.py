"""compile_decoding: the same tokens, one graph, and what a graph must see."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.testing import assert_within_budget

transformers = pytest.importorskip("transformers")


def llama(kind="lora", layers=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.LlamaForCausalLM(config).bfloat16().eval()
    model.generation_config.eos_token_id = None
    if kind != "plain":
        lk.apply_lora(model, r=8, quantize="nf4" if kind == "qlora" else None)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.2)
    return model.eval()


IDS = torch.randint(0, 97, (1, 7), generator=torch.Generator().manual_seed(1))


def generated(model, ids=IDS, new=6):
    return model.generate(
        ids,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )


def tokens(model, ids=IDS, new=6):
    return torch.stack(generated(model, ids, new).logits)


def hold(model, plain):
    """The logits of what the model generates, against those of the same weights without a graph,
    which are given the same tokens."""
    made = generated(model)
    read, first = made.sequences[:, :-1], IDS.shape[1] - 1
    with torch.no_grad():
        eager = plain(read).logits[:, first:]
        oracle = copy.deepcopy(plain).double()(read).logits[:, first:]
    assert_within_budget(torch.stack(made.logits, 1).to(eager.dtype), oracle, eager)


@pytest.fixture(autouse=True)
def fresh_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["plain", "lora", "qlora"])
def test_a_compiled_model_gives_the_same_logits(kind):
    model = llama(kind)
    lk.compile_decoding(model, backend="aot_eager")
    hold(model, llama(kind))


def test_only_tokens_after_the_prompt_are_compiled_and_only_once():
    model = llama()
    lk.compile_decoding(model, backend="eager")
    model.generation_config.max_cache_len = 32
    for length in (7, 3, 5, 9):
        tokens(model, IDS.repeat(1, 2)[:, :length], new=4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def _merge(model):
    lk.merge_adapters(model)


def _scale(model):
    for module in model.modules():
        if isinstance(module, lk.LoRALinear):
            module.alpha = 64


def _values(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B.mul_(2)


def _replaced(model):
    old = model.model.layers[1].self_attn.q_proj
    model.model.layers[1].self_attn.q_proj = old.to_linear()


def _other_parameter(model):
    layer = model.model.layers[0].mlp.gate_proj
    layer.lora_A = nn.Parameter(2 * layer.lora_A.detach())


@pytest.mark.parametrize("change", [_merge, _scale, _values, _replaced, _other_parameter])
def test_a_graph_sees_what_changes_the_result(change):
    model, plain = llama(), llama()
    lk.compile_decoding(model, backend="aot_eager")
    before = tokens(model)
    change(model)
    change(plain)
    now = tokens(model)
    hold(model, plain)
    if change is not _merge and change is not _replaced:
        assert not torch.allclose(now, before, rtol=0, atol=0.02)


def test_disabled_adapters_and_another_dtype_are_seen():
    model, base = llama(), llama("plain")
    lk.compile_decoding(model, backend="aot_eager")
    tokens(model)
    with lk.disable_adapters(model):
        hold(model, base)
    model.float()
    hold(model, llama().float())


def test_a_forced_backend_holds_in_a_graph_that_was_made_before():
    model = llama()
    lk.compile_decoding(model, backend="aot_eager")
    tokens(model)
    with lk.use_backend("reference"):
        found = lk.explain(tokens, model)
    assert {e.chosen for e in found} == {"reference"}
    assert len(found) == 6 * 14  # tokens x layers: those of the graph too


def test_it_stays_beside_the_fused_loss_and_is_undone():
    model = llama()
    lk.fuse_loss(model)
    fused = model.forward
    lk.compile_decoding(model, backend="eager")
    want = fused(IDS, labels=IDS).loss
    assert torch.equal(model(IDS, labels=IDS).loss, want)
    lk.uncompile_decoding(model)
    assert model.forward == fused
    assert model.generation_config.cache_implementation is None
    lk.uncompile_decoding(model)


def test_copies_and_pickles_have_a_graph_of_their_own():
    model = llama()
    lk.compile_decoding(model, backend="eager")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.forward._model() is other
        with torch.no_grad():
            for p in other.parameters():
                p.zero_()
        assert tokens(other).abs().max() == 0
    hold(model, llama())


def test_a_model_of_peft_is_compiled_inside():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    model = peft.get_peft_model(llama("plain"), config)
    lk.compile_decoding(model, backend="eager")
    hold(model, llama("plain"))  # B is zero
    lk.uncompile_decoding(model)
    assert "forward" not in vars(model.get_base_model())


def test_what_is_no_such_model_is_refused():
    with pytest.raises(TypeError, match="model: got Linear"):
        lk.compile_decoding(nn.Linear(2, 2))
    model = llama("plain")
    model.forward = lambda *args, **kwargs: None
    with pytest.raises(TypeError, match="model: its forward was replaced"):
        lk.compile_decoding(model)


def test_every_way_to_generate_gives_the_same_tokens():
    ids = torch.randint(1, 97, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :2] = 0

    def ways(model):
        common = {"max_new_tokens": 7, "pad_token_id": 0}
        yield model.generate(ids, attention_mask=mask, do_sample=False, **common)
        yield model.generate(ids, attention_mask=mask, num_beams=3, do_sample=False, **common)
        torch.manual_seed(5)
        yield model.generate(ids, attention_mask=mask, do_sample=True, **common)
        yield model.generate(ids[:1, :1], do_sample=False, **common)
        with torch.inference_mode():
            yield model.generate(ids, attention_mask=mask, do_sample=False, **common)

    model = llama().float()
    want = list(ways(model))
    lk.compile_decoding(model, backend="aot_eager")
    for got, expected in zip(ways(model), want, strict=True):
        assert torch.equal(got, expected)
