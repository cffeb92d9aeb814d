"""Arguments of the wrong kind: the error names the argument, what came and what was expected."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from lora_kernels import NF4Weight
from lora_kernels import functional as F
from lora_kernels.ops.dora import dora_norm

M, N, K, R = 4, 6, 32, 3


def _rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _nf4(n=N, k=K):
    return NF4Weight.quantize(_rand(n, k), 32)


def _factors():
    return dict(lora_a=_rand(R, K), lora_b=_rand(N, R), scale=0.5)


def _layer(**weight):
    shared = dict(bias=_rand(N), dropout_p=0.1, seed=torch.tensor([1]))
    return dict(x=_rand(M, K)) | weight | _factors() | shared


def _packed(sizes):
    return dict(
        x=_rand(M, K),
        weights=[_rand(n, k) for n, k in sizes],
        lora_a=[_rand(R, k) for _, k in sizes],
        lora_b=[_rand(n, R) for n, _ in sizes],
        scales=[1.0] * len(sizes),
        biases=[None] * len(sizes),
        dropout_p=0.1,
        seed=torch.tensor([1]),
    )


def _paged(k, n):
    return dict(lora_a=[_rand(R, k), None], lora_b=[_rand(n, R), None], scales=[1.0, 1.0])


def _slots():
    return torch.tensor([0, 1, -1, 0], dtype=torch.int32)


DIAGONALS = dict(rank_diag=_rand(R), out_diag=_rand(N))
CALLS = {
    F.lora_linear: _layer(weight=_rand(N, K)) | DIAGONALS,
    F.nf4_lora_linear: _layer(qweight=_nf4()) | DIAGONALS,
    F.nf4_linear: dict(x=_rand(M, K), qweight=_nf4(), bias=_rand(N)),
    F.dora_linear: _layer(weight=_rand(N, K), magnitude=_rand(N), weight_norm_sq=_rand(N)),
    dora_norm: dict(weight=_rand(N, K), weight_norm_sq=_rand(N)) | _factors(),
    F.weight_norm_squared: dict(weight=_rand(N, K)),
    F.gated_activation: dict(gate=_rand(M, K), up=_rand(M, K), activation="silu"),
    F.lora_packed_linear: _packed([(N, K), (8, K)]),
    F.lora_mlp: _packed([(8, K), (8, K), (N, 8)]) | dict(activation="gelu"),
    F.gather_lora: dict(
        x=_rand(M, K),
        pages=F.page_adapters(**_paged(K, N)),
        slots=_slots(),
        base=_rand(N, K),
        bias=_rand(N),
    ),
    F.gather_lora_embedding: dict(
        ids=torch.tensor([0, 5, 1, 1]),
        pages=F.page_embedding_adapters(**_paged(N, 8)),
        slots=_slots(),
        weight=_rand(N, 8),
    ),
    F.page_adapters: _paged(K, N),
    F.page_embedding_adapters: _paged(K, N),
    F.linear_cross_entropy: dict(
        x=_rand(M, K),
        weight=_rand(N, K),
        labels=torch.tensor([0, 1, 2, -100]),
        ignore_index=-100,
        num_items=3,
    ),
    F.dropout_mask: dict(shape=[3, 4], p=0.5, seed=1, stream=0),
    NF4Weight.quantize: dict(w=_rand(N, K), block_size=64, double_quant=True, quant_type="nf4"),
}
WRONG = [None, np.ones((M, K), np.float32), "a string", object(), _nf4(), _rand(N, K), [_rand(2)]]
WRONG += [[1.0, "b"], torch.nn.Linear(K, N), {}]
WRONG_IDS = ["None", "numpy", "str", "object", "NF4Weight", "Tensor", "tensors", "list"]
WRONG_IDS += ["module", "dict"]
CASES = [
    pytest.param(call, name, id=f"{call.__qualname__}-{name}")
    for call, given in CALLS.items()
    for name in given
]


@pytest.mark.parametrize(("call", "name"), CASES)
def test_the_argument_is_named(call, name):
    given = CALLS[call]
    call(**given)
    hint = str(inspect.signature(call).parameters[name].annotation)
    refused = 0
    for value, kind in zip(WRONG, WRONG_IDS, strict=True):
        allowed = hint.split(" | ")
        allowed += ["tensors"] if hint.startswith("Sequence[Tensor") else []
        if kind in allowed:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{name}(\[|\.|: got )"):
            call(**given | {name: value})
            pytest.fail(f"took {kind}")
        refused += 1
    assert refused >= 6


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__qualname__)
def test_every_argument_is_in_the_table(call):
    missing = set(inspect.signature(call).parameters) - set(CALLS[call])
    assert missing <= {"out", "add", "dropout"}


@pytest.mark.parametrize("state", [None, np.ones(3), "weight", _nf4()])
def test_a_state_dict_is_named(state):
    with pytest.raises(TypeError, match=r"^state: got .*, expected a Mapping"):
        NF4Weight.from_state_dict(state)


def test_a_part_of_an_argument_is_named():
    pages = F.page_adapters(**_paged(K, N))
    with pytest.raises(TypeError, match=r"^pages\[0\].ranks: got numpy.ndarray \[2\], exp"):
        F.gather_lora(_rand(M, K), pages._replace(ranks=np.ones(2, np.int32)), _slots())
    with pytest.raises(TypeError, match=r"^qweight.absmax: got None, expected a Tensor"):
        F.nf4_linear(_rand(M, K), _nf4().with_tensors({"absmax": None}))
    packed = CALLS[F.lora_packed_linear]
    with pytest.raises(TypeError, match=r"^scales\[1\]: got '2', expected a number"):
        F.lora_packed_linear(**packed | {"scales": [1.0, "2"]})


def test_what_was_expected_is_in_plain_words():
    x, weight, factors = _rand(M, K), _rand(N, K), (_rand(R, K), _rand(N, R))
    for call, message in (
        (
            lambda: F.nf4_linear(x, weight),
            "qweight: got Tensor [6, 32], expected an NF4Weight",
        ),
        (
            lambda: F.lora_linear(x, _nf4(), *factors),
            "weight: got lora_kernels.NF4Weight [6, 32], expected a Tensor",
        ),
        (
            lambda: F.lora_linear(x.numpy(), weight, *factors),
            "x: got numpy.ndarray [4, 32], expected a Tensor",
        ),
        (
            lambda: F.lora_linear(x, weight, *factors, scale="2"),
            "scale: got '2', expected a number",
        ),
        (
            lambda: F.dora_linear(x, [weight], *factors, _rand(N)),
            "weight: got list, expected a Tensor or an NF4Weight",
        ),
        (
            lambda: F.lora_linear(x, weight, *factors, bias=1.0),
            "bias: got 1.0, expected a Tensor or None",
        ),
    ):
        with pytest.raises(TypeError) as error:
            call()
        assert str(error.value) == message
