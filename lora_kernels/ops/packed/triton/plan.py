"""Strategy and tile of packed projections: the cost model's for one layer as wide as all of them.

There is no vendor product to add to, so where that is the cheapest the better of the other two is
taken; 4-bit weights, which it would decode once, are then left to it, one layer after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lora_kernels.ops.common.configs import GEMM_CONFIGS, Device, Estimate, GemmConfig
from lora_kernels.ops.common.launch import planned_device
from lora_kernels.ops.common.problem import Problem
from lora_kernels.ops.common.strategies import choose
from lora_kernels.ops.common.triton.base_weight import Weight
from lora_kernels.ops.common.triton_host import takes_tma

# Sums of a thread where mma.sync has its operands in registers too: with the rank's, and a main
# loop that carries those.
_MOST_SUMS, _CROWDED = 144, 128
# Beside weights that are decoded: elements of a step of q, and the longest step of a forward on
# Hopper.
_MOST_RANK_TILE, _LONGEST_STEP = 8192, 64


def plan(op: str, problem: Problem, device: Device) -> Estimate:
    """The estimate to follow for "lora_linear_fwd" or "lora_linear_bwd" of all projections."""
    found = choose(op, problem, _tiled(device, op, problem, "single_pass"), without="addmm")
    if found.strategy == "epilogue":
        found = choose(op, problem, _tiled(device, op, problem, "epilogue"), without="addmm")
    return found


def _tiled(device: Device, op: str, problem: Problem, strategy: str) -> Device:
    """The device with those of its tiles, or else of all, whose operands find room."""
    backward, br = op == "lora_linear_bwd", problem.block_r

    def has_room(t: GemmConfig) -> bool:
        if _stacked(t, device, backward):
            return False
        if strategy == "single_pass" and problem.quantised:
            held = problem.size if problem.dropout and device.tma and not backward else 0
            sums = t.registers(br, backward and problem.dropout, held)
            decoded = t.block_n * t.block_k // (32 * t.warps)
            if device.tma and not backward and t.block_k > _LONGEST_STEP:
                return False
            room = sums + decoded < (_MOST_SUMS if device.tma else _CROWDED)
            return room and t.block_k * br <= _MOST_RANK_TILE
        if strategy == "single_pass":
            # In the forward, a mask parts x's registers for the two products.
            crowded = backward or not problem.dropout
            return device.tma or not crowded or t.registers(0, 0) < _CROWDED
        # The branch's operands are in flight as the product's are.
        flight = max(1, t.stages - 1) * (t.block_m + t.block_n) * br * problem.size
        sums = t.registers(br, backward and problem.dropout)
        return flight <= device.shared_bytes and (device.tma or sums <= _MOST_SUMS)

    for tiles in (device.tiles or (), GEMM_CONFIGS):
        fit = tuple(t for t in tiles if has_room(t))
        if fit:
            break
    return replace(device, tiles=fit)


def _stacked(t: GemmConfig, device: Device, backward: bool) -> bool:
    """Whether ptxas puts a few scalars of the walk on the stack, though registers are left: found
    by compiling every tile. Over 4-bit weights, where no pattern shows, it is told to take all."""
    shape = (t.block_m, t.block_n, t.block_k)
    if not backward:
        return not device.rank_sums and shape == (32, 32, 32)
    if device.tma:
        return t.block_k > 64
    return shape == (64, 64, 64)


def plan_config(
    op: str, rows: Sequence[Tensor], weights: Sequence[Weight], r: int, dropout: bool
) -> tuple[str, GemmConfig] | None:
    """Strategy and tile for x or all dy_i, and the weights of one format that they meet; None where
    the layers are faster one after another."""
    x, quantised = rows[0], weights[0].quantised
    n, k = sum(w.meta.n for w in weights), weights[0].meta.k
    tma = takes_tma(*rows) if quantised else takes_tma(*rows, *(w.base[0] for w in weights))
    problem = Problem(x.shape[0], n, k, r, x.dtype, dropout, tma, quantised)
    device = planned_device(x.device)
    if quantised and choose(op, problem, device).strategy == "addmm":
        return None
    found = plan(op, problem, device)
    assert found.config is not None
    return found.strategy, found.config
