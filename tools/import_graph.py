"""Draws docs/architecture.svg from the imports in lora_kernels: `python -m tools.import_graph`.

Imports run downwards only; one that does not is an error here, and a test.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_kernels"
PICTURE = ROOT / "docs" / "architecture.svg"
# Floors from the top. A part imports from lower floors only.
FLOORS = (
    ("cli",),
    ("serving", "training"),
    ("adapters",),
    ("integrations",),
    ("nn",),
    ("functional",),
    ("ops",),
    ("dispatch",),
)
WORDS = {
    "cli": "the lora-kernels command",
    "serving": "a pool of adapters, by name",
    "training": "many adapters in one batch",
    "adapters": "apply, save, load, merge, report",
    "integrations": "PEFT, bitsandbytes, transformers",
    "nn": "the layers",
    "functional": "the stateless API",
    "dispatch": "which backend runs, and why",
}
# Parts that no floor's code needs: the package's front and the tests' error budget.
ASIDE = ("__init__", "testing")
WIDTH, HEIGHT, GAP, MARGIN = 300, 46, 26, 20


def imported(path: Path) -> Iterator[str]:
    """The parts of the package that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            first, *rest = name.split(".")
            if first == PACKAGE.name and rest:
                yield rest[0]


def edges(package: Path = PACKAGE) -> set[tuple[str, str]]:
    """(importer, imported) between the parts of the package."""
    parts = {part for floor in FLOORS for part in floor}
    found = set()
    for path in package.rglob("*.py"):
        part = path.relative_to(package).parts[0].removesuffix(".py")
        found |= {(part, other) for other in imported(path) if other in parts}
    return {(a, b) for a, b in found if a != b and a not in ASIDE}


def upward(found: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports that do not run down."""
    floor = {part: i for i, floor in enumerate(FLOORS) for part in floor}
    return sorted((a, b) for a, b in found if floor[a] >= floor[b])


def reduced(found: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """The edges that no path of others stands for."""

    def reaches(a: str, b: str, but: tuple[str, str]) -> bool:
        onward = [y for x, y in found if x == a and (x, y) != but]
        return b in onward or any(reaches(y, b, but) for y in onward)

    return sorted(edge for edge in found if not reaches(*edge, edge))


def families(package: Path = PACKAGE) -> list[str]:
    """The folders of ops, `common` last."""
    names = sorted(path.parent.name for path in (package / "ops").glob("*/__init__.py"))
    return sorted(names, key=lambda name: name == "common")


def boxes() -> dict[str, tuple[float, float, float]]:
    """(left, top, width) of each part."""
    middle = MARGIN + WIDTH + GAP / 2
    placed: dict[str, tuple[float, float, float]] = {}
    for i, floor in enumerate(FLOORS):
        left = middle - (len(floor) * (WIDTH + GAP) - GAP) / 2
        for j, part in enumerate(floor):
            placed[part] = (left + j * (WIDTH + GAP), MARGIN + i * (HEIGHT + GAP), WIDTH)
    left, width = MARGIN, 2 * WIDTH + GAP
    placed["ops"] = (left, placed["ops"][1], width)
    return placed


def picture() -> str:
    """The SVG."""
    found = edges()
    if wrong := upward(found):
        raise SystemExit(
            "imports run downwards only: " + ", ".join(f"{a} -> {b}" for a, b in wrong)
        )
    placed = boxes()
    width, height = (
        2 * (MARGIN + WIDTH) + GAP,
        2 * MARGIN + (len(FLOORS) + 1) * (HEIGHT + GAP) - GAP,
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="13">',
        "<title>The parts of lora_kernels and their imports</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#5f6b7a"/></marker></defs>',
    ]
    for a, b in reduced(found):
        out.append(_line(placed[a], placed[b], f"{a} imports {b}"))
    words = {**WORDS, "ops": ", ".join(families())}
    for part, (left, top, wide) in placed.items():
        out += _box(left, top, wide, part, words[part], "#e8eef7")
    native = (MARGIN, placed["dispatch"][1] + HEIGHT + GAP, 2 * WIDTH + GAP)
    out.append(_line(placed["dispatch"], native, "dispatch loads the extension"))
    out += _box(
        *native, "csrc", "the extension: bindings over torch-free CPU and CUDA kernels", "#f4ecdf"
    )
    return "\n".join([*out, "</svg>", ""])


def _line(a: tuple[float, float, float], b: tuple[float, float, float], title: str) -> str:
    # Straight down where the boxes are above each other, else from middle to middle.
    x1, x2 = a[0] + a[2] / 2, b[0] + b[2] / 2
    return (
        f'<path d="M{x1:g} {a[1] + HEIGHT:g} L{x2:g} {b[1] - 1:g}" stroke="#5f6b7a" fill="none" '
        f'marker-end="url(#end)"><title>{escape(title)}</title></path>'
    )


def _box(left: float, top: float, width: float, name: str, words: str, fill: str) -> list[str]:
    middle = left + width / 2
    return [
        f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{HEIGHT}" rx="5" fill="{fill}" '
        'stroke="#5f6b7a"/>',
        f'<text x="{middle:g}" y="{top + 19:g}" text-anchor="middle" font-weight="bold" '
        f'fill="#1d2733">{escape(name)}</text>',
        f'<text x="{middle:g}" y="{top + 36:g}" text-anchor="middle" fill="#1d2733">'
        f"{escape(words)}</text>",
    ]


def main() -> int:
    made = PICTURE.with_suffix(".tmp")
    made.write_text(picture(), encoding="utf-8")
    made.replace(PICTURE)
    print(f"wrote {PICTURE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
