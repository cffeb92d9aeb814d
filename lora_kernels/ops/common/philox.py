"""Counter-based dropout masks: Philox4x32-7 (Salmon et al., 2011, "Parallel random numbers").

One call decides eight elements: key = the 64-bit seed, counter = (k div 8, m, stream, 0); element
(m, k) takes the 16-bit half number k mod 8 of the 128 result bits, low half of word 0 first, and
is kept when that half is >= T = round(65536 p). Kept elements are scaled by 1 / (1 - T / 65536).
Every backend gives the same bits, so a mask is never stored: the backward makes it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)  # what the key grows by from round to round
_WORD = 0xFFFFFFFF
_HALVES = 65536


def threshold(p: float) -> int:
    """T: an element whose 16 random bits are below it is dropped."""
    return round(_HALVES * p)


def keep_scale(p: float) -> float:
    """The factor of kept elements; exact for the probability that the 16 bits really give."""
    return 1.0 / (1.0 - threshold(p) / _HALVES)


def check_dropout(p: float) -> None:
    if not 0.0 <= p < 1.0 or threshold(p) >= _HALVES:
        raise ValueError(f"dropout_p: got {p}, expected 0 <= dropout_p < 1 - 2**-17")


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 on int64 tensors that hold 32-bit words (broadcast against each other)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 multiplication wraps, which leaves all 64 product bits right.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        hi0, lo0 = (p0 >> 32) & _WORD, p0 & _WORD
        hi1, lo1 = (p1 >> 32) & _WORD, p1 & _WORD
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + WEYL[0]) & _WORD, (k1 + WEYL[1]) & _WORD
    return c0, c1, c2, c3


def keep_bits(seed: Tensor, rows: Tensor, cols: int, stream: int = 0) -> Tensor:
    """The 16 random bits [M, cols] of each element of the int64 rows [M] of a mask, as int64."""
    seed = seed.reshape(())
    key = (seed & _WORD, (seed >> 32) & _WORD)
    block = torch.arange((cols + 7) // 8, dtype=torch.int64, device=seed.device)  # [cols / 8]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    words = philox4x32((block, rows[:, None], zero + stream, zero), key)  # 4 x [M, cols / 8]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    bits = torch.stack(torch.broadcast_tensors(*halves), dim=-1)  # [M, cols / 8, 8]
    return bits.flatten(1)[:, :cols]


def keep_mask(seed: Tensor, rows: int, cols: int, p: float, stream: int = 0) -> Tensor:
    """The boolean keep mask [rows, cols] of a one-element int64 seed, on the seed's device."""
    row = torch.arange(rows, dtype=torch.int64, device=seed.device)
    return keep_bits(seed, row, cols, stream) >= threshold(p)
