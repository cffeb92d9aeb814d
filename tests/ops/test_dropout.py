"""Philox against its published answers, and the mask's layout against its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lora_kernels import functional as F
from lora_kernels.ops.common.philox import keep_scale, philox4x32, threshold
from tests.ops.variants import accepts, all_variants

VARIANTS = [
    v
    for v in all_variants()
    if accepts("dropout_mask", v.backend, (torch.tensor([0], device=v.device), 1, 1, 0.5, 0))
]
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
# counter and key, then the answer: the known-answer tests of Random123.
KNOWN = {
    10: {
        (0,) * 6: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        PI: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    },
    7: {
        (0,) * 6: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        (0xFFFFFFFF,) * 6: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        PI: (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    },
}


def _philox(counter, key, rounds=7):
    """Philox4x32 in whole numbers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ k[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ k[1],
            p0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return tuple(c)


def _kept(seed, m, k, p, stream):
    """The definition, one element at a time."""
    seed &= 2**64 - 1
    words = _philox((k // 8, m, stream, 0), (seed & 0xFFFFFFFF, seed >> 32))
    half = (words[k % 8 // 2] >> (16 * (k % 2))) & 0xFFFF
    return half >= round(65536 * p)


CASES = [(rounds, given) for rounds, table in KNOWN.items() for given in table]


@pytest.mark.parametrize(("rounds", "given"), CASES)
def test_philox_known_answers(rounds, given):
    expected = KNOWN[rounds][given]
    assert _philox(given[:4], given[4:], rounds) == expected
    words = [torch.tensor(v, dtype=torch.int64) for v in given]
    answer = philox4x32(tuple(words[:4]), tuple(words[4:]), rounds)
    assert tuple(int(w) for w in answer) == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
@pytest.mark.parametrize("stream", [0, 1, 2**32 - 1])
def test_mask_is_the_definition(variant, seed, stream):
    """5 x 19: the last call of a row decides three elements."""
    with variant.active():
        mask = F.dropout_mask((5, 19), 0.3, torch.tensor([seed], device=variant.device), stream)
    expected = [[_kept(seed, m, k, 0.3, stream) for k in range(19)] for m in range(5)]
    assert mask.tolist() == expected


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9, 0.9999])
def test_keep_probability(variant, p):
    """The count of kept elements is binomial; the seed is fixed, so this never varies."""
    n = 512 * 512
    with variant.active():
        kept = int(F.dropout_mask((512, 512), p, torch.tensor([7], device=variant.device)).sum())
    q = 1 - threshold(p) / 65536
    assert abs(kept - n * q) <= 4 * math.sqrt(n * q * (1 - q))


def test_masks_of_other_seeds_streams_and_rows_are_independent():
    n = 4096
    shape = (2, n)
    first = F.dropout_mask(shape, 0.5, 1)
    others = {
        "the next seed": F.dropout_mask(shape, 0.5, 2)[0],
        "a seed with other high bits": F.dropout_mask(shape, 0.5, 1 + 2**32)[0],
        "another stream": F.dropout_mask(shape, 0.5, 1, stream=1)[0],
        "the next row": first[1],
        "the next eight columns": first[0].roll(-8),
    }
    for name, other in others.items():
        same = int((first[0] == other).sum())
        assert abs(same - n / 2) <= 4 * math.sqrt(n / 4), name


def test_more_dropout_drops_a_superset():
    masks = [F.dropout_mask((32, 100), p, 5) for p in (0.0, 0.1, 0.4, 0.8)]
    assert masks[0].all()
    for less, more in itertools.pairwise(masks):
        assert (less | ~more).all() and (less & ~more).any()


def test_mask_does_not_depend_on_the_size():
    """So that a tile, or a shard of the rows' ends, sees the same mask."""
    whole = F.dropout_mask((9, 64), 0.5, 3)
    assert torch.equal(F.dropout_mask((4, 37), 0.5, 3), whole[:4, :37])


def test_leading_dimensions_count_rows():
    flat = F.dropout_mask((6, 11), 0.5, 3)
    assert torch.equal(F.dropout_mask((2, 3, 11), 0.5, 3), flat.view(2, 3, 11))
    assert torch.equal(F.dropout_mask((11,), 0.5, 3), flat[0])
    assert F.dropout_mask((0, 11), 0.5, 3).shape == (0, 11)
    assert F.dropout_mask((4, 0), 0.5, 3).shape == (4, 0)


def test_integer_and_tensor_seeds_agree():
    assert torch.equal(
        F.dropout_mask((3, 9), 0.5, -4), F.dropout_mask((3, 9), 0.5, torch.tensor([-4]))
    )


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("shape", [(3, 24), (2, 3, 24), (24,)], ids=str)
def test_the_layer_drops_by_this_mask(shape, p):
    """W = 0 and A = B = identity leave y = drop(x), and its gradient drop(dy)."""
    k = shape[-1]
    eye, seed = torch.eye(k), torch.tensor([77])
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(shape)
    y = F.lora_linear(x, torch.zeros(k, k), eye, eye, dropout_p=p, seed=seed)
    y.backward(dy)
    mask = F.dropout_mask(shape, p, seed)
    factor = 1 / (1 - round(65536 * p) / 65536)
    assert torch.equal(y, torch.where(mask, x * factor, 0.0))
    assert torch.equal(x.grad, torch.where(mask, dy * factor, 0.0))


def test_threshold_and_scale():
    assert [threshold(p) for p in (0, 0.5, 1.5 / 65536, 2.5 / 65536)] == [0, 32768, 2, 2]
    assert keep_scale(0.5) == 2.0 and keep_scale(0.0) == 1.0
    assert keep_scale(0.1) == 65536 / (65536 - 6554)
