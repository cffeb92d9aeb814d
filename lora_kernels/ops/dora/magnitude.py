"""The factor m̂ of DoRA's output, made from the norms of W + c·B·A, and ‖W‖² of a frozen weight."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from lora_kernels.ops.common.base import Meta
from lora_kernels.ops.common.checks import FLOATS, check_dtype
from lora_kernels.ops.common.kinds import check_kinds
from lora_kernels.ops.nf4.weight import NF4Weight

T = TypeVar("T")
C = TypeVar("C", bound=tuple[object, ...])
# Elements of W or y that are widened at a time: what they take then stays in a core's cache.
_BLOCK = 1 << 18


def output_scale(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m̂ [N] = magnitude / norm in norm's dtype, and 1 where the norm is 0.

    A row of zeros has no direction to scale. With 1 it behaves as in plain LoRA: it is finite and
    can learn. With 0 it would stay zero for ever, as would a layer that starts from zeros.
    """
    return torch.where(norm > 0, magnitude.to(norm.dtype) / norm, 1.0)


def inverse_norm(norm: Tensor) -> Tensor:
    """1 / norm [N], and 0 where the norm is 0: such a row has no direction, and its magnitude gets
    no gradient."""
    return torch.where(norm > 0, 1.0 / norm, 0.0)


def rows_at_once(columns: int) -> int:
    return max(1, _BLOCK // max(1, columns))


def base_of(weight: Tensor | NF4Weight) -> tuple[list[Tensor], list[int]]:
    """`base` and `meta` of a weight, as the ops take them."""
    if isinstance(weight, NF4Weight):
        return weight.check().base, weight.meta
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {list(weight.shape)}, expected [N, K]")
    check_dtype("weight", weight, FLOATS)
    return [weight], [weight.shape[0], weight.shape[1]]


@torch.no_grad()
def weight_norm_squared(weight: Tensor | NF4Weight) -> Tensor:
    """‖W[n]‖² of every row, to be kept as long as the weight does not change.

    Summed in fp64 and rounded once. W is read, and decoded, a few rows at a time. Call it when a
    layer is set up, not inside a compiled graph.

    Args:
        weight: W [N, K] of any floating dtype, or an `NF4Weight`.

    Returns:
        [N] in fp32; fp64 for an fp64 weight. Never differentiable.

    Raises:
        ValueError: the weight is not 2-D.
        TypeError: its dtype is not a floating one.

    Examples:
        >>> lk.functional.weight_norm_squared(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([25.,  4.])
    """
    try:
        return base_norm_squared(*base_of(weight))
    except Exception:
        check_kinds(weight_norm_squared, locals())
        raise


def base_norm_squared(base: Sequence[Tensor], meta: Sequence[int]) -> Tensor:
    """`weight_norm_squared` of a weight as the ops take it."""
    dtype = norm_dtype(base)
    if meta[0] * meta[1] == 0:
        return torch.zeros(meta[0], dtype=dtype, device=base[0].device)
    return torch.cat([row_norms(rows) for rows in row_blocks(base, Meta(*meta))])


def row_norms(rows: Tensor) -> Tensor:
    """‖w‖² of each row, summed in fp64 and rounded once: fp32, or fp64 for fp64 rows."""
    if rows.dtype == torch.float64:
        return rows.square().sum(1)
    # One pass; widening the rows first takes five times as long.
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).square().to(rows.dtype)


def norm_dtype(base: Sequence[Tensor]) -> torch.dtype:
    """The dtype of a base weight's norms."""
    return torch.float64 if base[0].dtype == torch.float64 else torch.float32


def row_blocks(base: Sequence[Tensor], m: Meta) -> Iterator[Tensor]:
    """W in blocks of rows in fp32, an fp64 one as it is."""
    rows = rows_at_once(m.k)
    if m.is_dense:
        for block in base[0].split(rows):
            yield block.to(norm_dtype(base))
        return
    # A block has to begin with a scale, and with a scale of scales. Where that needs many rows
    # (K is odd), a block is large.
    whole = m.block_size * max(1, m.nested_block_size)
    step = whole // math.gcd(whole, m.k)
    rows = max(step, rows // step * step)
    for first in range(0, m.n, rows):
        last = min(first + rows, m.n)
        codes = slice(first * m.k // 2, (last * m.k + 1) // 2)
        scales = slice(first * m.k // m.block_size, -(-last * m.k // m.block_size))
        part = [base[0][codes], base[1][scales]]
        if m.is_nested:
            size = m.nested_block_size
            outer = slice(scales.start // size, -(-scales.stop // size))
            part += [base[2][outer], *base[3:]]
        meta = [last - first, *m[1:]]
        yield torch.ops.lora_kernels.nf4_dequantize(part, meta, torch.float32)


def without_autocast(op: Callable[[C], T]) -> Callable[[C], T]:
    """The op's body with torch's own autocast off: it decides its precision itself."""

    @functools.wraps(op)
    def run(call: C) -> T:
        kind = next(t for t in call if isinstance(t, Tensor)).device.type
        if not torch.is_autocast_enabled(kind):
            return op(call)
        with torch.autocast(kind, enabled=False):
            return op(call)

    return run
