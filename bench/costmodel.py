"""What a case cannot avoid: floating-point operations and bytes, and the time they take at best.

Bytes are compulsory traffic: every input read once, every output written once, nothing kept in a
cache from the call before. Forward and backward are two passes, because the optimiser stands
between them: x, W, A and B are read in each. What the forward must keep (s) is written once and
read once. A dropout mask costs nothing: it can be recomputed.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.cases import DTYPES, Case

NESTED_BLOCK = 256
SEED_BYTES = 8
_NESTED_TABLE_BYTES = 4 * 256 + 4  # code map and offset, fp32


@dataclass(frozen=True)
class Cost:
    """Floors of one call: operations (a multiply-add is 2) and bytes read and written."""

    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written

    @property
    def intensity(self) -> float:
        """FLOP per byte, the x axis of a roofline."""
        return self.flops / max(self.bytes, 1)

    def seconds(self, flops_per_s: float, read_per_s: float, copy_per_s: float) -> float:
        """The larger of the arithmetic's time and the traffic's on a machine with these limits.

        Reads alone run at the read bandwidth; a written byte and a read byte beside it run at the
        copy bandwidth, which counts both.
        """
        paired = 2 * min(self.bytes_read, self.bytes_written)
        alone = self.bytes - paired
        return max(self.flops / flops_per_s, paired / copy_per_s + alone / read_per_s)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )


def quantised_bytes(n: int, k: int, block_size: int, nested: bool) -> int:
    """Stored size of a 4-bit weight: codes, and scales of 4 bytes or nested ones of 1."""
    blocks = -(-n * k // block_size)
    codes = (n * k + 1) // 2
    if not nested:
        return codes + 4 * blocks
    return codes + blocks + 4 * -(-blocks // NESTED_BLOCK) + _NESTED_TABLE_BYTES


def weight_bytes(case: Case) -> int:
    """Stored size of the case's base weight."""
    if case.is_quantised:
        return quantised_bytes(case.n, case.k, case.block_size, case.nested)
    return case.n * case.k * DTYPES[case.dtype].itemsize


def saved_bytes(case: Case) -> int:
    """What the backward of an adapter cannot do without, weights and adapters left out: x and s in
    their own type, and with dropout the seed (int64) that makes the mask again."""
    kept = case.m * (case.k + case.r) * DTYPES[case.dtype].itemsize
    return kept + (SEED_BYTES if case.dropout else 0)


def cost(case: Case) -> Cost:
    """The floor of one call of the case.

    Raises:
        ValueError: a fine-tuning step has no closed formula here.
    """
    if case.op == "step":
        raise ValueError("case: a fine-tuning step has no cost model")
    size = DTYPES[case.dtype].itemsize
    dense = case.n * case.k * size
    # One comparison-free pass over the elements: a multiplication each.
    if case.op == "nf4_dequantize":
        return Cost(case.n * case.k, weight_bytes(case), dense)
    if case.op == "nf4_quantize":
        return Cost(case.n * case.k, dense, weight_bytes(case))
    if case.op == "linear_cross_entropy":
        # One pass: dx is known as soon as the loss is, nothing stands between them.
        x, labels = case.m * case.k * size, 8 * case.m
        passes = 2 if case.backward else 1
        return Cost(2 * passes * case.m * case.n * case.k, dense + x + labels, (passes - 1) * x + 4)
    total = _linear_fwd(case, size)
    return total + _linear_bwd(case, size) if case.backward else total


def _adapter_bytes(case: Case) -> int:
    return case.r * (case.k + case.n) * DTYPES[case.adapter_dtype].itemsize


def _linear_fwd(case: Case, size: int) -> Cost:
    m, n, k, r = case.m, case.n, case.k, case.r
    read = m * k * size + weight_bytes(case) + (n * size if case.bias else 0)
    saved = m * r * size if case.backward else 0
    return Cost(
        2 * m * n * k + 2 * m * r * (k + n),
        read + _adapter_bytes(case),
        m * n * size + saved,
    )


def _linear_bwd(case: Case, size: int) -> Cost:
    """dx = dy·W (+ ds·A); with an adapter ds = dy·B, dA = dsᵀ·x, dB = dyᵀ·s."""
    m, n, k, r = case.m, case.n, case.k, case.r
    read = m * n * size + weight_bytes(case)
    written = m * k * size
    if r:
        read += _adapter_bytes(case) + m * k * size + m * r * size
        written += _adapter_bytes(case)
    return Cost(2 * m * n * k + 4 * m * r * (k + n), read, written)
