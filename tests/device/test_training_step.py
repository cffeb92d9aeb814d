"""One training step of a small Llama with adapters: the logits, every adapter's gradient and the
adapters after the step, beside the same model on the reference and in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.adapters import adapter_layers, apply_lora
from tests.adapters.models import llama, tokens, wake
from tests.device.calls import hold, low

pytest.importorskip("transformers", reason="transformers is not installed")

LR = 0.05
ADAPTERS = ("lora_A", "lora_B")
FEW = ["down_proj"]  # for the interpreter, which takes a second for each layer


def adapted(quantize: str | None, dtype: torch.dtype, device: str, targets="all-linear"):
    """A model with adapters that do something, in fp32; and the same over the dense weights that
    its own decode to, which is itself where they are dense."""
    models = []
    for kind in {quantize: 0, None: 0}:
        # The GPU's other ways to attend have backwards that differ from run to run.
        model = llama(dtype, attn_implementation="eager")
        apply_lora(model, r=4, dropout=0.1, quantize=kind, target_modules=targets)
        models.append(wake(model))
    model, twin = models[0], models[-1]
    if quantize:
        for (_, own), (_, dense) in zip(adapter_layers(model), adapter_layers(twin), strict=True):
            with torch.no_grad(), use_backend("reference"):
                dense.weight.copy_(own.weight.dequantize(dtype))
                for key in ADAPTERS:
                    getattr(dense, key).copy_(getattr(own, key))
    return model.to(device).train(), twin.to(device).train()


def step(model, backend: str | None, device: str, *, exact: bool = False) -> dict[str, Tensor]:
    """The logits, and all layers' gradients and adapters after a step, end to end by kind."""
    model = copy.deepcopy(model)
    if exact:
        model = model.double()  # but for the norms, which transformers computes in fp32 always
    ids = tokens().to(device)
    torch.manual_seed(5)  # of the masks
    with use_backend(backend):
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(
            logits if exact else logits.float(), ids[:, 1:].flatten()
        )
        loss.backward()
    found = {"logits": logits.detach()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    found |= {f"d{key}": _together(model, key, grad=True) for key in ADAPTERS}
    torch.optim.SGD(parameters, lr=LR).step()
    return found | {f"{key} after": _together(model, key, grad=False) for key in ADAPTERS}


def _together(model, key: str, grad: bool) -> Tensor:
    tensors = [getattr(layer, key) for _, layer in adapter_layers(model)]
    return torch.cat([(t.grad if grad else t.detach()).flatten() for t in tensors])


# Where the rounding of each output outweighs the order of its sum: the budget is of one op, and the
# roundings that it grants each do not add up to the one of a whole model in fp32.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4"], ids=["dense", "nf4"])
def test_a_step_is_the_references(quantize, dtype, device, backend):
    interpreted = (device, backend) == ("cpu", "triton")
    if dtype == torch.bfloat16 != low(device) and interpreted:
        pytest.skip("this Triton's interpreter knows no constant of bf16")
    model, twin = adapted(quantize, dtype, device, FEW if interpreted else "all-linear")
    found = step(model, backend, device)
    oracle = step(twin, "reference", device, exact=True)
    hold(found, oracle, step(model, "reference", device))


@pytest.mark.parametrize("quantize", [None, "nf4"], ids=["dense", "nf4"])
def test_a_step_has_the_same_bits_again(quantize, device):
    model, _ = adapted(quantize, low(device), device)
    first, second = (step(model, None, device) for _ in range(2))
    for key, t in first.items():
        assert torch.equal(t, second[key]), key
