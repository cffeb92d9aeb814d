"""What runs natively on CUDA tensors with a CUDA build of the extension.

The build is feigned: kernels registered for CUDA under the ops' native names. The tensors have
shapes and a device, no data.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lora_kernels import use_backend
from lora_kernels.dispatch import explain, native, ops
from lora_kernels.dispatch.op import NATIVE_NAMESPACE
from lora_kernels.ops.common import native as common

BINDINGS = Path(__file__).parents[2] / "csrc" / "bindings"
REGISTERED = sorted(
    name
    for file in BINDINGS.glob("*_cuda.cpp")
    for name in re.findall(r'm\.impl\("(\w+)"', file.read_text())
)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
N, K, R = 96, 128, 8


@pytest.fixture(autouse=True)
def _automatic():
    with use_backend(None):
        yield


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch):
    """As if the extension had been built with CUDA."""
    monkeypatch.setattr(native, "_load", lambda: native._Loaded(None, None))
    library = torch.library.Library(NATIVE_NAMESPACE, "IMPL", "CUDA")
    for op in REGISTERED:
        library.impl(op, lambda *args: None)
    common._missing.cache_clear()
    yield
    library._destroy()
    common._missing.cache_clear()


def refusal(op: str, *args: object) -> str | None:
    """Why the native backend refuses, or None."""
    (explanation,) = explain(op, *args)
    assert explanation.chosen == "native" or explanation.refusals["native"] is not None
    return explanation.refusals["native"]


def base(device: str, nested: bool = True):
    """A 4-bit weight [N, K] and its meta."""
    u8 = {"dtype": torch.uint8, "device": device}
    blocks = N * K // 64
    packed = torch.empty(N * K // 2, **u8)
    if not nested:
        return [packed, torch.empty(blocks, device=device)], [N, K, 64, 0, 0]
    sizes = (-(-blocks // 256), 256, 1)
    rest = [torch.empty(size, device=device) for size in sizes]
    return [packed, torch.empty(blocks, **u8), *rest], [N, K, 64, 0, 256]


def linear(m: int = 4, dtype: torch.dtype = BF16, device: str = "cuda"):
    return (torch.empty(m, K, dtype=dtype, device=device), *base(device), None)


def lora(m: int = 4, dtype: torch.dtype = BF16, adapter: torch.dtype | None = None, **changes):
    """Arguments of lora_linear_fwd."""
    adapter = adapter or dtype
    args = dict(
        x=torch.empty(m, K, dtype=dtype, device="cuda"),
        base=base("cuda")[0],
        meta=base("cuda")[1],
        a=torch.empty(R, K, dtype=adapter, device="cuda"),
        b=torch.empty(N, R, dtype=adapter, device="cuda"),
        scale=2.0,
        bias=None,
        dropout_p=0.0,
        seed=None,
        rank_diag=None,
        out_diag=None,
    )
    return tuple({**args, **changes}.values())


@pytest.fixture
def fake():
    with FakeTensorMode():
        yield


def test_what_is_registered() -> None:
    assert set(REGISTERED) <= set(ops())
    assert "nf4_linear_fwd" in REGISTERED and "lora_linear_fwd" in REGISTERED


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("m", "reason"), [(0, None), (64, None), (65, "up to 64 tokens on CUDA")])
def test_linear(cuda_build, fake, m, reason, dtype) -> None:
    for op, args in (("nf4_linear_fwd", linear), ("lora_linear_fwd", lora)):
        found = refusal(op, *args(m, dtype))
        assert found is None if reason is None else reason in found


def test_codec(cuda_build, fake) -> None:
    for nested in (False, True):
        assert refusal("nf4_dequantize", *base("cuda", nested), BF16) is None
    w = torch.empty(N, K, dtype=BF16, device="cuda")
    assert refusal("nf4_quantize", w, 64, 0) is None
    assert (
        refusal("nf4_quantize", w.double(), 64, 0)
        == "takes float32, float16, bfloat16, not float64"
    )
    scales = [torch.empty(size, device="cuda") for size in (300, 256, 1)]
    assert refusal("nf4_quantize_scales", *scales, 256) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"adapter": FP32}, None),
        ({"adapter": FP16}, "takes adapters in bfloat16, float32 on CUDA, not float16"),
        ({"adapter": BF16, "dtype": FP32}, "takes adapters in float32 on CUDA, not bfloat16"),
        ({"dropout_p": 0.1}, None),  # without a seed nothing is dropped
        ({"dropout_p": 0.1, "seed": 1}, "takes no dropout on CUDA"),
        ({"dropout_p": 0.0, "seed": 1}, None),
        ({"rank_diag": R}, "takes no diagonals on CUDA"),
        ({"out_diag": N}, "takes no diagonals on CUDA"),
        ({"meta": [N, K]}, "takes 4-bit weights on CUDA, not dense ones"),
    ],
    ids=str,
)
def test_lora(cuda_build, fake, changes, reason) -> None:
    for name in ("rank_diag", "out_diag", "seed"):
        if name in changes:
            dtype = torch.int64 if name == "seed" else BF16
            changes = {**changes, name: torch.empty(changes[name], dtype=dtype, device="cuda")}
    if "meta" in changes:
        changes = {**changes, "base": [torch.empty(N, K, dtype=BF16, device="cuda")]}
    found = refusal("lora_linear_fwd", *lora(**changes))
    assert found is None if reason is None else reason in found


def test_ops_without_a_kernel(cuda_build, fake) -> None:
    x, weight, meta, _ = linear()
    dy = torch.empty(4, N, dtype=BF16, device="cuda")
    missing = "the extension has no kernel of this op for cuda"
    assert refusal("nf4_linear_bwd", dy, weight, meta) == missing
    for op in sorted(set(ops()) - set(REGISTERED)):
        assert common.refuse_device(op, x.device) == missing


def test_the_cpu_takes_any_number_of_tokens(cuda_build) -> None:
    x, weight, meta, bias = linear(65, device="cpu")
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE_NAMESPACE}::nf4_linear_fwd", "CPU"):
        assert refusal("nf4_linear_fwd", x, weight, meta, bias) is None


@pytest.mark.skipif(
    not native.available() or bool(native.build_info()["cuda_archs"]),
    reason="needs the extension, built without CUDA",
)
def test_without_a_cuda_build(fake) -> None:
    x, weight, meta, bias = linear()
    missing = f"the extension has no kernel of this op for cuda: {native.why_without_cuda()}"
    assert refusal("nf4_linear_fwd", x, weight, meta, bias) == missing
    assert refusal("lora_linear_fwd", *lora()) == missing
    assert refusal("nf4_dequantize", weight, meta, BF16) == missing
