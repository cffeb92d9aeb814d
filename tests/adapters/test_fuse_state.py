"""fuse_projections: what is kept and for how long, copies, threads, and the model's other uses."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.adapters import adapter_layers
from lora_kernels.adapters.fuse import fused_report
from lora_kernels.nn import open_calls
from tests.adapters.fused import LONE, PACKED, K, assert_equal, inputs, pair, ran, step
from tests.adapters.models import llama, logits, tokens, wake


def test_nothing_is_kept_from_one_call_to_the_next():
    """A call that ends before k and v took their parts, with weights that change unseen after."""
    apart, fused = pair()
    x = inputs()

    class Stop(Exception):
        pass

    for error in (Stop, KeyboardInterrupt):

        def stop(x, error=error):
            raise error

        fused.between = stop
        with pytest.raises(error), torch.no_grad():
            fused(x)
        if error is Stop:
            assert not open_calls._open.calls
        for model in (apart, fused):
            model.k.lora_B.data.mul_(2)
        if error is Stop:
            assert torch.equal(fused.k(x), apart.k(x))
        fused.between = lambda x: None
        with torch.no_grad():
            assert torch.equal(fused(x), apart(x))
        assert not open_calls._open.calls


def test_nothing_stays_in_memory():
    _, fused = pair()
    kept = []

    def stop(x):
        (call,) = open_calls._open.calls.values()
        kept.extend(weakref.ref(y) for y in call.kept[0].outputs.values())
        raise KeyboardInterrupt

    fused.between = stop
    x = inputs()
    seen = weakref.ref(x)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        fused(x)
    fused.between = lambda x: None
    with torch.no_grad():
        fused(inputs())
    del x
    gc.collect()
    assert len(kept) == 2 and [ref() for ref in (*kept, seen)] == [None] * 3


def test_threads_do_not_see_each_other():
    apart, fused = (m.eval() for m in pair())
    xs = [torch.randn(3, K) for _ in range(4)]
    with torch.no_grad():
        expected = [apart(x) for x in xs]
    barrier, wrong = threading.Barrier(4), []
    # All are in the middle of a call at once.
    fused.between = lambda x: barrier.wait(timeout=60)

    def work(i):
        with torch.no_grad():
            for _ in range(5):
                if not torch.equal(fused(xs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and not barrier.broken


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "twice": lambda model: copy.deepcopy(pickle.loads(pickle.dumps(model))),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_run_as_one_and_apart_from_the_original(way):
    fused = llama()
    lk.apply_lora(fused, 4)
    lk.fuse_projections(wake(fused))
    expected = logits(fused)
    other = COPIES[way](fused).eval()
    assert ran(lambda: logits(other)).count(PACKED) == 4
    assert fused_report(other) == fused_report(fused)
    assert torch.equal(logits(other), expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert torch.equal(logits(fused), expected)


def test_a_copy_of_one_layer_and_a_shallow_copy_of_its_owner():
    apart, fused = pair()
    layer = copy.deepcopy(fused.k)
    assert torch.equal(layer(inputs()), apart.k(inputs()))
    replica = copy.copy(fused)  # what DataParallel makes of each module for another device
    replica._modules = {n: copy.deepcopy(m) for n, m in fused._modules.items()}
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert torch.equal(replica(inputs()), apart(inputs()))
    assert ran(lambda: replica(inputs())) == [PACKED, LONE]


def test_the_model_is_what_it_was():
    plain, model = llama(), llama()
    for m in (plain, model):
        lk.apply_lora(m, 4, quantize="nf4")
        wake(m)
    before = [*model.state_dict()], [n for n, _ in model.named_modules()], repr(model)
    first = lk.fuse_projections(model)
    assert lk.fuse_projections(model) == first
    assert ([*model.state_dict()], [n for n, _ in model.named_modules()], repr(model)) == before
    owners = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert len(owners) == 4
    assert all(len(m._forward_hooks) == len(m._forward_pre_hooks) == 1 for m in owners)
    model.load_state_dict(plain.state_dict())
    assert torch.equal(logits(model), logits(plain))
    lk.unfuse_projections(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("in_group" in vars(m) for m in model.modules())
    assert ran(lambda: logits(model)) == [LONE] * 14


def test_other_functions_of_the_package_go_on(tmp_path):
    base, model, twin = logits(llama()), llama(), llama()
    lk.apply_lora(twin, 4)
    lk.apply_lora(model, 4)
    lk.fuse_projections(wake(model))
    adapted = logits(model)
    lk.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="has adapters on 14 layers already"):
        lk.apply_lora(model)
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.lora_B.zero_()
    assert torch.equal(logits(model), logits(twin))
    lk.load_adapter(model, tmp_path)
    assert torch.equal(logits(model), adapted)
    assert lk.fuse_loss(model)
    lk.unload(model)
    assert torch.equal(logits(model), base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    pool = lk.serving.AdapterPool(model, slots=2, pages=64)
    pool.register("one", tmp_path)
    lk.serving.attach_pool(model, pool)
    assert fused_report(model).groups == () == lk.fuse_projections(model).groups
    with torch.no_grad(), pool.route(["one", "one"]):
        rows = model(tokens()).logits
    assert not torch.equal(rows, base)
    lk.serving.detach_pool(model)
    lk.load_adapter(model, tmp_path, quantize="nf4")
    lk.fuse_projections(model)
    before = logits(model)
    plain = lk.merge_and_unload(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert type(plain.model.layers[0].mlp.up_proj) is nn.Linear
    assert not torch.equal(logits(plain), base) and before.shape == base.shape


def test_a_layer_that_is_replaced_leaves_its_group():
    apart, fused = pair()
    for model in (apart, fused):
        torch.manual_seed(5)
        model.k = nn.Linear(K, 24)
    assert ran(lambda: fused(inputs())) == [PACKED, LONE]
    assert torch.equal(fused(inputs()), apart(inputs()))
    assert fused_report(fused).groups == (("q", "v"),)


def test_compiled_graphs_hold_the_layers_one_by_one():
    apart, fused = (m.eval() for m in pair())
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert ran(lambda: compiled(inputs())) == [LONE] * 4
    assert_equal(step(apart, inputs()), step(fused, inputs(), forward=compiled))
    assert ran(lambda: fused(inputs())) == [PACKED, LONE]


def test_functional_calls_have_their_own_parameters():
    apart, fused = pair()
    zeros = {n: torch.zeros_like(p) for n, p in fused.named_parameters() if "lora_B" in n}
    found = [torch.func.functional_call(m, zeros, (inputs(),)) for m in (apart, fused)]
    assert torch.equal(*found)
    assert not torch.equal(found[1], fused(inputs()))


def test_what_is_no_model():
    for function in (lk.fuse_projections, lk.unfuse_projections):
        with pytest.raises(TypeError, match=r"^model: got 'model', expected a torch.nn.Module"):
            function("model")
