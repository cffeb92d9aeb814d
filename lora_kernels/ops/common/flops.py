"""Formulas of FLOPs that several families share; an op's own stands beside its schema."""

from __future__ import annotations


def product(m: int, n: int, k: int) -> int:
    """[M, K] · [K, N]: a multiplication and an addition for each of their terms."""
    return 2 * m * n * k


def lora_fwd(m: int, n: int, k: int, r: int) -> int:
    """x·Wᵀ, s = x·Aᵀ and s·Bᵀ."""
    return product(m, n, k) + product(m, r, k) + product(m, n, r)


def lora_bwd(
    m: int, n: int, k: int, r: int, *, x: bool, a: bool, b: bool, weight: bool, ds: bool = False
) -> int:
    """Of the gradients asked for: dy·W and ds·A of x, dsᵀ·x, dyᵀ·s, dyᵀ·x, and ds = dy·B for those
    that need it (others may: `ds`)."""
    total = product(m, n, r) if x or a or ds else 0
    if x:
        total += product(m, k, n) + product(m, k, r)
    if a:
        total += product(r, k, m)
    if b:
        total += product(n, r, m)
    if weight:
        total += product(n, k, m)
    return total
