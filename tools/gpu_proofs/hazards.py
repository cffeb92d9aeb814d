"""Reads Hopper's machine code for a fault that no execution of PTX shows: a register that changes
while a product that is still under way reads it.

A warpgroup's product (HGMMA) may read its left side from registers long after the next instruction
has begun, until a WARPGROUP.DEPBAR waits for it. Triton up to 3.7 and ptxas before CUDA 13.3 have
overwritten such registers before that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_ADDRESS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.\w+):")
_TARGET = re.compile(r"`\((\.\w+)\)")
_REGISTER = re.compile(r"\bR(\d+)\b")
_PREDICATE = re.compile(r"U?P(?:\d+|T)$")
# Of those that name a predicate first, these write the register after it.
_AFTER_PREDICATE = ("SHFL", "LOP3", "ATOM", "ATOMG", "ATOMS", "VOTE", "MATCH")
_WRITES_TWO = re.compile(r"IMAD\.WIDE|^D(?:ADD|MUL|FMA)|\.F64|\.64\b|^CS2R(?!\.32)")
_LEFT = 4  # registers of a thread that hold a product's left side, whatever its type
_MOST_STATES = 200_000


@dataclass(frozen=True)
class _Product:
    """What an HGMMA reads and writes until it is waited for."""

    at: int
    left: frozenset[int]
    sums: frozenset[int]


# What registers of left sides hold, where that is a constant: it may be written again.
_Constants = frozenset[tuple[int, str]]
# Products not committed yet, the groups that are, the oldest first, and constants.
_State = tuple[frozenset[_Product], tuple[frozenset[_Product], ...], _Constants]


@dataclass
class _Instruction:
    at: int
    name: str
    operands: str
    predicated: bool
    targets: list[str] = field(default_factory=list)

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    def writes(self) -> frozenset[int]:
        parts = [p.strip() for p in self.operands.split(",")]
        place = 0
        if _PREDICATE.match(parts[0]):
            if self.base not in _AFTER_PREDICATE or len(parts) < 2:
                return frozenset()
            place = 1
        found = re.match(r"R(\d+)\b", parts[place])
        if found is None:
            return frozenset()
        first = int(found[1])
        return frozenset(range(first, first + self._width()))

    def _width(self) -> int:
        if self.base == "HGMMA":
            shape = re.search(r"\.64x(\d+)x\d+\.(F32|F16|S32)", self.name)
            assert shape is not None, self.name
            return int(shape[1]) // (4 if shape[2] == "F16" else 2)
        if self.base == "LDSM":
            return int(self.name.rsplit(".", 1)[-1]) if self.name[-1] in "24" else 1
        if self.base in ("HMMA", "IMMA"):
            return 2 if self.name.endswith(".F16") else 4
        if ".128" in self.name:
            return 4
        return 2 if _WRITES_TWO.search(self.name) else 1

    def constant(self) -> str | None:
        """The number that it writes, if that is all it does."""
        found = re.fullmatch(r"R\d+, (?:RZ, RZ, )?(0x[0-9a-f]+)", self.operands.strip())
        moves = self.name in ("MOV", "IMAD.MOV.U32") and not self.predicated
        return found[1] if moves and found else None

    def product(self) -> _Product:
        parts = [p.strip() for p in self.operands.split(",")]
        left = re.match(r"R(\d+)\b", parts[1])
        read = range(int(left[1]), int(left[1]) + _LEFT) if left else ()
        return _Product(self.at, frozenset(read), self.writes())


def overwritten(sass: str) -> list[str]:
    """Each instruction of nvdisasm's output that writes what an unfinished product reads, or
    touches its sums."""
    found: dict[str, None] = {}
    for code, labels in _functions(sass):
        for line in _walk(code, labels):
            found[line] = None
    return list(found)


def _functions(sass: str) -> Iterator[tuple[list[_Instruction], dict[str, int]]]:
    code: list[_Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if line.startswith(".text.") or line.lstrip().startswith(".section"):
            if code:
                yield code, labels
            code, labels = [], {}
        elif label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif text := _ADDRESS.match(line):
            predicated = "@" in line.split(text[2])[0]
            targets = _TARGET.findall(text[3])
            code.append(_Instruction(int(text[1], 16), text[2], text[3], predicated, targets))
    if code:
        yield code, labels


def _walk(code: list[_Instruction], labels: dict[str, int]) -> Iterator[str]:
    """Follow every path with what is under way on it."""
    if not any(i.base == "HGMMA" for i in code):
        return
    lefts = frozenset().union(*(i.product().left for i in code if i.base == "HGMMA"))
    start: _State = (frozenset(), (), frozenset())
    todo: list[tuple[int, _State]] = [(0, start)]
    seen = {(0, start)}
    while todo:
        place, state = todo.pop()
        while place < len(code):
            now = code[place]
            yield from _faults(now, state)
            state = _after(now, state, lefts)
            place += 1
            if now.base in ("EXIT", "RET") and not now.predicated:
                break
            if now.base in ("BRA", "CALL") and now.targets:
                here = (labels[now.targets[-1]], state)
                if here not in seen:
                    if len(seen) > _MOST_STATES:
                        raise RuntimeError("too many paths to follow")
                    seen.add(here)
                    todo.append(here)
                if now.base == "BRA" and not now.predicated:
                    break


def _faults(now: _Instruction, state: _State) -> Iterator[str]:
    pending, groups, constants = state
    unfinished = pending.union(*groups)
    if not unfinished or now.base == "HGMMA":  # products of one warpgroup run in their order
        return
    writes, constant = now.writes(), now.constant()
    touches = {int(r) for r in _REGISTER.findall(now.operands)} | writes
    if constant is not None:
        writes = frozenset(r for r in writes if (r, constant) not in constants)
    for product in unfinished:
        if writes & product.left:
            yield (
                f"{now.name} at {now.at:#x} overwrites R{min(writes & product.left)}, which "
                f"the HGMMA at {product.at:#x} still reads"
            )
        if touches & product.sums:
            yield (
                f"{now.name} at {now.at:#x} takes R{min(touches & product.sums)} of the HGMMA at "
                f"{product.at:#x} before it is done"
            )


def _after(now: _Instruction, state: _State, lefts: frozenset[int]) -> _State:
    pending, groups, constants = state
    written = now.writes() & lefts
    if written:
        constants = frozenset(c for c in constants if c[0] not in written)
        constant = now.constant()
        if constant is not None:
            constants |= {(r, constant) for r in written}
    if now.base == "HGMMA":
        pending |= {now.product()}
        if "gsb0" in now.operands:
            return frozenset(), (*groups, pending), constants
    elif now.name.startswith("WARPGROUP.DEPBAR"):
        left = int(now.operands.split(",")[-1].strip(), 16)
        groups = groups[max(0, len(groups) - left) :]
    return pending, groups, constants
