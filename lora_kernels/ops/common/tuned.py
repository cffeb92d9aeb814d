"""Strategies and tiles that were measured on this GPU, from the file that `LORA_KERNELS_GPU_TUNING`
names. If it has no entry that fits the call, the cost model decides.

`python -m bench tune --device cuda` writes such files:

    {"format": 1, "gpu": as torch names it, "triton": version, "entries": [
        {"op", "m", "n", "k", "r", "dtype", "dropout", "quantised",
         "strategy", "config": the fields of a `GemmConfig`, or null for addmm, "seconds"}]}

An entry counts for every m up to the same power of two; the other sizes are exact.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from lora_kernels.dispatch.tuning import check_head, from_file
from lora_kernels.ops.common.checks import FLOATS, names
from lora_kernels.ops.common.configs import GEMM_CONFIGS, Device, GemmConfig, next_power_of_2
from lora_kernels.ops.common.problem import OPS, STRATEGIES, Problem

VARIABLE = "LORA_KERNELS_GPU_TUNING"
FORMAT = 1
_INSTEAD = "the cost model chooses"
_DTYPES = tuple(names([d]) for d in FLOATS)


@dataclass(frozen=True)
class Key:
    """What a look-up compares. `m` is the largest of its bucket, `dtype` as torch names it."""

    op: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    dropout: bool
    quantised: bool

    @staticmethod
    def of(op: str, p: Problem) -> Key:
        bucket = next_power_of_2(p.m)
        return Key(op, bucket, p.n, p.k, p.r, names([p.dtype]), p.dropout, p.quantised)


@dataclass(frozen=True)
class Entry:
    """The fastest way that was measured: `config` is None in addmm, `seconds` are of one call."""

    strategy: str
    config: GemmConfig | None
    seconds: float


@dataclass(frozen=True, eq=False)  # hashed by identity: it is part of a cache's key
class Table:
    """What was measured on one GPU.

    Attributes:
        gpu: as torch names it.
        entries: never changed once the table is in use.
        source: the file, for warnings.
    """

    gpu: str
    entries: Mapping[Key, Entry]
    source: str = "use_table"

    def find(self, op: str, problem: Problem, device: Device) -> Entry | None:
        """The entry for a call, if its tile is among those of `device`. The caller has to check
        whether the tile fits the memory and the operands. Warns, once, if the table is of another
        GPU."""
        if device.gpu != self.gpu:
            _warn_of_gpu(self, device.gpu)
            return None
        entry = self.entries.get(Key.of(op, problem))
        if entry is None or entry.config is None:
            return entry
        # No test has compiled other tiles than these.
        tiles = GEMM_CONFIGS if device.tiles is None else device.tiles
        return entry if entry.config in tiles else None


@cache
def _warn_of_gpu(table: Table, gpu: str | None) -> None:
    warnings.warn(
        f"{VARIABLE}={table.source}: gpu: got {table.gpu!r}, expected {gpu!r}; {_INSTEAD}",
        stacklevel=2,
    )


_table: Table | None = None
_was_read = False


def table_for(device: Device) -> Table | None:
    """The table in use for a GPU of this machine. For other devices only the cost model is asked.

    The environment's file is read at the first call. One that does not fit is warned about.
    """
    return None if device.gpu is None else _current()


def _current() -> Table | None:
    global _table, _was_read
    if not _was_read:
        _was_read = True
        _table = from_file(VARIABLE, parse, _INSTEAD)
    return _table


@contextmanager
def use_table(table: Table | None) -> Iterator[None]:
    """Choose by this table, or if None by the cost model alone, in the whole process until the
    block ends. The file that the environment names is ignored."""
    global _table, _was_read
    before = _table, _was_read
    _table, _was_read = table, True
    try:
        yield
    finally:
        _table, _was_read = before


def triton_version() -> str:
    """Of the Triton in use; empty where there is none."""
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def parse(source: str, doc: Any) -> Table:
    """The table in a JSON document.

    Args:
        source: where it comes from.

    Raises:
        ValueError: it is not such a table, or of another format or release of Triton; it names what
            was found and what was expected.
    """
    if not isinstance(doc, dict) or not isinstance(doc.get("entries"), list):
        raise ValueError("holds no entries")
    check_head(doc, {"format": FORMAT})
    here = triton_version()
    if _release(doc.get("triton")) != _release(here):
        raise ValueError(f"triton: got {doc.get('triton')!r}, expected {_release(here)}.*")
    if not isinstance(doc.get("gpu"), str):
        raise ValueError(f"gpu: got {doc.get('gpu')!r}, expected a name")
    entries: dict[Key, Entry] = {}
    for i, item in enumerate(doc["entries"]):
        if not isinstance(item, dict):
            raise ValueError(f"entries[{i}]: got {item!r}, expected an object")
        try:
            key, entry = _entry(item)
        except ValueError as error:
            raise ValueError(f"entries[{i}].{error}") from error
        if key in entries:
            raise ValueError(f"entries[{i}]: a second one up to m={key.m}, expected one")
        entries[key] = entry
    return Table(doc["gpu"], entries, source)


def _release(version: Any) -> str:
    """Major and minor: code and its speed may change with either."""
    return ".".join(str(version).split(".")[:2])


def _entry(item: Mapping[str, Any]) -> tuple[Key, Entry]:
    op, dtype = _one_of(item, "op", OPS), _one_of(item, "dtype", _DTYPES)
    m, n, k = (_count(item, name) for name in ("m", "n", "k"))
    flags = (_flag(item, name) for name in ("dropout", "quantised"))
    key = Key(op, next_power_of_2(m), n, k, _count(item, "r", least=0), dtype, *flags)
    strategy, seconds = _one_of(item, "strategy", STRATEGIES), item.get("seconds")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0:
        raise ValueError(f"seconds: got {seconds!r}, expected more than 0")
    return key, Entry(strategy, _config(item.get("config"), strategy), float(seconds))


def _config(found: Any, strategy: str) -> GemmConfig | None:
    if strategy == "addmm":
        if found is not None:
            raise ValueError(f"config: got {found!r}, expected null in addmm")
        return None
    expected = [f.name for f in fields(GemmConfig)]
    if not isinstance(found, dict) or set(found) != set(expected):
        raise ValueError(f"config: got {found!r}, expected {', '.join(expected)}")
    sizes = {name: _count(found, name) for name in expected if name != "tma"}
    return GemmConfig(**sizes, tma=_flag(found, "tma"))


def _one_of(item: Mapping[str, Any], name: str, allowed: tuple[str, ...]) -> str:
    if item.get(name) not in allowed:
        raise ValueError(f"{name}: got {item.get(name)!r}, expected one of {', '.join(allowed)}")
    return str(item[name])


def _count(item: Mapping[str, Any], name: str, least: int = 1) -> int:
    found = item.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{name}: got {found!r}, expected a whole number from {least}")
    return found


def _flag(item: Mapping[str, Any], name: str) -> bool:
    found = item.get(name)
    if not isinstance(found, bool):
        raise ValueError(f"{name}: got {found!r}, expected true or false")
    return found
