"""Many adapters in one batch: what must hold to the bit, and values that are not there."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from lora_kernels import NF4Weight, use_backend
from lora_kernels import functional as F
from lora_kernels.dispatch import native
from lora_kernels.ops.gather import (
    PAGE,
    Mixture,
    RankPages,
    SlotDropout,
    gather_lora,
    page_adapters,
)
from lora_kernels.testing import assert_within_budget
from tests.ops.variants import all_variants

T, K, N = 11, 24, 20
RANKS = (3, 18, 1, 40)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
I32 = torch.int32
CPU = [v for v in all_variants() if v.device == "cpu" and v.backend in ("native", "reference")]
variants = pytest.mark.parametrize("variant", CPU, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _adapters(
    dtype: torch.dtype, ranks: tuple[int, ...] = RANKS, k: int = K, n: int = N
) -> tuple[list[Tensor], list[Tensor]]:
    a = [_normal(r, k, dtype=dtype, seed=10 + i) for i, r in enumerate(ranks)]
    b = [_normal(n, r, dtype=dtype, seed=50 + i) for i, r in enumerate(ranks)]
    return a, b


def _pages(dtype: torch.dtype, ranks: tuple[int, ...] = RANKS, **sizes: int) -> RankPages:
    return page_adapters(*_adapters(dtype, ranks, **sizes), [0.5 + i for i in range(len(ranks))])


def _slots(count: int, slots: int = len(RANKS), seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, slots, (count,), generator=generator, dtype=I32)


def _mixture(entries: int, tokens: int, slots: int = len(RANKS)) -> Mixture:
    generator = torch.Generator().manual_seed(2)
    return Mixture(
        torch.randint(0, tokens, (entries,), generator=generator, dtype=I32),
        _slots(entries, slots),
        torch.rand(entries, generator=generator) + 0.5,
    )


@dtypes
@variants
def test_each_token_is_what_its_adapter_alone_gives(variant, dtype):
    """Against a LoRA layer over the rows of each slot, masks of dropout included."""
    a, b = _adapters(dtype)
    x, w, slots = _normal(T, K, dtype=dtype), _normal(N, K, dtype=dtype), _slots(T)
    seeds = torch.tensor([3, -4, 5, 6])
    thresholds = torch.tensor([16384, 0, 3000, 40000], dtype=I32)
    scales = [0.5, 2.0, 1.0, 0.25]
    assert set(slots.tolist()) == {-1, 0, 1, 2, 3}

    def ours(wide):
        t = [v.to(wide) for v in (x, w, *a, *b)]
        count = torch.tensor(scales, dtype=torch.promote_types(wide, torch.float32))
        pages = page_adapters(t[2:6], t[6:], count)
        return gather_lora(t[0], pages, slots, base=t[1], dropout=SlotDropout(seeds, thresholds))

    def alone(wide):
        t = [v.to(wide) for v in (x, w, *a, *b)]
        y = t[0] @ t[1].T
        for i in range(4):
            p = int(thresholds[i]) / 65536
            y[slots == i] = F.lora_linear(
                t[0][slots == i],
                *(t[1], t[2 + i], t[6 + i]),
                scale=scales[i],
                dropout_p=p,
                seed=seeds[i : i + 1],
            )
        return y

    with variant.active():
        y = ours(dtype)
    with use_backend("reference"):
        assert_within_budget(y, alone(torch.float64), alone(dtype))


@dtypes
@variants
@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_tokens_without_adapter_are_the_base_alone(variant, dtype, base):
    x, w, bias = (_normal(*s, dtype=dtype, seed=len(s)) for s in ((T, 64), (N, 64), (N,)))
    pages = _pages(dtype, (4, 0, 20), k=64)
    weight = w if base == "dense" else NF4Weight.quantize(w, 64)
    slots = torch.tensor([0, -1, 1, 2, -1, 1, 0, 2, -1, -1, 1], dtype=I32)
    op = torch.ops.lora_kernels.nf4_linear_fwd
    with variant.active():
        y = gather_lora(x, pages, slots, base=weight, bias=bias)
        if base == "nf4":
            alone = F.nf4_linear(x, weight, bias=bias)
        elif variant.backend == "native":
            alone = torch.nn.functional.linear(x, w, bias)
        else:
            alone = op(x, [w], [N, 64], bias)
    without = (slots == -1) | (slots == 1)
    assert torch.equal(y[without], alone[without])
    assert not torch.equal(y[~without], alone[~without])


def _company(dtype: torch.dtype, k: int, n: int) -> tuple[Tensor, RankPages, Tensor]:
    ranks = (1, 3, 8, 12, 16, 24, 33, 48, 96, 200, 256)
    slots = _slots(70, len(ranks))
    slots[5:30] = 6  # enough tokens of one adapter for every kernel
    return _normal(70, k, dtype=dtype), _pages(dtype, ranks, k=k, n=n), slots


@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize(("k", "n"), [(97, 130), (1100, 70)])
@dtypes
def test_a_token_does_not_depend_on_its_company(isa, dtype, k, n):
    """Bit for bit: alone, beside any others, on any number of threads, its adapter in any slot."""
    x, pages, slots = _company(dtype, k, n)
    moved = torch.randperm(pages.slots, generator=torch.Generator().manual_seed(3))
    back = moved.argsort().to(I32)
    elsewhere = RankPages(*pages[:2], pages.table[moved], pages.ranks[moved], pages.scales[moved])
    names = torch.where(slots < 0, slots, back[slots.clamp(min=0)])
    threads = torch.get_num_threads()
    with native.use_isa(isa), use_backend("native"):
        y = gather_lora(x, pages, slots)
        assert torch.equal(y, gather_lora(x, elsewhere, names))
        for i in range(0, 70, 3):
            assert torch.equal(y[i : i + 1], gather_lora(x[i : i + 1], pages, slots[i : i + 1]))
        for count in (2, 3, 4, 5, 16, 17):
            part = slice(5, 5 + count)
            assert torch.equal(y[part], gather_lora(x[part], pages, slots[part]))
        try:
            for count in (1, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(y, gather_lora(x, pages, slots))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", native.isas())
@dtypes
def test_a_mixture_adds_the_entries_of_a_token_in_their_order(isa, dtype):
    """Whatever the slots are called, and whatever else is mixed in the batch."""
    x, pages, _ = _company(dtype, 97, 130)
    mixture = _mixture(200, 70, pages.slots)
    moved = torch.arange(pages.slots - 1, -1, -1)
    elsewhere = RankPages(*pages[:2], pages.table[moved], pages.ranks[moved], pages.scales[moved])
    named = torch.where(mixture.slots < 0, mixture.slots, pages.slots - 1 - mixture.slots)
    with native.use_isa(isa), use_backend("native"):
        y = gather_lora(x, pages, mixture)
        assert torch.equal(y, gather_lora(x, elsewhere, mixture._replace(slots=named)))
        for token in range(0, 70, 7):
            own = mixture.tokens == token
            alone = Mixture(
                torch.zeros(int(own.sum()), dtype=I32), mixture.slots[own], mixture.weights[own]
            )
            assert torch.equal(y[token], gather_lora(x[token : token + 1], pages, alone)[0])


@dtypes
@variants
def test_one_entry_a_token_is_a_mixture_too(variant, dtype):
    x, pages, slots = _normal(T, K, dtype=dtype), _pages(dtype), _slots(T)
    ones = Mixture(torch.arange(T, dtype=I32), slots, torch.ones(T))
    with variant.active():
        assert torch.equal(gather_lora(x, pages, slots), gather_lora(x, pages, ones))


@dtypes
@variants
def test_adapters_without_tokens_get_zeros(variant, dtype):
    x, w = _normal(T, K, dtype=dtype), _normal(N, K, dtype=dtype)
    pages = _pages(dtype)
    leaves = [t.requires_grad_() for t in (pages.a, pages.b, pages.scales)]
    slots = torch.where(_slots(T) == 1, 3, _slots(T))
    with variant.active():
        y = gather_lora(x, pages, slots, base=w)
        da, db, dscales = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert dscales.count_nonzero() == 3
    assert dscales[1] == 0
    for slot, rank in enumerate(RANKS):
        own = pages.table[slot, : -(-rank // PAGE)].long()
        for grad in (da, db):
            rows = grad[own].flatten(0, 1)
            assert (rows[:rank].count_nonzero() == 0) == (slot == 1)
            assert rows[rank:].count_nonzero() == 0


@pytest.mark.parametrize("isa", native.isas())
def test_pages_beyond_32_bits(isa):
    """Memory that nobody touches costs nothing."""
    k, count = 64, 2**31 // (PAGE * 64) + 7
    dtype = torch.bfloat16
    a, b = (
        torch.frombuffer(mmap.mmap(-1, count * PAGE * k * 2), dtype=dtype).view(count, PAGE, k)
        for _ in range(2)
    )
    near = _pages(dtype, (16, 5), k=k, n=k)
    far = count - 1 - torch.arange(2)
    a[far], b[far] = near.a, near.b
    pages = RankPages(a, b, far.to(I32)[:, None], near.ranks, near.scales)
    x, slots = _normal(T, k, dtype=dtype), _slots(T, 2)
    with native.use_isa(isa), use_backend("native"):
        assert torch.equal(gather_lora(x, pages, slots), gather_lora(x, near, slots))


def _changed(field: str, index: tuple[int, ...], value: int) -> RankPages:
    pages = _pages(torch.float32)
    tensor = getattr(pages, field).clone()
    tensor[index] = value
    return pages._replace(**{field: tensor})


BAD_VALUES = [
    ({"slots": torch.tensor([0, 4, *[0] * 9], dtype=I32)}, "slots: got 4 at 1, expected -1 to 3"),
    ({"slots": torch.tensor([0] * 10 + [-2], dtype=I32)}, "slots: got -2 at 10, expected -1 to 3"),
    (
        {"slots": Mixture(torch.tensor([0, T], dtype=I32), _slots(2), torch.ones(2))},
        "tokens: got 11 at 1, expected 0 to 10",
    ),
    (
        {"slots": Mixture(torch.tensor([-1, 0], dtype=I32), _slots(2), torch.ones(2))},
        "tokens: got -1 at 0, expected 0 to 10",
    ),
    (
        {"pages": _changed("ranks", (0,), 49)},
        r"pages\[0\].ranks: got 49 at slot 0, expected 0 to 48",
    ),
    (
        {"pages": _changed("ranks", (2,), -1)},
        r"pages\[0\].ranks: got -1 at slot 2, expected 0 to 48",
    ),
    (
        {"pages": _changed("table", (3, 1), 7)},
        r"pages\[0\].table: got page 7 at slot 3, expected 0 to 6",
    ),
    (
        {"pages": [_pages(torch.float32), _changed("table", (1, 0), -1)]},
        r"pages\[1\].table: got page -1 at slot 1, expected 0 to 6",
    ),
]


@variants
@pytest.mark.parametrize(("changes", "message"), BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_values_that_are_not_there(variant, changes, message):
    slots = torch.tensor([0, 1, 2, 3, -1, 0, 1, 2, 3, 0, 1], dtype=I32)
    given = {"x": _normal(T, K), "pages": _pages(torch.float32), "slots": slots} | changes
    with variant.active(), pytest.raises(ValueError, match=f"^{message}"):
        gather_lora(**given)


@pytest.mark.parametrize("isa", native.isas()[:1])
def test_pages_of_two_slots_have_no_gradient_of_their_own(isa):
    pages = _pages(torch.float32)
    shared = pages._replace(table=pages.table[[0, 0, 2, 3]], ranks=pages.ranks[[0, 0, 2, 3]])
    shared.a.requires_grad_()
    y = gather_lora(_normal(T, K), shared, torch.tensor([0, 1] * 5 + [0], dtype=I32))
    with (
        native.use_isa(isa),
        use_backend("native"),
        pytest.raises(ValueError, match=r"^pages.table: got page 0 at"),
    ):
        y.sum().backward()
