"""What torch's FlopCounterMode says of the ops: what it says of plain PyTorch in their place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as P
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from lora_kernels import functional as F
from lora_kernels.dispatch import ops
from tests.ops.inputs import cases
from tests.ops.public_calls import CALLS, Call, Tensors
from tests.ops.variants import as_tuple

# Ops that move, decode or gate values, and multiply no matrices.
WITHOUT_PRODUCTS = {
    "cross_entropy",
    "dropout_mask",
    "glu_bwd",
    "glu_fwd",
    "nf4_dequantize",
    "nf4_quantize",
    "nf4_quantize_scales",
}


def _dense(w: Tensor | object) -> Tensor:
    return w if isinstance(w, Tensor) else w.dequantize()  # type: ignore[attr-defined]


def _lora(x: Tensor, w: object, a: Tensor, b: Tensor, t: Tensors | None = None) -> Tensor:
    t = t or {}
    s = P.linear(x * 1.5, a) * t.get("d", 1.0)
    return P.linear(x, _dense(w)) + P.linear(s, b) * t.get("g", 1.0)


def _dora(t: Tensors, w: Tensor, drops: bool) -> Tensor:
    with torch.no_grad():
        norm = torch.linalg.vector_norm(w + t["b"] @ t["a"], dim=1)
    scale = t["m"] / norm
    dropped = t["x"] * 1.5 if drops else t["x"]
    branch = P.linear(P.linear(dropped, t["a"]), t["b"])
    if not drops:
        return scale * (P.linear(dropped, w) + branch)
    return P.linear(t["x"], w) + (scale - 1) * P.linear(dropped, w) + scale * branch


def _packed(t: Tensors, weights: list) -> tuple[Tensor, ...]:
    return tuple(_lora(t["x"], w, t[f"a{i}"], t[f"b{i}"]) for i, w in enumerate(weights))


def _mlp(t: Tensors, weights: list) -> Tensor:
    gate, up = _packed(t, weights[:2])
    return _lora(P.silu(gate) * up, weights[2], t["a2"], t["b2"])


def _gathered(t: Tensors, slots: Tensor) -> tuple[Tensor, Tensor]:
    """A [E, 32, K] and B [E, 32, N] of each token; no slot here has more than 18 ranks."""
    padded = [
        torch.stack([P.pad(m, (0, 0, 0, 32 - m.shape[0])) for m in pair])
        for pair in ((t["a0"], t["a1"]), (t["b0"].T, t["b1"].T))
    ]
    a, b = (m[slots.clamp(min=0).long()] for m in padded)
    return a, b


def _gather(t: Tensors, f: dict, w: object) -> Tensor:
    a, b = _gathered(t, f["slots"])
    branch = torch.bmm(torch.bmm(t["x"][:, None], a.transpose(1, 2)), b)[:, 0]
    return P.linear(t["x"], _dense(w), t.get("bias")) + branch


def _embedding(t: Tensors, f: dict) -> Tensor:
    a, b = _gathered(t, f["slots"])
    s = torch.stack([a[i, :, id] for i, id in enumerate(f["ids"])])
    return P.embedding(f["ids"], t["w"]) + torch.bmm(s[:, None], b)[:, 0]


PLAIN: dict[str, Callable[[Tensors, dict], object]] = {
    "nf4_linear": lambda t, f: P.linear(t["x"], f["w"].dequantize(), t["bias"]),
    "lora_linear": lambda t, f: _lora(t["x"], t["w"], t["a"], t["b"], t),
    "nf4_lora_linear": lambda t, f: _lora(t["x"], f["w"], t["a"], t["b"]),
    "dora_linear": lambda t, f: _dora(t, t["w"], drops=False),
    "nf4_dora_linear": lambda t, f: _dora(t, f["w"].dequantize(), drops=True),
    "lora_packed_linear": lambda t, f: _packed(t, [t["w0"], t["w1"], t["w2"]]),
    "nf4_lora_packed_linear": lambda t, f: _packed(t, f["w"]),
    "lora_mlp": lambda t, f: _mlp(t, [t["w0"], t["w1"], t["w2"]]),
    "nf4_lora_mlp": lambda t, f: _mlp(t, f["w"]),
    "gated_activation": lambda t, f: P.silu(t["g"]) * t["u"],
    "linear_cross_entropy": lambda t, f: P.cross_entropy(P.linear(t["x"], t["w"]), f["labels"]),
    "gather_lora": lambda t, f: _gather(t, f, t["w"]),
    "nf4_gather_lora": lambda t, f: _gather(t, f, f["w"]),
    "gather_lora_embedding": lambda t, f: _embedding(t, f),
}


def _learns(kind: str, name: str) -> bool:
    adapter = name[0] in "abm" and name != "bias"
    return {"all": True, "none": False, "adapters": adapter, "x": name == "x"}[kind]


def _count(call: Call, run: Callable[[Tensors, dict], object], kind: str) -> int:
    t = {name: v.requires_grad_(_learns(kind, name)) for name, v in call.tensors().items()}
    fixed = call.fixed()
    counter = FlopCounterMode(display=False)
    with counter:
        outputs = as_tuple(run(t, fixed))
        if outputs[0].requires_grad:
            sum(y.sum() for y in outputs).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["none", "all", "adapters", "x"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_as_many_as_plain_pytorch(call: Call, kind: str) -> None:
    expected = _count(call, PLAIN[call.name], kind)
    actual = _count(call, call.run, kind)
    if call.name.endswith("lora_mlp") and kind in ("all", "adapters"):
        # The backward makes the product of dy and down's B twice, to keep nothing of its size.
        expected += 2 * call.shapes["x"][0] * call.shapes["b2"][0] * call.shapes["b2"][1]
    assert actual == expected
    assert (expected > 0) == (call.name != "gated_activation")


def test_in_place_beside_a_base() -> None:
    [call] = [c for c in CALLS if c.name == "gather_lora"]
    t, fixed = {k: v.detach() for k, v in call.tensors().items()}, call.fixed()
    counter = FlopCounterMode(display=False)
    pages = F.page_adapters([t["a0"], t["a1"]], [t["b0"], t["b1"]], [0.5, 2.0])
    with counter:
        F.gather_lora(t["x"], pages, fixed["slots"], out=torch.zeros(6, 12))
    assert counter.get_total_flops() == 6 * 32 * 2 * (20 + 12)


def test_every_op_has_a_formula() -> None:
    """`define` asks for one; this asks whether torch's counter has it, and that none is empty."""
    for name in ops():
        assert getattr(torch.ops.lora_kernels, name) in flop_registry, name
    nothing = set()
    for name in ops():
        with FlopCounterMode(display=False) as counter:
            for case in cases(name):
                if case.core:
                    getattr(torch.ops.lora_kernels, name)(*case.build())
        if counter.get_total_flops() == 0:
            nothing.add(name)
    assert nothing == WITHOUT_PRODUCTS


@pytest.mark.parametrize("counter_first", [False, True])
def test_whoever_is_imported_first(counter_first: bool) -> None:
    """The counter brings Triton with it, so the package alone does not import it."""
    imports = ["import lora_kernels", "from torch.utils.flop_counter import FlopCounterMode"]
    if counter_first:
        imports.reverse()
    script = [
        imports[0],
        "import sys, torch",
        "first = 'torch.utils.flop_counter' in sys.modules",
        imports[1],
        "layer = lora_kernels.QLoRALinear(16, 8, r=2)",
        "with FlopCounterMode(display=False) as counter: layer(torch.zeros(3, 16))",
        "print(first, counter.get_total_flops())",
    ]
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, check=True
    )
    flops = 2 * 3 * (16 * 8 + 16 * 2 + 2 * 8)
    assert run.stdout.split() == [str(counter_first), str(flops)]
