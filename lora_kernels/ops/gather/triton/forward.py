"""gather_lora_fwd and gather_lora_add by the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.rank import rank_dtype
from lora_kernels.ops.common.triton.base_product import base_problem, base_product
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.gather.pages import RankPages, split_pages
from lora_kernels.ops.gather.schema import GatherLoRAAdd, GatherLoRAForward, sums_width
from lora_kernels.ops.gather.triton.arguments import Mask
from lora_kernels.ops.gather.triton.entries import Entries
from lora_kernels.ops.gather.triton.expand import expand
from lora_kernels.ops.gather.triton.fused_epilogue import fused_config
from lora_kernels.ops.gather.triton.linear import gemm_with_adapters
from lora_kernels.ops.gather.triton.plan import GatherProblem, Plan, few_parts, plan
from lora_kernels.ops.gather.triton.shrink import shrink


def gather_lora_fwd(c: GatherLoRAForward) -> tuple[Tensor, Tensor]:
    """y [T, N] and s [E, columns of every projection]; zeros where an entry has no rank."""
    x, bias = c.x, c.bias
    s = x.new_zeros((c.entries[0].shape[0], sums_width(c.pages)), dtype=rank_dtype(x.dtype))
    if c.base:
        made = _with_base(c, s)
        if made is not None:
            return made, s
        y = base_product(x, Weight(c.base, c.meta), bias)
    elif bias is not None:
        y = bias.expand(x.shape[0], -1).contiguous()
    else:
        y = x.new_empty((x.shape[0], c.meta[0]))
    _add(y, x, c.pages, c.entries, c.dropout, s, overwrite=not c.base and bias is None)
    return y, s


def _with_base(c: GatherLoRAForward, s: Tensor) -> Tensor | None:
    """y where the base's product adds the adapters itself: see `fused_epilogue.py`."""
    x, projections = c.x, split_pages(c.pages)
    if len(projections) > 1:  # their parts of y meet inside a tile
        return None
    p, w = projections[0], Weight(c.base, c.meta)
    given = Entries(c.entries, x.shape[0], p.slots)
    if given.count == 0 or given.slots_count == 0 or x.shape[1] == 0:
        return None
    mask = Mask(c.dropout, 0) if c.dropout else None
    problem, device = problem_of(x, p.b.shape[2], p, given, mask), planned_device(x.device)
    config = fused_config(problem, base_problem(x, w), device)
    if config is None:
        return None
    y = x.new_empty((x.shape[0], w.meta.n))
    parts, keep, late = _sums(x, p, given, mask, s, few_parts(plan(problem, device), x.shape[1]))
    gemm_with_adapters(x, w, c.bias, y, parts, p, given, config, device, keep=keep, late=late)
    return y


def gather_lora_add(c: GatherLoRAAdd) -> None:
    """out += the adapters' part, or out = it."""
    out = c.out
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        raise ValueError(f"out: has strides {list(out.stride())}, expected the last to be 1")
    _add(out, c.x, c.pages, c.entries, [], None, c.overwrite)


def _add(
    out: Tensor,
    x: Tensor,
    pages: Sequence[Tensor],
    entries: Sequence[Tensor],
    dropout: Sequence[Tensor],
    s: Tensor | None,
    overwrite: bool,
) -> None:
    """The adapters' part of every projection; s takes the sums where it is given."""
    projections = split_pages(pages)
    given = Entries(entries, x.shape[0], projections[0].slots)
    if given.count == 0 or given.slots_count == 0:
        if overwrite:
            out.zero_()
        return
    n = r = 0
    for stream, p in enumerate(projections):
        columns, ranks = slice(n, n + p.b.shape[2]), slice(r, r + p.width)
        n, r = columns.stop, ranks.stop
        own = None if s is None else s[:, ranks]
        mask = Mask(dropout, stream) if dropout else None
        chosen = chosen_plan(x, p.b.shape[2], p, given, mask)
        _project(out[:, columns], x, p, given, mask, own, overwrite, chosen)


def _project(
    out: Tensor,
    x: Tensor,
    p: RankPages,
    entries: Entries,
    mask: Mask | None,
    s: Tensor | None,
    overwrite: bool,
    chosen: Plan,
) -> None:
    """One projection, in two launches."""
    parts, keep, late = _sums(x, p, entries, mask, s, chosen)
    expand(parts, p.b, out, p, entries, chosen, dtype=x.dtype, keep=keep, late=late,
           overwrite=overwrite)  # fmt: skip


def _sums(
    x: Tensor, p: RankPages, entries: Entries, mask: Mask | None, s: Tensor | None, chosen: Plan
) -> tuple[Tensor, Tensor | None, Mask | None]:
    """The sums of a projection, in s where they are whole; else their parts, the s that takes them
    and the mask whose factor they lack."""
    split_k = chosen.split_k if chosen.split else 1
    parts = s
    if s is None or split_k > 1:
        dtype = torch.float32 if split_k > 1 else rank_dtype(x.dtype)
        parts = x.new_empty((split_k, entries.count, p.width), dtype=dtype)
    assert parts is not None
    shrink(x, p.a, parts, p, entries, mask, chosen, half=split_k == 1 and x.dtype == torch.float16)
    return (parts, s, mask) if split_k > 1 else (parts, None, None)


def problem_of(
    x: Tensor, n: int, p: RankPages, entries: Entries, mask: Mask | None
) -> GatherProblem:
    """A pass from x [T, K] to n columns, as the cost model sees it."""
    mixture, k = entries.tokens is not None, x.shape[1]
    return GatherProblem(
        entries.count, entries.slots_count, p.width, n, k, x.dtype, mixture, mask is not None
    )


def chosen_plan(x: Tensor, n: int, p: RankPages, entries: Entries, mask: Mask | None) -> Plan:
    """How it is cut."""
    return plan(problem_of(x, n, p, entries, mask), planned_device(x.device))
