"""What `accelerate` did, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerRow:
    """One layer that PEFT has adapted.

    Attributes:
        name: the layer's name in the model.
        kind: its class in PEFT, such as "lora.Linear".
        base: the class of the layer under the adapters, such as "Conv1D".
        reason: why it runs on PEFT's code; "" if it runs on this package's kernels.

    Examples:
        >>> from lora_kernels.integrations.peft import LayerRow
        >>> LayerRow("q_proj", "lora.Linear", "Linear", "").accelerated
        True
    """

    name: str
    kind: str
    base: str
    reason: str

    @property
    def accelerated(self) -> bool:
        """Whether the layer runs on this package's kernels."""
        return not self.reason


@dataclass(frozen=True)
class AccelerationReport:
    """Every layer that PEFT has adapted, as it stands: with the adapters that are active now.

    Attributes:
        rows: one for each layer, in the order of the model.

    Examples:
        >>> from lora_kernels.integrations.peft import AccelerationReport, LayerRow
        >>> why = "no kernel for convolutions"
        >>> rows = (LayerRow("q", "lora.Linear", "Linear", ""),)
        >>> rows += (LayerRow("conv", "lora.Conv2d", "Conv2d", why),)
        >>> print(AccelerationReport(rows))
        1 of 2 layers of PEFT run on lora_kernels
        layer  PEFT's class  base    runs on
        q      lora.Linear   Linear  lora_kernels
        conv   lora.Conv2d   Conv2d  PEFT: no kernel for convolutions
    """

    rows: tuple[LayerRow, ...]

    @property
    def accelerated(self) -> tuple[LayerRow, ...]:
        """The layers that run on this package's kernels."""
        return tuple(row for row in self.rows if row.accelerated)

    @property
    def left(self) -> tuple[LayerRow, ...]:
        """The layers that run on PEFT's code, each with its reason."""
        return tuple(row for row in self.rows if not row.accelerated)

    def __str__(self) -> str:
        head = f"{len(self.accelerated)} of {len(self.rows)} layers of PEFT run on lora_kernels"
        cells = [["layer", "PEFT's class", "base", "runs on"]] if self.rows else []
        for row in self.rows:
            path = f"PEFT: {row.reason}" if row.reason else "lora_kernels"
            cells.append([row.name, row.kind, row.base, path])
        return "\n".join([head, *_lines(cells)])


def _lines(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
