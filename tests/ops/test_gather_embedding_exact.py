"""Many adapters on an embedding: what must hold to the bit, and values that are not there."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_kernels import use_backend
from lora_kernels.dispatch import native
from lora_kernels.dispatch.op import NATIVE_NAMESPACE
from lora_kernels.ops.gather import (
    PAGE,
    RankPages,
    gather_lora_embedding,
    page_embedding_adapters,
    pages_of,
)
from tests.ops.variants import all_variants, bits

V, D, T = 23, 70, 60
RANKS = (3, 18, 0, 1, 40)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
I32, NAN = torch.int32, float("nan")
CPU = [v for v in all_variants() if v.device == "cpu" and v.backend in ("native", "reference")]
variants = pytest.mark.parametrize("variant", CPU, ids=str)
isas = pytest.mark.parametrize("isa", native.isas())
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
page_dtypes = pytest.mark.parametrize("page_dtype", DTYPES, ids=str)


def _normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _pages(dtype: torch.dtype, v: int = V, d: int = D) -> RankPages:
    a = [_normal(r, v, dtype=dtype, seed=10 + i) if r else None for i, r in enumerate(RANKS)]
    b = [_normal(d, r, dtype=dtype, seed=50 + i) if r else None for i, r in enumerate(RANKS)]
    return page_embedding_adapters(a, b, [0.5 + i for i in range(len(RANKS))])


def _calls(t: int = T) -> tuple[Tensor, Tensor]:
    """ids, each several times with several slots, and slots"""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (t,), generator=generator)
    slots = torch.randint(-1, len(RANKS), (t,), generator=generator, dtype=I32)
    slots[5:30] = 1  # enough tokens of one adapter for every kernel
    return ids, slots


def _everything(
    dy: Tensor, ids: Tensor, weight: Tensor, pages: RankPages, slots: Tensor
) -> list[Tensor]:
    """y over a weight and alone, what is added to a tensor, and every gradient of the pages."""
    flat, out = list(pages), dy.clone()
    ops = torch.ops.lora_kernels
    y = [ops.gather_lora_embed_fwd(ids, w, flat, slots) for w in (weight, None)]
    ops.gather_lora_embed_add(out, ids, flat, slots)
    return [*y, out, *ops.gather_lora_embed_bwd(dy, ids, flat, slots, [True] * 3)]


def _same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        assert torch.equal(bits(a), bits(b))


@isas
@page_dtypes
@dtypes
def test_threads_change_nothing(isa, dtype, page_dtype):
    ids, slots = _calls()
    given = _normal(T, D, dtype=dtype), ids, _normal(V, D, dtype=dtype), _pages(page_dtype), slots
    with native.use_isa(isa), use_backend("native"):
        torch.set_num_threads(1)
        one = _everything(*given)
        assert all(t.isfinite().all() and t.any() for t in one)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            _same(one, _everything(*given))


@isas
@dtypes
def test_a_token_does_not_depend_on_its_company(isa, dtype):
    """Alone, beside any others, its adapter in any slot, its id in either width."""
    (ids, slots), pages, weight = _calls(), _pages(dtype), _normal(V, D, dtype=dtype)
    moved = torch.tensor([3, 0, 4, 2, 1])
    elsewhere = RankPages(*pages[:2], pages.table[moved], pages.ranks[moved], pages.scales[moved])
    names = torch.where(slots < 0, slots, moved.argsort().to(I32)[slots.clamp(min=0)])

    def call(part: slice = slice(None)) -> Tensor:
        return gather_lora_embedding(ids[part], pages, slots[part], weight=weight)

    with native.use_isa(isa), use_backend("native"):
        y = call()
        assert torch.equal(y, gather_lora_embedding(ids, elsewhere, names, weight=weight))
        assert torch.equal(y, gather_lora_embedding(ids.int(), pages, slots, weight=weight))
        for i in range(T):
            assert torch.equal(y[i : i + 1], call(slice(i, i + 1)))
        for count in (2, 3, 4, 5, 16, 17):
            assert torch.equal(y[5 : 5 + count], call(slice(5, 5 + count)))
        # Every other token: ids and slots that are not contiguous.
        assert torch.equal(y[::2], call(slice(None, None, 2)))


@variants
@dtypes
def test_a_token_without_adapter_is_the_weights_row(variant, dtype):
    """Whatever its bits are: -0, infinity and NaN of any kind."""
    ids, slots = _calls()
    weight = _normal(V, D, dtype=dtype)
    raw = weight.view({2: torch.int16, 4: I32}[weight.element_size()])
    raw[:3] = bits(torch.tensor([-0.0, NAN, float("inf")]).to(dtype))[:, None]
    raw[1] += torch.arange(D) % 60  # what a NaN carries
    ids[:3], slots[:3] = torch.arange(3), torch.tensor([-1, 2, -1])
    nobody = (slots < 0) | (slots == 2)
    with variant.active():
        for w in (weight, weight.T.contiguous().T):
            y = gather_lora_embedding(ids, _pages(dtype), slots, weight=w)
            assert torch.equal(bits(y)[nobody], bits(weight)[ids[nobody]])
            assert not torch.equal(bits(y)[~nobody], bits(weight)[ids[~nobody]])


@variants
@dtypes
def test_what_a_batch_does_not_use_is_not_read(variant, dtype):
    """Other adapters, and ids of its own that it has not: NaN there reaches nothing."""
    ids, slots = _calls()
    slots = torch.where(slots == 1, 1, -1).to(I32)
    ids = ids % (V - 4)
    pages = _pages(dtype)
    own = pages.table[1, : pages_of(RANKS[1])].long()
    a, b = torch.full_like(pages.a, NAN), torch.full_like(pages.b, NAN)
    used = ids[slots == 1].unique()
    a[own[:, None], used], b[own] = pages.a[own[:, None], used], pages.b[own]
    a[own[1], :, RANKS[1] - PAGE :], b[own[1], RANKS[1] - PAGE :] = NAN, NAN
    scales = torch.where(torch.arange(len(RANKS)) == 1, pages.scales, NAN)
    poisoned = RankPages(a, b, pages.table, pages.ranks, scales)
    dy, weight = _normal(T, D, dtype=dtype), _normal(V, D, dtype=dtype)
    with variant.active():
        clean = _everything(dy, ids, weight, pages, slots)
        _same(clean, _everything(dy, ids, weight, poisoned, slots))
    assert all(t.isfinite().all() for t in clean)


@variants
@page_dtypes
@dtypes
def test_a_gradient_of_many_tokens_is_rounded_once(variant, dtype, page_dtype):
    """3000 of one id: a 16-bit sum of ones ends at 256, or 2048."""
    count, ids = 3000, torch.full((3000,), 4)
    pages = page_embedding_adapters(
        [torch.zeros(1, V).to(page_dtype)], [torch.ones(2, 1).to(page_dtype)], [1.0]
    )
    dy = torch.ones(count, 2).to(dtype)
    dy[:, 1] = 0
    slots, needs = torch.zeros(count, dtype=I32), [True, False, False]
    with variant.active():
        da = torch.ops.lora_kernels.gather_lora_embed_bwd(dy, ids, list(pages), slots, needs)[0]
    assert da[0, 4, 0] == torch.tensor(float(count)).to(page_dtype)
    assert da.count_nonzero() == 1


@isas
def test_pages_beyond_32_bits(isa):
    """Memory that nobody touches costs nothing."""
    width, count = 64, 2**31 // (PAGE * 64) + 7
    near = _pages(torch.bfloat16, width, width)
    pages, shape = near.a.shape[0], (count, -1)
    a, b = (
        torch.frombuffer(mmap.mmap(-1, count * PAGE * width * 2), dtype=torch.bfloat16).view(shape)
        for _ in range(2)
    )
    a[-pages:], b[-pages:] = near.a.flatten(1), near.b.flatten(1)
    far = RankPages(
        a.view(count, width, PAGE),
        b.view(count, PAGE, width),
        near.table + count - pages,
        *near[3:],
    )
    ids, slots = _calls()
    with native.use_isa(isa), use_backend("native"):
        y = gather_lora_embedding(ids, far, slots)
        assert torch.equal(y, gather_lora_embedding(ids, near, slots))
    assert y.any()


def _changed(field: str, index: tuple[int, ...], value: int) -> RankPages:
    pages = _pages(torch.float32)
    tensor = getattr(pages, field).clone()
    tensor[index] = value
    return pages._replace(**{field: tensor})


IDS, SLOTS = torch.tensor([0, 1, 2, 3, V - 1]), torch.tensor([0, 1, 3, -1, 4], dtype=I32)
BAD_VALUES = [
    ({"ids": torch.tensor([0, 1, 2, V, V])}, "ids: got 23 at 3, expected 0 to 22"),
    ({"ids": torch.tensor([0, 1, 2, V, 3], dtype=I32)}, "ids: got 23 at 3, expected 0 to 22"),
    ({"ids": torch.tensor([-1, 1, 2, 3, 4])}, "ids: got -1 at 0, expected 0 to 22"),
    ({"ids": torch.tensor([0, 2**32, 2, 3, 4])}, "ids: got 4294967296 at 1, expected 0 to 22"),
    ({"slots": torch.tensor([0, 5, 0, 0, 0], dtype=I32)}, "slots: got 5 at 1, expected -1 to 4"),
    ({"slots": torch.tensor([0, 0, 0, 0, -2], dtype=I32)}, "slots: got -2 at 4, expected -1 to 4"),
    (
        {"pages": _changed("ranks", (0,), 49)},
        r"pages\.ranks: got 49 at slot 0, expected 0 to 48",
    ),
    (
        {"pages": _changed("ranks", (3,), -1)},
        r"pages\.ranks: got -1 at slot 3, expected 0 to 48",
    ),
    (
        {"pages": _changed("table", (4, 2), 7)},
        r"pages\.table: got page 7 at slot 4, expected 0 to 6",
    ),
    (
        {"pages": _changed("table", (1, 0), -1)},
        r"pages\.table: got page -1 at slot 1, expected 0 to 6",
    ),
]


@variants
@pytest.mark.parametrize(("changes", "message"), BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_values_that_are_not_there(variant, changes, message):
    given: dict[str, Any] = {"ids": IDS, "pages": _pages(torch.float32), "slots": SLOTS} | changes
    ids, pages, slots = given["ids"], list(given["pages"]), given["slots"]
    weight, out = _normal(V, D), _normal(5, D)
    before = out.clone()
    ops = torch.ops.lora_kernels
    with variant.active():
        for call in (
            lambda: ops.gather_lora_embed_fwd(ids, weight, pages, slots),
            lambda: ops.gather_lora_embed_add(out, ids, pages, slots),
            lambda: ops.gather_lora_embed_bwd(before, ids, pages, slots, [True] * 3),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                call()
    assert torch.equal(out, before)


GOOD = {"dy": torch.zeros(5, D), "ids": IDS, "pages": _pages(torch.float32), "slots": SLOTS}
BAD_ARGUMENTS = [
    ({"pages": GOOD["pages"][:4]}, "pages: got 4 tensors, expected 5"),
    ({"pages": GOOD["pages"]._replace(a=GOOD["pages"].b)}, r"pages.a: got shape \[7, 16, 70\]"),
    ({"pages": GOOD["pages"]._replace(b=GOOD["pages"].b[:1])}, r"pages.b: got shape \[1, 16, 70\]"),
    ({"pages": GOOD["pages"]._replace(ranks=SLOTS[:2])}, r"pages.ranks: got shape \[2\]"),
    ({"pages": _pages(torch.float64)}, "pages.a: got dtype float64"),
    ({"ids": IDS.float()}, "ids: got dtype float32"),
    ({"ids": IDS[None]}, r"ids: got shape \[1, 5\]"),
    ({"slots": SLOTS[:2]}, r"slots: got shape \[2\]"),
    ({"dy": torch.zeros(5, D + 1)}, r"(dy|out|weight): got shape \[5, 71\]"),
    ({"dy": torch.zeros(4, D)}, r"(dy|out|weight): got shape \[4, 70\]"),
    ({"dy": torch.zeros(5, D).double()}, "(dy|out|weight): got dtype float64"),
    ({"needs": [True] * 2}, "needs: got 2 flags, expected 3"),
]


@pytest.mark.parametrize("isa", native.isas()[:1])
@pytest.mark.parametrize(("changes", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_the_extension_trusts_nobody(isa, changes, message):
    """What the Python side has checked before, of a direct call."""
    given: dict[str, Any] = {**GOOD, "needs": [True] * 3} | changes
    dy, ids, pages, slots, needs = given.values()
    ops = getattr(torch.ops, NATIVE_NAMESPACE)
    calls = [lambda: ops.gather_lora_embed_bwd(dy, ids, list(pages), slots, needs)]
    if "needs" not in changes:
        calls.append(lambda: ops.gather_lora_embed_fwd(ids, dy, list(pages), slots))
        calls.append(lambda: ops.gather_lora_embed_add(dy, ids, list(pages), slots))
    with native.use_isa(isa):
        for call in calls:
            with pytest.raises(ValueError, match=f"^{message}"):
                call()


@pytest.mark.parametrize("isa", native.isas()[:1])
def test_pages_of_two_slots_have_no_gradient_of_their_own(isa):
    pages = _pages(torch.float32)
    rows = torch.tensor([0, 0, 2, 3, 4])
    shared = pages._replace(table=pages.table[rows], ranks=pages.ranks[rows])
    shared.a.requires_grad_()
    with native.use_isa(isa), use_backend("native"):
        y = gather_lora_embedding(IDS, shared, SLOTS)
        with pytest.raises(ValueError, match=r"^pages.table: got page 0 at slot 1 and at another"):
            y.sum().backward()
