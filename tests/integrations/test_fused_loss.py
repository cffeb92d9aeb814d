"""transformers' models trained without their logits: the same loss, the same gradients."""

from __future__ import annotations

import copy
import inspect
import tempfile

import peft
import pytest
import torch
import transformers
from torch import nn

from lora_kernels.adapters import apply_lora, load_adapter, save_adapter
from lora_kernels.integrations.fused_loss import FUSED_LOSS_MODELS, fuse_loss
from lora_kernels.nn import NF4Linear
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama, tokens


def _batch(draw=0, **more):
    ids = tokens().roll(draw, 1)
    labels = ids.clone()
    labels[:, :2] = -100
    return dict(input_ids=ids, labels=labels) | more


def _step(model, batch):
    """Loss and the gradients of what requires one."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _loss_in_fp64(logits, labels, shift_labels=None, num_items_in_batch=None, **_):
    """transformers' own casts to fp32."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), shift_labels.flatten(), reduction="sum"
    )
    return losses / (
        (shift_labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
    )


def _assert_same(model, batches, base=lambda model: model):
    """Over several batches together: the budget compares two errors, each random in a scalar.

    `base` finds transformers' own model.
    """
    plain = [_step(model, batch) for batch in batches]
    double = copy.deepcopy(model).double()
    base(double).loss_function = _loss_in_fp64
    oracle = [_step(double, batch) for batch in batches]
    assert fuse_loss(base(model))
    fused = [_step(model, batch) for batch in batches]
    columns = (zip(*steps, strict=True) for steps in (fused, oracle, plain))
    for i, results in enumerate(zip(*columns, strict=True)):
        got, exact, want = (torch.stack(r) for r in results)
        assert_within_budget(got, exact, want, f"gradient {i}" if i else "loss")


@pytest.mark.parametrize("name", sorted(FUSED_LOSS_MODELS))
def test_nothing_stands_between_the_output_layer_and_the_loss(name):
    """The model's forward, as the installed transformers has it, is body, output layer, loss."""
    lines = [
        line.strip() for line in inspect.getsource(getattr(transformers, name).forward).split("\n")
    ]
    begin = lines.index("hidden_states = outputs.last_hidden_state")
    end = next(i for i, line in enumerate(lines) if line.startswith("return CausalLMOutput"))
    statements = [line for line in lines[begin + 1 : end] if line]
    assert len(statements) <= 6, statements
    for statement in statements:
        known = ("slice_logits_to_keep", "slice_indices", "self.lm_head(hidden_states")
        assert any(k in statement for k in (*known, "loss = None", "if labels", "loss_function"))


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize(
    "more",
    [{}, {"num_items_in_batch": torch.tensor(9)}, {"num_items_in_batch": 9}],
    ids=["mean", "tensor-items", "items"],
)
def test_the_same_loss_and_gradients(frozen, more):
    model = llama().train()
    model.lm_head.weight.requires_grad_(not frozen)
    _assert_same(model, [_batch(draw, **more) for draw in range(8)])


def test_trimmed_logits():
    """What the fine-tuning command sends: some columns, and labels that are shifted already."""
    model = llama().train()
    columns = torch.tensor([1, 3, 4])
    batches = [_batch(draw) for draw in range(8)]
    for batch in batches:
        shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        batch |= {"shift_labels": shifted[:, columns], "logits_to_keep": columns}
    _assert_same(model, batches)


def test_the_last_logits():
    model = llama().train()
    batches = [_batch(draw) for draw in range(8)]
    batches = [b | {"labels": b["labels"][:, -4:], "logits_to_keep": 4} for b in batches]
    _assert_same(model, batches)


def test_adapters_and_bf16():
    model = llama().to(torch.bfloat16).train()
    apply_lora(model, 4, 8)
    assert fuse_loss(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(8):
        loss = model(**_batch()).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


def test_compiles_as_one_graph():
    model = llama().train()
    assert fuse_loss(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for want, got in zip(_step(model, _batch()), _step(compiled, _batch()), strict=True):
        assert torch.equal(want, got)


def test_nothing_changes_without_labels_or_in_evaluation():
    model = llama().train()
    batch = _batch()
    with torch.no_grad():
        free = model(input_ids=batch["input_ids"])
        evaluated = model.eval()(**batch)
    assert fuse_loss(model)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, evaluated.logits)
        model.train()
        fused = model(**batch)
        assert fused.logits is None and fused.loss.isfinite()
        assert torch.equal(model(input_ids=batch["input_ids"]).logits, free.logits)
        # A tuple has no place for missing logits.
        assert len(model(**batch, return_dict=False)[1].shape) == 3


def test_positional_arguments():
    model = llama().train()
    fuse_loss(model)
    batch = _batch()
    mask = torch.ones_like(batch["input_ids"])
    want = model(input_ids=batch["input_ids"], attention_mask=mask, labels=batch["labels"])
    got = model(batch["input_ids"], mask, labels=batch["labels"])
    assert got.logits is None and torch.equal(got.loss, want.loss)
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(batch["input_ids"], input_ids=batch["input_ids"], labels=batch["labels"])


def _adapter(model):
    apply_lora(model, 2, 4, 0.0, target_modules=["lm_head"], exclude_modules=())
    return model


def _adapter_of_peft(model):
    config = peft.LoraConfig(r=2, target_modules=["lm_head"])
    return peft.get_peft_model(model, config).get_base_model()


def _four_bits(model):
    model.lm_head = NF4Linear.from_linear(model.lm_head)
    return model


def _loaded(model):
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(_adapter(copy.deepcopy(model)), folder)
        load_adapter(model, folder)
    return model


def _hook(model):
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    return model


@pytest.mark.parametrize("change", [_adapter, _adapter_of_peft, _four_bits, _loaded, _hook])
def test_a_head_that_changes_afterwards(change):
    """The loss and the gradients are those of the model as it is at the call."""
    model = llama().train()
    assert fuse_loss(model)
    model = change(model)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    fused = _step(model, _batch())
    if change is not _four_bits and change is not _hook:
        assert any(p.grad is not None and p.grad.any() for p in model.lm_head.parameters())
    del model.forward
    for want, got in zip(_step(model, _batch()), fused, strict=True):
        assert torch.equal(want, got)


def test_a_batch_without_a_label_gives_zeros():
    model = llama().train()
    model.requires_grad_(True)
    fuse_loss(model)
    batch = _batch()
    batch["labels"].fill_(-100)
    loss, *grads = _step(model, batch)
    assert loss.isnan() and grads and not any(g.any() for g in grads)


def test_twice_and_undone():
    model = llama()
    forward = model.forward
    assert fuse_loss(model) and fuse_loss(model)
    assert inspect.signature(model.forward) == inspect.signature(forward)
    del model.forward
    assert model.forward == forward


def test_a_copy_has_its_own_loss():
    model = llama().train()
    fuse_loss(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
        loss = twin(**_batch()).loss
    nothing = torch.zeros(1, model.config.vocab_size)
    plain = nn.functional.cross_entropy(nothing, torch.tensor([0]))
    assert_within_budget(loss, torch.tensor(float(nothing.numel())).double().log(), plain)


def test_what_is_left_alone():
    def refuses(model):
        forward = model.forward
        assert not fuse_loss(model)
        assert model.forward == forward

    refuses(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"^model: got str, expected a torch.nn.Module"):
        fuse_loss("model")
    config = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config |= dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    refuses(transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**config)))
    model = llama()
    model.lm_head = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=True)
    refuses(model)
    model = llama()
    model.loss_function = lambda *args, **kwargs: None
    refuses(model)
    model = llama()
    apply_lora(model, 2, 4, target_modules=["lm_head"], exclude_modules=())
    refuses(model)


def test_under_peft():
    model = peft.get_peft_model(
        llama().train(), peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    batches = [_batch(draw) for draw in range(8)]
    _assert_same(model, batches, lambda model: model.get_base_model())
