"""What a launch counted and reported."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

_MMA = re.compile(r"\.m(\d+)n(\d+)k(\d+)(?:\.|$)")
_LOADS = ("global_load", "cp_async", "tma_load")
_STORES = ("global_store", "global_atomic", "tma_store")
_COLUMNS = (
    *("line", "src_line", "warps", "threads", "requests", "bytes", "sectors", "conflicts"),
    "text",
)


class Result:
    """A launch's counters and reports; the README says what each counts.

    Attributes:
        error: why it stopped, or "".
        instr: the counts of each PTX instruction, with its line and that of the source.
        compiled: what Triton made of the kernel, where it was one of Triton's.
    """

    def __init__(self, found: dict[str, Any], seconds: float, compiled: Any = None) -> None:
        self.error: str = found["error"]
        self.reports: list[dict[str, Any]] = found["reports"]
        self.counters: dict[str, Any] = found["counters"]
        self.printed: str = found["printed"]
        self.blocks: int = found["blocks"]
        self.warps_per_block: int = found["warps_per_block"]
        self.shared_bytes: int = found["shared_bytes"]
        self.instr: list[dict[str, Any]] = [
            dict(zip(_COLUMNS, row, strict=True)) for row in found["instr"]
        ]
        self.seconds, self.compiled = seconds, compiled
        c = self.counters
        self.mma_flops = sum(_flops(name, count) for name, count in c["mma"].items())
        self.global_bytes_requested: int = sum(c[k]["bytes"] for k in (*_LOADS, *_STORES))
        self.global_load_sector_bytes: int = 32 * sum(c[k]["sectors"] for k in _LOADS)
        self.global_store_sector_bytes: int = 32 * sum(c[k]["sectors"] for k in _STORES)
        self.dram_min_bytes: int = c["unique_load_bytes"] + c["unique_store_bytes"]

    @property
    def races(self) -> list[dict[str, Any]]:
        return [r for r in self.reports if r["kind"] == "race"]

    def kinds(self) -> Counter[str]:
        """How often each kind of report was made."""
        found: Counter[str] = Counter()
        for r in self.reports:
            found[r["kind"]] += r["count"]
        return found

    def hot(self, by: str = "warps", n: int = 20) -> list[dict[str, Any]]:
        """The instructions with most of a count."""
        return sorted(self.instr, key=lambda i: -i[by])[:n]

    def by_source_line(self) -> dict[int, dict[str, int]]:
        found: dict[int, dict[str, int]] = {}
        for i in self.instr:
            sums = found.setdefault(i["src_line"], dict.fromkeys(_COLUMNS[2:3] + _COLUMNS[5:8], 0))
            for name in sums:
                sums[name] += i[name]
        return found

    def summary(self) -> str:
        """The profile as text."""
        c, moved = self.counters, (*_LOADS, *_STORES)
        lanes = c["thread_instructions"] / max(1, 32 * c["warp_instructions"])
        lines = [
            f"blocks {self.blocks}, warps/block {self.warps_per_block}, "
            f"shared {self.shared_bytes} B, {self.seconds:.3f} s, "
            f"warp instructions {c['warp_instructions']} ({lanes:.0%} of lanes active)"
        ]
        lines += [self._global(k) for k in moved if c[k]["requests"]]
        lines.append(
            f"  unique (each 32 B sector once): loads {c['unique_load_bytes']} B, "
            f"stores {c['unique_store_bytes']} B"
        )
        shared = ("shared_load", "shared_store", "ldmatrix")
        lines += [self._shared(k) for k in shared if c[k]["requests"]]
        if c["cp_async_shared"]["wavefronts"]:
            copies = "wavefronts {wavefronts} conflicts {conflicts}".format(**c["cp_async_shared"])
            lines.append(f"  cp.async into shared: {copies}")
        if c["mbarrier"]["arrivals"]:
            lines.append(
                "  mbarrier arrivals {arrivals}, waits passed {waits}; ".format(**c["mbarrier"])
                + "griddepcontrol wait {wait}, launch_dependents {launch_dependents}".format(
                    **c["griddepcontrol"]
                )
            )
        if c["local"]["requests"]:
            lines.append(f"  local (spill/stack): {c['local']}")
        lines.append(
            f"  barriers {c['barriers']} (warp arrivals), "
            f"divergent branches {c['divergent_branches']}"
        )
        lines += [f"  {count:9d} x {name}" for name, count in c["mma"].items()]
        if self.mma_flops:
            rate = self.mma_flops / max(self.seconds, 1e-9) / 1e6
            lines.append(f"  MMA FLOP {self.mma_flops} ({rate:.0f} MFLOP/s emulated)")
        classes = sorted(c["warp_inst_by_class"].items(), key=lambda item: -item[1])
        lines.append("  warp instructions: " + ", ".join(f"{k} {v}" for k, v in classes))
        lines += [f"  REPORT {r['kind']} x{r['count']}: {r['msg']}" for r in self.reports]
        return "\n".join(lines)

    __str__ = summary

    def _global(self, name: str) -> str:
        c = self.counters[name]
        each = c["sectors"] / max(1, c["requests"])
        efficiency = 100 * c["bytes"] / max(1, 32 * c["sectors"])
        return (
            f"  {name:<14s} requests {c['requests']:9d}  bytes {c['bytes']:12d}  "
            f"sectors {c['sectors']:10d}  "
            f"({each:.2f} sectors/request, efficiency {efficiency:.0f}%)"
        )

    def _shared(self, name: str) -> str:
        c = self.counters[name]
        return (
            f"  {name:<14s} requests {c['requests']:9d}  bytes {c['bytes']:12d}  "
            f"wavefronts {c['wavefronts']:8d}  conflicts {c['conflicts']:8d}"
        )


def _flops(name: str, count: int) -> int:
    """Of so many instructions of a warp."""
    found = _MMA.search(name)
    assert found is not None, name
    m, n, k = map(int, found.groups())
    warps = 4 if name.startswith("wgmma") else 1  # that share one
    return 2 * m * n * k * count // warps
