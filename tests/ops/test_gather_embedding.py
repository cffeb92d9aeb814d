"""Many adapters on an embedding: against its equation, by itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lora_kernels.functional import gather_lora_embedding, page_embedding_adapters
from lora_kernels.testing import assert_call_within_budget, assert_within_budget
from tests.ops.variants import all_variants

CPU = [v for v in all_variants() if v.device == "cpu" and v.backend in ("native", "reference")]
variants = pytest.mark.parametrize("variant", CPU, ids=str)

V, D, RANKS = 11, 6, (1, 20, 3)
SCALES = (2.0, 0.5, -1.0)


def adapters(dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    g = torch.Generator().manual_seed(1)
    a = [torch.randn(r, V, generator=g, dtype=torch.float64).to(dtype) for r in RANKS]
    b = [torch.randn(D, r, generator=g, dtype=torch.float64).to(dtype) for r in RANKS]
    return a, b


IDS = torch.tensor([[3, 3, 0, 10], [5, 3, 10, 1]])
SLOTS = torch.tensor([[1, 1, -1, 0], [2, -1, 1, 1]], dtype=torch.int32)


def ours(weight, a, b):
    pages = page_embedding_adapters([*a, None], [*b, None], [*SCALES, 9.0])
    return gather_lora_embedding(IDS, pages, SLOTS, weight=weight)


def plain(weight, a, b, scales=SCALES):
    y = F.embedding(IDS, weight).clone()
    for slot in range(len(RANKS)):
        y = torch.where(
            (slot == SLOTS)[..., None],
            y + scales[slot] * (F.embedding(IDS, a[slot].T) @ b[slot].T),
            y,
        )
    return y


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_equation(variant, dtype):
    with variant.active():
        assert_call_within_budget(ours, plain, [torch.randn(V, D).to(dtype), *adapters(dtype)])


@variants
def test_gradients_are_those_of_the_expression(variant):
    """Of the weight, of each adapter and of its scale."""
    dy = torch.randn(*IDS.shape, D, dtype=torch.float64)

    def gradients(call):
        def of(weight, a, b, scales):
            leaves = [t.detach().requires_grad_() for t in (weight, *a, *b, scales)]
            y = call(leaves[0], leaves[1:4], leaves[4:7], leaves[7])
            return torch.autograd.grad(y, leaves, dy.to(y.dtype))

        return of

    def paged(weight, a, b, scales):
        pages = page_embedding_adapters(a, b, scales)
        return gather_lora_embedding(IDS, pages, SLOTS, weight=weight)

    given = [torch.randn(V, D), *adapters(), torch.tensor(SCALES)]
    with variant.active():
        found = gradients(paged)(*given)
    oracle, expression = gradients(plain)(*_double(given)), gradients(plain)(*given)
    for name, *values in zip(NAMES, found, oracle, expression, strict=True):
        assert_within_budget(*values, name)


NAMES = ("weight", *(f"{f}{i}" for f in "ab" for i in range(3)), "scales")


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else [_double(v) for v in value]


def test_gradcheck():
    a, b = adapters(torch.float64)
    leaves = [torch.randn(V, D, dtype=torch.float64), *a, *b]
    scales = torch.tensor(SCALES, dtype=torch.float64)

    def call(weight, scales, *factors):
        pages = page_embedding_adapters(factors[:3], factors[3:], scales)
        return gather_lora_embedding(IDS, pages, SLOTS, weight=weight)

    inputs = [leaves[0], scales, *leaves[1:]]
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in inputs])


@variants
def test_a_token_without_adapter_is_the_embedding_to_the_bit(variant):
    with variant.active():
        _without_adapter()


def _without_adapter():
    weight = torch.randn(V, D)
    weight[0] = -0.0
    y, alone = ours(weight, *adapters()), F.embedding(IDS, weight)
    nobody = SLOTS < 0
    assert torch.equal(y[nobody].view(torch.int32), alone[nobody].view(torch.int32))
    assert not torch.equal(y, alone)
    pages = page_embedding_adapters(*adapters(), SCALES)
    out = alone.clone()
    assert gather_lora_embedding(IDS, pages, SLOTS, out=out) is out
    assert torch.equal(out.view(torch.int32), y.view(torch.int32))
    own = gather_lora_embedding(IDS, pages, SLOTS[:, 0])
    assert torch.equal(own[1], gather_lora_embedding(IDS, pages, SLOTS[:, :1].expand(2, 4))[1])


@variants
def test_gradients_of_an_absent_adapter_are_zeros(variant):
    a, b = adapters()
    pages = page_embedding_adapters([t.requires_grad_() for t in a], b, SCALES)
    with variant.active():
        gather_lora_embedding(IDS, pages, torch.full((2,), 1, dtype=torch.int32)).sum().backward()
    assert not a[0].grad.any() and not a[2].grad.any()
    present = IDS.unique()
    absent = [v for v in range(V) if v not in present]
    assert not a[1].grad[:, absent].any() and a[1].grad[:, present].all()


PAGES = page_embedding_adapters(*adapters(), SCALES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": IDS + 1}, ValueError, "ids: got 11 .*expected 0 to 10"),
        ({"ids": IDS - 1}, ValueError, "ids: got -1 .*expected 0 to 10"),
        ({"ids": IDS.float()}, TypeError, "ids: got dtype float32"),
        ({"slots": SLOTS + 1}, ValueError, "slots: got 3 .*expected -1 to 2"),
        ({"slots": SLOTS.long()}, TypeError, "slots: got dtype int64"),
        ({"slots": SLOTS[:, :2]}, ValueError, r"slots: got shape \[2, 2\]"),
        ({"weight": torch.zeros(V, D + 1)}, ValueError, "weight: got shape"),
        ({"pages": PAGES._replace(a=PAGES.b)}, ValueError, "pages.a: got shape"),
        ({"pages": PAGES._replace(b=PAGES.b[:1])}, ValueError, "pages.b: got shape"),
        ({"pages": PAGES._replace(table=PAGES.table + 9)}, ValueError, "pages.table: got page"),
        ({"out": torch.zeros(2, 4, D + 1)}, ValueError, r"out: got shape \[2, 4, 7\]"),
        ({"out": torch.zeros(2, 4, D), "weight": torch.zeros(V, D)}, ValueError, "weight: was"),
    ],
)
@variants
def test_bad_input(variant, changes, error, message):
    given = {"ids": IDS, "pages": PAGES, "slots": SLOTS} | changes
    with variant.active(), pytest.raises(error, match=message):
        gather_lora_embedding(**given)
