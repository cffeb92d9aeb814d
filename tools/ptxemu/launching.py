"""Runs a kernel of a PTX module."""

from __future__ import annotations

import ctypes
import hashlib
import json
import struct
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from tools.ptxemu.library import Buffer, Options, PtxError, lib
from tools.ptxemu.memory import Memory
from tools.ptxemu.result import Result

FATAL = ("race", "shfl_inactive")
_F32, _F64 = 18, 19  # of enum Ty in src/types.h
_KEPT = 64
Grid = int | Sequence[int]


class Module:
    """Parsed PTX."""

    def __init__(self, ptx: str) -> None:
        self.ptx = ptx
        self.handle: int | None = lib().pe_load(ptx.encode())
        if not self.handle:
            raise PtxError(lib().pe_error().decode())

    def __del__(self) -> None:
        if getattr(self, "handle", None) and lib is not None:  # not while Python ends
            lib().pe_free(self.handle)
            self.handle = None

    def kernels(self) -> Any:
        lib().pe_info(self.handle, b"")
        return json.loads(lib().pe_out())

    def info(self, name: str) -> dict[str, Any]:
        """A kernel's parameters, and the bytes that they take."""
        if lib().pe_info(self.handle, name.encode()):
            raise PtxError(lib().pe_error().decode())
        found: dict[str, Any] = json.loads(lib().pe_out())
        return found


_modules: OrderedDict[bytes, Module] = OrderedDict()


def load(ptx: str) -> Module:
    """The module of this PTX; the last few are kept."""
    key = hashlib.sha256(ptx.encode()).digest()
    if key not in _modules:
        _modules[key] = Module(ptx)
        if len(_modules) > _KEPT:
            _modules.popitem(last=False)
    return _modules[key]


def is_tensor(a: Any) -> bool:
    """Whether an argument is memory, not a number."""
    return isinstance(a, torch.Tensor) or (isinstance(a, np.ndarray) and a.ndim > 0)


def _bytes(a: Any, parameter: dict[str, Any], memory: Memory, i: int) -> bytes:
    """An argument as the parameter's bytes."""
    size: int = parameter["size"]
    if a is None:
        return b"\0" * size
    if isinstance(a, ctypes.Structure):
        a = bytes(a)
    if isinstance(a, (bytes, bytearray)):
        if len(a) != size:
            raise ValueError(f"argument {i}: {size} bytes needed, {len(a)} given")
        return bytes(a)
    if is_tensor(a):
        if size != 8:
            name = parameter["name"]
            raise ValueError(f"argument {i} ({name}): tensor given for a {size}-byte parameter")
        return struct.pack("<Q", memory.ptr(a, name=f"arg{i}"))
    if isinstance(a, (np.generic, np.ndarray)):
        made = np.asarray(a).tobytes()
        if len(made) == size:
            return made
        a = a.item()
    if isinstance(a, bool):
        return int(a).to_bytes(size, "little")
    if isinstance(a, float) or parameter["type"] in (_F32, _F64):
        return struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(a))
    return (int(a) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")


def _parameters(
    info: dict[str, Any], args: Sequence[Any], names: Sequence[str | None], memory: Memory
) -> bytes:
    packed = bytearray(info["param_bytes"])
    for i, (a, p) in enumerate(zip(args, info["params"], strict=True)):
        name = names[i] if i < len(names) else None
        if name and is_tensor(a):
            value = struct.pack("<Q", memory.ptr(a, name=name))
        else:
            value = _bytes(a, p, memory, i)
        packed[p["offset"] : p["offset"] + p["size"]] = value
    return bytes(packed)


def _dim3(x: Grid) -> ctypes.Array[ctypes.c_uint32]:
    given = (x,) if isinstance(x, int) else tuple(int(v) for v in x)
    return (ctypes.c_uint32 * 3)(*(*given, 1, 1, 1)[:3])


def _symbols(symbols: Mapping[str, Any]) -> tuple[ctypes.Array[Buffer], list[Any]]:
    """Contents of module variables, and what keeps them alive."""
    arrays = [
        t.detach().contiguous().view(torch.uint8).numpy()
        if isinstance(t, torch.Tensor)
        else np.ascontiguousarray(t)
        for t in symbols.values()
    ]
    made = (Buffer * max(1, len(arrays)))()
    for i, (name, a) in enumerate(zip(symbols, arrays, strict=True)):
        made[i] = Buffer(0, a.ctypes.data, a.nbytes, 0, a.nbytes, 0, name.encode())
    return made, arrays


def launch(
    ptx: str | Module,
    kernel: str,
    grid: Grid,
    block: Grid,
    args: Sequence[Any],
    shared_bytes: int = 0,
    *,
    symbols: Mapping[str, Any] | None = None,
    mem: Memory | None = None,
    check: bool = True,
    fatal: Sequence[str] = FATAL,
    race: bool = True,
    uninit: bool = True,
    poison_shared: bool = True,
    check_global: bool = True,
    threads: int = 1,
    coresident: int = 1,
    max_instr: int = 500_000_000,
    seed: int = 0,
    slice: int = 100000,
    max_reports: int = 20,
    sm_count: int = 108,
    _names: Sequence[str | None] = (),
    _compiled: Any = None,
) -> Result:
    """Run one kernel.

    Args:
        args: CPU tensors and numpy arrays (pointers), ints, floats, numpy scalars, bytes or ctypes
            structures (structs by value), None (null).
        symbols: contents of module variables, by name.
        mem: where device addresses among the arguments come from.
        check: raise on an error, and on a report of a kind in `fatal`.
        race, uninit, poison_shared, check_global: checks that may be turned off.
        threads: of the host, over blocks.
        coresident: blocks that run interleaved, needed where blocks wait for each other.
        seed: other than 0, shuffles the warps' order each round; a small `slice` interleaves more.

    Raises:
        PtxError: the kernel failed; its `result` holds counters and reports.
    """
    module = ptx if isinstance(ptx, Module) else load(ptx)
    info, memory = module.info(kernel), mem or Memory()
    if len(args) != len(info["params"]):
        raise ValueError(
            f"kernel {kernel} takes {len(info['params'])} parameters, {len(args)} given"
        )
    packed = _parameters(info, args, _names, memory)
    checks = (race, uninit, poison_shared, check_global)
    options = Options(max_instr, slice, seed, threads, coresident, *checks, max_reports, sm_count)
    buffers, count = memory.buffers()
    variables, kept = _symbols(symbols or {})
    start = time.time()
    failed = lib().pe_launch(
        *(module.handle, kernel.encode(), _dim3(grid), _dim3(block), packed, len(packed)),
        *(int(shared_bytes), ctypes.byref(options), buffers, count, variables, len(kept)),
    )
    if failed:
        raise PtxError(lib().pe_error().decode())
    result = Result(json.loads(lib().pe_out()), time.time() - start, _compiled)
    bad = [r for r in result.reports if r["kind"] in fatal]
    if check and (result.error or bad):
        words = [f"{r['kind']} (x{r['count']}): {r['msg']}" for r in bad]
        error = PtxError(result.error or "\n".join(words))
        error.result = result
        raise error
    return result


def poison_(t: Any) -> Any:
    """Fill an output with NaN (floats) or 0xA5 bytes, so that elements never written show."""
    if isinstance(t, torch.Tensor):
        if t.is_floating_point():
            return t.fill_(float("nan"))
        return t.view(-1).view(torch.uint8).fill_(0xA5)
    if t.dtype.kind == "f":
        t.fill(np.nan)
    else:
        t.view(np.uint8).fill(0xA5)
    return t
