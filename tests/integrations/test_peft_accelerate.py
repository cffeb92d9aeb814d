"""An accelerated model of PEFT goes through all that PEFT's users do as PEFT's own does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from lora_kernels.integrations.peft import accelerate, decelerate, register, unregister
from lora_kernels.testing import assert_within_budget
from tests.adapters.models import llama, logits, tokens
from tests.integrations.peft_models import (
    BASES,
    K,
    adapted,
    base_layer,
    both,
    exact,
    forward,
    in_four_bit,
    inputs,
    layers,
    peft_llama,
    wake,
)

SAME = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}


def same_logits(ours: Any, theirs: Any) -> None:
    oracle = logits(exact(theirs))
    assert_within_budget(logits(ours), oracle, logits(theirs))


def test_nothing_but_the_classes_changes():
    model = peft_llama()

    def parameters() -> dict[str, tuple[int, int, bool]]:
        return {n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()}

    before = parameters()
    classes = [type(m) for m in model.modules()]
    state = model.state_dict()
    report = accelerate(model)
    assert len(report.accelerated) == 14 and report.left == ()
    assert before == {
        n: (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()
    }
    assert state.keys() == model.state_dict().keys()
    assert all(isinstance(layer, lora.Linear) for layer in layers(model))
    assert all(type(layer) is not lora.Linear for layer in layers(model))
    assert accelerate(model) == report
    decelerate(model)
    assert classes == [type(m) for m in model.modules()]
    decelerate(model)  # of a model that is not accelerated: nothing


def test_attention_keeps_its_parameters():
    """PEFT's attention layer makes new ones whenever its modules are listed."""
    model = adapted(nn.MultiheadAttention(8, 2))
    attention = model.base_model.model.layer
    weight = attention.base_layer._parameters["in_proj_weight"]
    accelerate(model)
    assert attention.base_layer._parameters["in_proj_weight"] is weight


def test_the_report_prints_a_row_for_each_layer():
    model = adapted(nn.Conv1d(4, 6, 3))
    lines = str(accelerate(model)).splitlines()
    assert lines[0] == "0 of 1 layers of PEFT run on lora_kernels"
    assert lines[2].endswith("PEFT: no kernel for convolutions")
    assert "accelerated" in repr(accelerated_llama().base_model.model.model.layers[0].mlp)


def accelerated_llama(**options: Any) -> Any:
    model = peft_llama(**options)
    accelerate(model)
    return model


def disabled(model: Any, _: Path) -> None:
    model.base_model.disable_adapter_layers()


def disabled_and_enabled(model: Any, _: Path) -> None:
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()


def second(model: Any, _: Path) -> None:
    model.add_adapter("second", LoraConfig(**SAME))
    wake(model, seed=5)
    model.set_adapter("second")


def elsewhere(model: Any, _: Path) -> None:
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head", "q_proj"]))
    wake(model, seed=5)
    model.base_model.set_adapter(["default", "second"])


def stacked(model: Any, _: Path) -> None:
    second(model, _)
    model.base_model.set_adapter(["default", "second"])


def deleted(model: Any, _: Path) -> None:
    second(model, _)
    model.delete_adapter("default")


def loaded(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    model.load_adapter(folder, "again")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.zero_()
    model.set_adapter("again")


def hot_swapped(model: Any, folder: Path) -> None:
    peft_llama(r=4, lora_alpha=3).save_pretrained(folder)
    hotswap_adapter(model, str(folder), "default", torch_device="cpu")


def merged(model: Any, _: Path) -> None:
    model.merge_adapter()


def unmerged(model: Any, _: Path) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def scaled(model: Any, _: Path) -> None:
    for layer in layers(model):
        layer.set_scale("default", 0.5)
        layer.scale_layer(3)  # an int


def changed_in_place(model: Any, _: Path) -> None:
    for layer in layers(model):
        layer.lora_A["default"].weight.data.mul_(2)


def weighted(model: Any, _: Path) -> None:
    second(model, _)
    model.add_weighted_adapter(["default", "second"], [0.5, 2.0], "cat", combination_type="cat")
    model.set_adapter("cat")


ACTIONS = (disabled, disabled_and_enabled, second, elsewhere, stacked, deleted, loaded)
ACTIONS += (hot_swapped, merged, unmerged, scaled, changed_in_place, weighted)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda a: a.__name__)
def test_after_what_users_do(action: Callable[[Any, Path], None], tmp_path):
    ours, theirs = accelerated_llama(), peft_llama()
    results = []
    for model, folder in ((ours, "ours"), (theirs, "theirs")):
        torch.manual_seed(7)
        action(model, tmp_path / folder)
        results.append({n: p.requires_grad for n, p in model.named_parameters()})
    assert results[0] == results[1]
    assert all(type(layer) is not lora.Linear for layer in layers(ours)), "not accelerated"
    same_logits(ours, theirs)


COMBINATIONS = ["svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear"]
COMBINATIONS += ["dare_ties_svd", "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_weighted_adapters_are_pefts_own(combination):
    made = []
    for make in (accelerated_llama, peft_llama):
        model = make(target_modules=["q_proj"])
        torch.manual_seed(7)
        model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj"]))
        wake(model, seed=5)
        density = None if combination in ("svd", "linear", "cat") else 0.5
        names = ["default", "second"]
        model.add_weighted_adapter(
            names, [0.5, 2.0], "made", combination_type=combination, density=density
        )
        made.append({n: p for n, p in model.state_dict().items() if ".made." in n})
    assert made[0].keys() == made[1].keys() and made[0]
    assert all(torch.equal(t, made[1][n]) for n, t in made[0].items())


def test_unloading_leaves_a_plain_model():
    merged = accelerated_llama().merge_and_unload()
    assert {type(m).__module__.split(".")[0] for m in merged.modules()} <= {"torch", "transformers"}
    assert torch.equal(logits(merged), logits(peft_llama().merge_and_unload()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_and_pickles(copied):
    model = accelerated_llama()
    made = copied(model)
    assert [type(m) for m in made.modules()] == [type(m) for m in model.modules()]
    assert torch.equal(logits(made), logits(model))


def test_the_files_are_pefts_to_the_byte(tmp_path):
    options = {"use_dora": True, "rank_pattern": {"q_proj": 2}}
    peft_llama(**options).save_pretrained(tmp_path / "peft")
    accelerated_llama(**options).save_pretrained(tmp_path / "ours")
    names = sorted(p.name for p in (tmp_path / "peft").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    model = PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert len(accelerate(model).accelerated) == 14
    same_logits(model, peft_llama(**options))


def test_register_makes_accelerated_layers():
    register()
    register()
    try:
        model = peft_llama()
        made = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), llama())
    finally:
        unregister()
    assert all(type(layer) is not lora.Linear for layer in [*layers(model), *layers(made)])
    same_logits(model, peft_llama())
    assert all(type(layer) is lora.Linear for layer in layers(peft_llama()))


def test_register_respects_anothers_class(monkeypatch):
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    class Theirs(lora.LoraModel):
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LORA, Theirs)
    with pytest.raises(RuntimeError, match="Theirs for LoRA"):
        register()


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", BASES)
def test_dtypes(kind, dtype, adapter):
    use_dora = kind == "Conv1D"  # LoRA over it is PEFT's
    model = adapted(base_layer(kind, dtype), use_dora=use_dora)
    for layer in layers(model):
        for factors in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
            factors.to(adapter)
    assert accelerate(model).left == ()
    both(model, forward(inputs(3, 5, K, dtype=dtype)), dtype)


@pytest.mark.parametrize("kind", ["Linear", "Linear4bit"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_autocast(kind, autocast_adapter_dtype):
    model = adapted(base_layer(kind, torch.bfloat16), autocast_adapter_dtype)
    x = inputs(3, 5, K)

    def call(model: Any) -> dict[str, torch.Tensor]:
        if next(model.parameters()).dtype == torch.float64:
            return {"y": model(x.double())}
        with torch.autocast("cpu", torch.bfloat16):
            return {"y": model(x)}

    both(model, call)


def test_hooks_are_called():
    model = adapted(base_layer("Linear"))
    layer = layers(model)[0]
    places = [layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]]
    accelerate(model)
    for place in places:
        seen: list[nn.Module] = []
        handle = place.register_forward_hook(lambda m, *_, seen=seen: seen.append(m))
        assert "hook" in accelerate(model).left[0].reason
        model(inputs(3, K))
        handle.remove()
        assert seen == [place] and accelerate(model).left == ()


def test_what_is_not_torchs_own_is_left():
    model = adapted(base_layer("Linear"))
    layer = layers(model)[0]
    accelerate(model)
    torch.nn.utils.parametrizations.weight_norm(layer.base_layer)
    assert accelerate(model).left[0].reason == "the base weight is a NoneType, not a plain tensor"
    assert model(inputs(2, K)).shape == (2, 96)
    layer.base_layer = type("Mine", (nn.Linear,), {"forward": lambda self, x: x})(K, K)
    assert "has a forward of its own" in accelerate(model).left[0].reason

    class Own(lora.Linear):
        pass

    layer.__class__ = Own
    assert accelerate(model).left[0].reason.endswith("Own is no class of PEFT's")


ERRORS = {
    "width": lambda m: m(inputs(2, K + 1)),
    "dtype": lambda m: m(inputs(2, K, dtype=torch.float16)),
    "no tensor": lambda m: m([1.0]),
    "names too few": lambda m: layers(m)[0](inputs(2, K), adapter_names=["default"]),
    "names when merged": lambda m: (
        m.merge_adapter(),
        layers(m)[0](inputs(1, K), adapter_names=["default"]),
    ),
    "names in training": lambda m: m.train()(inputs(1, K), adapter_names=["default"]),
    "unknown name": lambda m: m.eval()(inputs(1, K), adapter_names=["nobody"]),
    "delete unknown": lambda m: m.delete_adapter("nobody"),
    "set unknown": lambda m: m.set_adapter("nobody"),
}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("call", ERRORS.values(), ids=ERRORS)
def test_errors_are_pefts(call, options):
    raised = []
    for start in (accelerate, decelerate):
        model = adapted(base_layer("Linear"), **options)
        start(model)
        with pytest.raises(Exception) as error:
            call(model)
        raised.append((type(error.value), str(error.value)))
    assert raised[0] == raised[1]


def test_an_optimizer_made_before_goes_on():
    model = peft_llama()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    accelerate(model)
    before = logits(model)
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), before)


def test_many_layers_take_less_than_the_model_is_worth():
    """Nothing is read of the weights: `accelerate` works on the meta device, too."""
    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(*(nn.Linear(K, K) for _ in range(300))), _every())
    assert len(accelerate(model).accelerated) == 300


def _every() -> LoraConfig:
    return LoraConfig(target_modules=r"\d+")


def test_four_bit_weights_are_used_as_they_are():
    model = peft_llama(base=in_four_bit(llama()))
    weights = [layer.base_layer.weight for layer in layers(model)]
    weights = [w for w in weights if hasattr(w, "quant_state")]
    assert weights
    before = [w.data.clone() for w in weights]
    accelerate(model)
    logits(model)
    with model.disable_adapter():
        logits(model)
    for w, old in zip(weights, before, strict=True):
        assert torch.equal(w.data, old)
        assert not getattr(w.quant_state, "packing_format_for_cpu", False)
    copy.deepcopy(model)


def test_four_bit_through_merging():
    model = peft_llama(base=in_four_bit(llama()))
    accelerate(model)
    model.merge_adapter()
    ours = logits(model)
    model.unmerge_adapter()
    assert accelerate(model).left == () and not torch.equal(logits(model), ours)
