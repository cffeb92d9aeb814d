"""The Triton kernels of packed projections and the gated MLP over 4-bit weights: what is launched,
and the MLP whole."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lora_kernels.ops.common.configs import DEVICES
from lora_kernels.ops.common.launch import use_executor
from lora_kernels.ops.common.strategies import use_strategy
from lora_kernels.testing import assert_within_budget
from tests.ops.packed_calls import SEED, call, quantised, results, tensors, textbook, total
from tests.ops.variants import Variant, interpreting
from tools.gpu_proofs.recorder import Recorder, record
from tools.op_inputs import arguments
from tools.op_inputs.packed import Packed
from tools.op_inputs.source import Source

NESTED, PLAIN = "nf4-nested", "nf4"


def _kernels(op, bases, strategy):
    """The names of the kernels that a call of three projections launches."""
    args = arguments(op, Packed(m=64, k=128, bases=bases), Source())
    function = getattr(torch.ops.lora_kernels, op).default
    launches = record(DEVICES[0], lambda: function(*args), strategy)
    return [launch.kernel.fn.__name__ for launch in launches]


@pytest.mark.parametrize("base", [NESTED, PLAIN, "fp4-nested-b32"])
def test_projections_of_one_format_share_a_launch(base):
    one = ["_packed_forward_kernel"]
    assert _kernels("lora_packed_fwd", (base,) * 3, "single_pass") == one
    launched = _kernels("lora_packed_bwd", (base,) * 3, "single_pass")
    assert launched.count("_packed_grad_x_kernel") == 1


@pytest.mark.parametrize(
    ("bases", "launches"),
    [((NESTED, NESTED, PLAIN), 2), ((NESTED, "dense", NESTED), 3), (("dense", PLAIN, PLAIN), 2)],
    ids=str,
)
def test_neighbours_of_another_format_get_their_own(bases, launches):
    assert len(_kernels("lora_packed_fwd", bases, "single_pass")) == launches


def test_mlp_over_4_bit_weights_stays_with_triton():
    """No backend but Triton's is allowed, and no product of the vendor's is needed."""
    recorder = Recorder(DEVICES[0])
    t = tensors("mlp", torch.bfloat16)
    with Variant("triton").active(), use_executor(recorder), use_strategy("epilogue"):
        total(call("mlp", t, quantised(t, "nf4"), dropout_p=0.1, seed=SEED)).backward()
    names = {launch.kernel.fn.__name__ for launch in recorder.launches}
    assert {"_packed_forward_kernel", "_packed_grad_x_kernel", "_lora_gemm_kernel"} <= names
    assert not recorder.products


@pytest.mark.skipif(not interpreting(), reason="interprets the kernels: TRITON_INTERPRET=1")
def test_mlp_over_4_bit_weights_is_the_textbook():
    """Outputs and every gradient against autograd's own operations."""
    options = {"dropout_p": 0.3, "seed": SEED}
    draws = []
    for _ in range(4):
        t = tensors("mlp", torch.float32, lead=(33,))
        weights = quantised(t, "nf4")
        with Variant("triton").active():
            ours = results("mlp", t, "nf4", weights, torch.float32, call, **options)
        plain = results("mlp", t, "nf4", weights, torch.float32, textbook, **options)
        oracle = results(
            "mlp", t, "nf4", weights, torch.float32, textbook, torch.Tensor.double, **options
        )
        draws.append({name: (ours[name], oracle[name], plain[name]) for name in ours})
    for name in draws[0]:
        stacked = (torch.stack(t) for t in zip(*(draw[name] for draw in draws), strict=True))
        assert_within_budget(*stacked, name)
