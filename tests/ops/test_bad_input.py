"""Every public function refuses what it cannot take, and names the argument."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F

M, N, K, R = 4, 6, 10, 3
BF16 = torch.bfloat16


def _lora(**changes):
    given = dict(x=torch.randn(M, K), weight=torch.randn(N, K), lora_a=torch.randn(R, K))
    return F.lora_linear(**given | dict(lora_b=torch.randn(N, R), dropout_p=0.1) | changes)


def _nf4_lora(**changes):
    given = dict(x=torch.randn(M, K), qweight=_qweight(), lora_a=torch.randn(R, K))
    return F.nf4_lora_linear(**given | dict(lora_b=torch.randn(N, R), dropout_p=0.1) | changes)


def _nf4(**changes):
    return F.nf4_linear(**dict(x=torch.randn(M, K), qweight=_qweight()) | changes)


def _qweight(**changes):
    return NF4Weight.quantize(torch.randn(N, K), 32).with_tensors(changes)


def _ones(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(*shape, dtype=dtype, device=device)


U8, I8, I32, I64 = torch.uint8, torch.int8, torch.int32, torch.int64
META = dict(device="meta")
META_SAYS = "is on meta, expected cpu"

# argument, its wrong value, the error, and what it says after the argument's name
SHARED = [
    ("x", _ones(()), ValueError, r"got shape \[\], expected \[\.\.\., 10\]"),
    ("x", _ones(M, K + 1), ValueError, r"got shape \[4, 11\]"),
    ("x", _ones(M, K, dtype=I64), TypeError, "got dtype int64"),
    ("x", _ones(M, K, dtype=torch.complex64), TypeError, "got dtype complex64"),
    ("bias", _ones(N, 1), ValueError, r"got shape \[6, 1\], expected \[6\]"),
    ("bias", _ones(N, dtype=BF16), TypeError, "got dtype bfloat16, expected float32"),
    ("bias", _ones(N, **META), ValueError, META_SAYS),
]
ADAPTERS = [
    ("lora_a", _ones(0, K), ValueError, r"got shape \[0, 10\], expected a rank of 1 or more"),
    ("lora_a", _ones(R, K + 1), ValueError, r"got shape \[3, 11\], expected \[r, 10\]"),
    ("lora_a", _ones(K), ValueError, r"got shape \[10\]"),
    ("lora_a", _ones(K, R), ValueError, r"got shape \[10, 3\]"),
    ("lora_a", _ones(R, K, dtype=I32), TypeError, "got dtype int32"),
    ("lora_a", _ones(R, K, **META), ValueError, META_SAYS),
    ("lora_b", _ones(N + 1, R), ValueError, r"got shape \[7, 3\], expected \[6, 3\]"),
    ("lora_b", _ones(N, R + 1), ValueError, r"got shape \[6, 4\], expected \[6, 3\]"),
    ("lora_b", _ones(N, R, dtype=BF16), TypeError, "got dtype .*bfloat16, expected .*float32"),
    ("lora_b", _ones(N, R, **META), ValueError, META_SAYS),
    ("rank_diag", _ones(N), ValueError, r"got shape \[6\], expected \[3\]"),
    ("rank_diag", _ones(R, dtype=torch.bool), TypeError, "got dtype bool"),
    ("rank_diag", _ones(R, **META), ValueError, META_SAYS),
    ("out_diag", _ones(R), ValueError, r"got shape \[3\], expected \[6\]"),
    ("out_diag", _ones(N, dtype=I32), TypeError, "got dtype int32"),
    ("out_diag", _ones(N, **META), ValueError, META_SAYS),
    ("dropout_p", -0.1, ValueError, "got -0.1, expected 0 <= dropout_p"),
    ("dropout_p", 1.0, ValueError, "got 1.0"),
    ("dropout_p", 1 - 1e-7, ValueError, "got 0.9999999"),
    ("dropout_p", float("nan"), ValueError, "got nan"),
    ("seed", _ones(1, dtype=I32), TypeError, "got dtype int32, expected int64"),
    ("seed", _ones(2, dtype=I64), ValueError, r"got shape \[2\], expected \[1\]"),
    ("seed", _ones(1, dtype=I64, **META), ValueError, META_SAYS),
]
DENSE = [
    ("weight", _ones(()), ValueError, r"got shape \[\], expected \[N, K\]"),
    ("weight", _ones(K), ValueError, r"got shape \[10\], expected \[N, K\]"),
    ("weight", _ones(1, N, K), ValueError, r"got shape \[1, 6, 10\]"),
    ("weight", _ones(N, K, dtype=BF16), TypeError, "got dtype bfloat16, expected float32"),
    ("weight", _ones(N, K, dtype=I8), TypeError, "got dtype int8"),
    ("weight", _ones(N, K, **META), ValueError, META_SAYS),
]
QUANTISED = [
    ("packed", _ones(29, dtype=U8), ValueError, r"got shape \[29\], expected \[30\]"),
    ("packed", _ones(30, dtype=I8), TypeError, "got dtype int8, expected uint8"),
    ("packed", _ones(60, dtype=U8)[::2], ValueError, r"has stride \[2\], expected contiguous"),
    ("absmax", _ones(1, dtype=U8), ValueError, r"got shape \[1\], expected \[2\]"),
    ("absmax", _ones(2), TypeError, "got dtype float32, expected uint8"),
    ("nested_absmax", _ones(2), ValueError, r"got shape \[2\], expected \[1\]"),
    ("nested_map", _ones(255), ValueError, r"got shape \[255\], expected \[256\]"),
    ("nested_offset", _ones(()), ValueError, r"got shape \[\], expected \[1\]"),
]
CALLS = {_lora: [SHARED, ADAPTERS, DENSE], _nf4_lora: [SHARED, ADAPTERS], _nf4: [SHARED]}


def _linear_cases():
    for call, tables in CALLS.items():
        for name, value, error, says in (row for table in tables for row in table):
            label = f"{call.__name__}-{name}-{says}"
            yield pytest.param(call, name, value, error, says, id=label)


@pytest.mark.parametrize(("call", "name", "value", "error", "says"), list(_linear_cases()))
def test_linear(call, name, value, error, says):
    call()  # the rest of the call is right
    with pytest.raises(error, match=f"^{name}: {says}"):
        call(**{name: value})


@pytest.mark.parametrize("call", [_nf4, _nf4_lora])
@pytest.mark.parametrize(("name", "value", "error", "says"), QUANTISED)
def test_quantised_weight(call, name, value, error, says):
    with pytest.raises(error, match=rf"^qweight\.{name}: {says}"):
        call(qweight=_qweight(**{name: value}))


@pytest.mark.parametrize("call", [_nf4, _nf4_lora])
def test_quantised_weight_on_another_device(call):
    with pytest.raises(ValueError, match=f"^qweight: {META_SAYS}"):
        call(qweight=_qweight().to("meta"))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.randn(4),), ValueError, r"w: got shape \[4\], expected \[N, K\]"),
        ((torch.randn(2, 2, 2),), ValueError, r"w: got shape \[2, 2, 2\]"),
        ((torch.ones(2, 2, dtype=torch.int32),), TypeError, "w: got dtype int32"),
        ((torch.randn(2, 2), 48), ValueError, "block_size: got 48, expected a power of two"),
        ((torch.randn(2, 2), 16), ValueError, "block_size: got 16"),
        ((torch.randn(2, 2), 8192), ValueError, "block_size: got 8192"),
        ((torch.randn(2, 2), 64, True, "int4"), ValueError, "quant_type: got 'int4'"),
    ],
)
def test_quantize(args, error, message):
    with pytest.raises(error, match=f"^{message}"):
        NF4Weight.quantize(*args)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", [None, "native", "reference"])
@pytest.mark.parametrize("name", ["absmax", "nested_map", "nested_offset"])
def test_quantize_scales(name, backend, device):
    sizes = {"absmax": 3, "nested_map": 256, "nested_offset": 1}
    tensors = {k: _ones(n, device=device) for k, n in sizes.items()}
    tensors[name] = tensors[name].double()
    with (
        use_backend(backend),
        pytest.raises(TypeError, match=f"^{name}: got dtype float64, expected float32$"),
    ):
        torch.ops.lora_kernels.nf4_quantize_scales(*tensors.values(), 256)


def test_check_of_a_weight():
    _qweight().check()
    with pytest.raises(ValueError, match=r"^qweight\.packed: got shape \[3\]"):
        _qweight(packed=torch.zeros(3, dtype=torch.uint8)).check()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (((), 0.5, 1), ValueError, "shape: got no dimension"),
        (((-1, 4), 0.5, 1), ValueError, r"shape: got \[-1, 4\]"),
        (((3, 4), 1.0, 1), ValueError, "dropout_p: got 1.0"),
        (((3, 4), -0.5, 1), ValueError, "dropout_p: got -0.5"),
        (((3, 4), 0.5, 2**63), ValueError, "seed: got 9223372036854775808"),
        (((3, 4), 0.5, torch.tensor([1.0])), TypeError, "seed: got dtype float32, expected int64"),
        (((3, 4), 0.5, torch.tensor([1, 2])), ValueError, r"seed: got shape \[2\], expected \[1\]"),
        (((3, 4), 0.5, 1, -1), ValueError, "stream: got -1"),
        (((3, 4), 0.5, 1, 2**32), ValueError, "stream: got 4294967296"),
    ],
)
def test_dropout_mask(args, error, message):
    with pytest.raises(error, match=f"^{message}"):
        F.dropout_mask(*args)


def _packed(**changes):
    given = _projections([(N, K), (N + 2, K), (2, K)])
    return F.lora_packed_linear(**given | changes)


def _mlp(**changes):
    given = _projections([(N, K), (N, K), (2, N)])
    return F.lora_mlp(**given | changes)


def _projections(sizes):
    return {
        "x": torch.randn(M, K),
        "weights": [torch.randn(n, k) for n, k in sizes],
        "lora_a": [torch.randn(R, k) for _, k in sizes],
        "lora_b": [torch.randn(n, R) for n, _ in sizes],
        "scales": [1.0] * 3,
        "biases": [torch.randn(n) for n, _ in sizes],
        "dropout_p": 0.1,
    }


# argument, the entry of it that is wrong (None: all of it), and as above
PACKED = [
    ("x", None, _ones(()), ValueError, r"x: got shape \[\], expected \[\.\.\., K\]"),
    ("x", None, _ones(M, K, dtype=I64), TypeError, "x: got dtype int64"),
    (
        "x",
        None,
        _ones(M, K + 1),
        ValueError,
        r"weights\[0\]: got shape \[6, 10\], expected \[N, 11\]",
    ),
    ("weights", None, [], ValueError, "weights: got (no entry|0 entries), expected"),
    ("weights", 1, _ones(K), ValueError, r"weights\[1\]: got shape \[10\], expected \[N, K\]"),
    (
        "weights",
        1,
        _ones(N, K + 1),
        ValueError,
        r"weights\[1\]: got shape \[6, 11\], expected \[N, 10\]",
    ),
    (
        "weights",
        1,
        _ones(N, K, dtype=BF16),
        TypeError,
        r"weights\[1\]: got dtype bfloat16, expected",
    ),
    ("weights", 1, _ones(N, K, **META), ValueError, rf"weights\[1\]: {META_SAYS}"),
    ("weights", 1, "w", TypeError, r"weights\[1\]: got 'w', expected a Tensor or an NF4Weight"),
    (
        "weights",
        1,
        _qweight(packed=_ones(29, dtype=U8)),
        ValueError,
        r"weights\[1\]: qweight.packed: got",
    ),
    ("weights", 1, _qweight().to("meta"), ValueError, rf"weights\[1\]: {META_SAYS}"),
    ("lora_a", None, [_ones(R, K)], ValueError, "lora_a: got 1 entries, expected 3 as weights has"),
    ("lora_a", 1, None, TypeError, r"lora_a\[1\]: got None, expected a Tensor"),
    ("lora_a", 1, _ones(0, K), ValueError, r"lora_a\[1\]: got shape \[0, 10\], expected a rank"),
    (
        "lora_a",
        1,
        _ones(R, K + 1),
        ValueError,
        r"lora_a\[1\]: got shape \[3, 11\], expected \[r, 10\]",
    ),
    ("lora_a", 1, _ones(R, K, dtype=I32), TypeError, r"lora_a\[1\]: got dtype int32"),
    ("lora_a", 1, _ones(R, K, dtype=BF16), TypeError, r"lora_a\[1\]: got dtype bfloat16, expected"),
    ("lora_a", 1, _ones(R, K, **META), ValueError, rf"lora_a\[1\]: {META_SAYS}"),
    ("lora_b", 1, _ones(1, R), ValueError, r"lora_b\[1\]: got shape \[1, 3\], expected \["),
    ("lora_b", 1, _ones(N, R + 1), ValueError, r"lora_b\[1\]: got shape \[6, 4\], expected \["),
    (
        "lora_b",
        0,
        _ones(N, R, dtype=BF16),
        TypeError,
        r"lora_b\[0\]: got dtype bfloat16, expected float32",
    ),
    ("lora_b", 0, _ones(N, R, **META), ValueError, rf"lora_b\[0\]: {META_SAYS}"),
    ("scales", None, [1.0, 2.0], ValueError, "scales: got 2 entries, expected 3 as weights has"),
    ("biases", None, [None] * 4, ValueError, "biases: got 4 entries, expected 3 as weights has"),
    ("biases", 0, _ones(N, 1), ValueError, r"biases\[0\]: got shape \[6, 1\], expected \[6\]"),
    (
        "biases",
        0,
        _ones(N, dtype=BF16),
        TypeError,
        r"biases\[0\]: got dtype bfloat16, expected float32",
    ),
    ("dropout_p", None, 1.0, ValueError, "dropout_p: got 1.0"),
    ("seed", None, _ones(2, dtype=I64), ValueError, r"seed: got shape \[2\], expected \[1\]"),
    ("seed", None, _ones(1, dtype=I32), TypeError, "seed: got dtype int32, expected int64"),
    ("seed", None, _ones(1, dtype=I64, **META), ValueError, f"seed: {META_SAYS}"),
]


@pytest.mark.parametrize("call", [_packed, _mlp])
@pytest.mark.parametrize(("name", "entry", "value", "error", "message"), PACKED)
def test_packed(call, name, entry, value, error, message):
    call()
    if entry is not None:
        given = _projections([(N, K), (N if call is _mlp else N + 2, K), (2, N)])[name]
        if call is _packed:
            given = _projections([(N, K), (N + 2, K), (2, K)])[name]
        given[entry] = value
        value = given
    with pytest.raises(error, match=f"^{message}"):
        call(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [_ones(N, K)] * 2}, "weights: got 2 entries, expected 3: gate, up and down"),
        ({"activation": "relu"}, "activation: got 'relu', expected one of silu, gelu, gelu_tanh"),
        (
            _projections([(N, K), (N + 1, K), (2, N)]),
            r"weights\[1\]: got shape \[7, 10\], expected \[6, 10\] as weights\[0\] has",
        ),
        (
            _projections([(N, K), (N, K), (2, N + 1)]),
            r"weights\[2\]: got shape \[2, 7\], expected \[N, 6\]",
        ),
    ],
)
def test_mlp(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        _mlp(**changes)


def test_the_error_is_the_same_when_compiled():
    """Checks run while tracing, before a graph is built."""
    torch._dynamo.reset()
    compiled = torch.compile(_lora, backend="aot_eager")
    with pytest.raises(ValueError, match=r"x: got shape \[4, 11\]"):
        compiled(x=torch.randn(M, K + 1))
