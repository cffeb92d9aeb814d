"""Many adapters in one batch: gradients, what must be exact, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from lora_kernels.functional import Mixture, RankPages, SlotDropout, page_adapters
from lora_kernels.ops.gather.api import rows_of_slots
from tests.ops.variants import all_variants

T, K, N = 7, 20, 12
RANKS = (3, 17, 1)
VARIANTS = [v for v in all_variants() if v.backend != "triton" and v.device == "cpu"]


def adapters(dtype: torch.dtype, ranks=RANKS, k: int = K, n: int = N) -> list[list[Tensor]]:
    g = torch.Generator().manual_seed(5)
    a = [torch.randn(r, k, generator=g, dtype=torch.float64) / k**0.5 for r in ranks]
    b = [torch.randn(n, r, generator=g, dtype=torch.float64) for r in ranks]
    return [[t.to(dtype).requires_grad_() for t in ts] for ts in (a, b)]


def pages_of(dtype: torch.dtype, **kwargs) -> RankPages:
    pages = page_adapters(*adapters(dtype, **kwargs), [0.5, 2.0, 1.5])
    return RankPages(*(t.detach() for t in pages))


def slots_of(*slots: int) -> Tensor:
    return torch.tensor(slots, dtype=torch.int32)


SLOTS = slots_of(1, 0, -1, 2, 1, 1, 0)
MIXTURE = (slots_of(4, 0, 0, 6, 4), slots_of(0, 1, 0, -1, 2))


def test_gradients_are_those_of_the_expression():
    """Down to the separate adapters that the pages are made of."""
    a, b = adapters(torch.float64)
    x = torch.randn(T, K, dtype=torch.float64, requires_grad=True)
    w = torch.randn(N, K, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(N, dtype=torch.float64, requires_grad=True)
    scales = torch.rand(3, dtype=torch.float64, requires_grad=True)
    dropout = SlotDropout(torch.tensor([1, 2, 3]), torch.tensor([0, 20000, 5], dtype=torch.int32))

    def each(x, w, bias, scales, *ab):
        pages = page_adapters(ab[:3], ab[3:], scales)
        return F.gather_lora(x, pages, SLOTS, base=w, bias=bias, dropout=dropout)

    def mixed(x, weights, scales, *ab):
        pages = page_adapters(ab[:3], ab[3:], scales)
        return F.gather_lora(x, [pages, pages], Mixture(*MIXTURE, weights))

    assert torch.autograd.gradcheck(each, (x, w, bias, scales, *a, *b))
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixed, (x, weights, scales, *a, *b))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("quantised", [False, True])
def test_a_token_without_adapter_is_the_base_alone(variant, quantised):
    x, w = torch.randn(T, K).bfloat16(), torch.randn(N, K).bfloat16()
    base = NF4Weight.quantize(w) if quantised else w
    nobody = torch.full_like(SLOTS, -1)
    with variant.active():
        alone = F.gather_lora(x, pages_of(torch.bfloat16), nobody, base=base)
        y = F.gather_lora(x, pages_of(torch.bfloat16), SLOTS, base=base)
        plain = F.nf4_linear(x, base) if quantised else None
    rows = SLOTS < 0
    assert torch.equal(y[rows], alone[rows])
    assert not torch.equal(y[~rows], alone[~rows])
    assert plain is None or torch.equal(alone, plain)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_token_does_not_depend_on_its_batch(variant):
    """Nor on the number of threads, to the bit."""
    x, pages = torch.randn(T, K).bfloat16(), pages_of(torch.bfloat16)
    threads = torch.get_num_threads()
    with variant.active():
        y = F.gather_lora(x, pages, SLOTS)
        order = torch.tensor([3, 0, 6, 5, 1])
        try:
            torch.set_num_threads(1)
            assert torch.equal(F.gather_lora(x[order], pages, SLOTS[order]), y[order])
            one = [F.gather_lora(x[i : i + 1], pages, SLOTS[i : i + 1]) for i in range(T)]
        finally:
            torch.set_num_threads(threads)
        if variant.backend == "native":  # torch's own products depend on the number of rows
            assert torch.equal(torch.cat(one), y)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_adapters_that_nobody_uses_get_zeros(variant):
    a, b = adapters(torch.float32)
    with variant.active():
        pages = page_adapters(a, b, [1.0] * 3)
        F.gather_lora(torch.randn(2, K), pages, slots_of(0, 0)).sum().backward()
    for t in (a[0], b[0]):
        assert t.grad.abs().sum() > 0
    for t in (*a[1:], *b[1:]):
        assert t.grad.shape == t.shape and not t.grad.any()


def test_a_slot_for_each_sequence():
    x, pages = torch.randn(2, 3, K), pages_of(torch.float32)
    y = F.gather_lora(x, pages, slots_of(2, -1))
    flat = F.gather_lora(x.view(6, K), pages, slots_of(2, 2, 2, -1, -1, -1))
    assert torch.equal(y.view(6, N), flat)
    assert not y[1].any()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_out_is_added_to_or_written_over(variant):
    x, pages = torch.randn(T, K), pages_of(torch.float32)
    wide = torch.randn(T, N + 5)
    before = wide.clone()
    out = wide[:, 2 : N + 2]
    with variant.active():
        z = F.gather_lora(x, pages, SLOTS)
        assert F.gather_lora(x, pages, SLOTS, out=out) is out
        assert torch.equal(out, before[:, 2 : N + 2] + z)
        F.gather_lora(x, pages, SLOTS, out=out, add=False)
    assert torch.equal(out, z)
    assert torch.equal(wide[:, :2], before[:, :2]) and torch.equal(wide[:, -3:], before[:, -3:])


def test_an_adapter_drops_as_in_a_batch_of_its_own():
    slots = slots_of(1, 0, 1, -1, 1, 0)
    assert rows_of_slots(slots).tolist() == [0, 0, 1, 0, 2, 1]
    x, pages = torch.randn(6, K), pages_of(torch.float32)
    dropout = SlotDropout(torch.tensor([7, 8, 9]), torch.full((3,), 30000, dtype=torch.int32))
    y = F.gather_lora(x, pages, slots, dropout=dropout)
    for slot in (0, 1):
        own = slots == slot
        assert torch.equal(y[own], F.gather_lora(x[own], pages, slots[own], dropout=dropout))


def test_compiles_whole():
    x, w = torch.randn(T, K), torch.randn(N, K)
    a, b = adapters(torch.float32)

    def call(x, slots):
        return F.gather_lora(x, page_adapters(a, b, [1.0, 2.0, 3.0]), slots, base=w)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for t in (7, 3):
        x = torch.randn(t, K, requires_grad=True)
        found = []
        for f in (call, compiled):
            y = f(x, SLOTS[:t])
            found.append([y, *torch.autograd.grad(y.sum(), [x, *a[:1], *b[:1]])])
        assert all(map(torch.equal, *found))


PAGES = pages_of(torch.float32)
BAD = {
    "slots: got 3 at 1": {"slots": slots_of(0, 3, 0, 0, 0, 0, 0)},
    "slots: got -2 at 0": {"slots": slots_of(-2, 0, 0, 0, 0, 0, 0)},
    "tokens: got 7 at 2": {"slots": Mixture(slots_of(0, 1, 7), slots_of(0, 0, 0), torch.ones(3))},
    r"slots: got shape \[6\]": {"slots": SLOTS[:6]},
    "slots: got dtype int64": {"slots": SLOTS.long()},
    r"pages.*table: got page 9": {
        "pages": PAGES._replace(table=PAGES.table + 9 - PAGES.table[0, 0])
    },
    r"pages.*ranks: got 33 at": {"pages": PAGES._replace(ranks=slots_of(3, 33, 1))},
    r"pages\[0\].b: got dtype": {"pages": PAGES._replace(b=PAGES.b.bfloat16())},
    r"pages\[0\].a: got shape": {"x": torch.randn(T, K + 1)},
    r"pages: give 12 outputs": {"base": torch.randn(N + 1, K)},
    "base: was given beside out": {"base": torch.randn(N, K), "out": torch.zeros(T, N)},
    r"out: got shape": {"out": torch.zeros(T - 1, N)},
}


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("message", BAD)
def test_bad_input_names_the_argument(variant, message):
    call = {"x": torch.randn(T, K), "pages": PAGES, "slots": SLOTS} | BAD[message]
    with variant.active(), pytest.raises((ValueError, TypeError), match=message):
        F.gather_lora(call.pop("x"), call.pop("pages"), call.pop("slots"), **call)


def test_page_adapters_says_what_does_not_fit():
    a, b = adapters(torch.float32)
    with pytest.raises(ValueError, match=r"^lora_b: got 2 adapters"):
        page_adapters(a, b[:2], [1.0] * 3)
    with pytest.raises(ValueError, match=r"^lora_b\[1\]: got shape"):
        page_adapters(a, [b[0], b[0], b[2]], [1.0] * 3)
    with pytest.raises(ValueError, match=r"^lora_a: got \[None\]"):
        page_adapters([None], [None], [1.0])
    with use_backend("reference"):
        pages = page_adapters([a[0], None], [b[0], None], [1.0, 1.0])
    assert pages.ranks.tolist() == [3, 0]
