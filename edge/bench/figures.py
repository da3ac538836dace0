"""Measured figures, and how they are printed and stored. Knows nothing of what they measure."""

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = ("figure", "median", "unit", "range", "of limit", "")
RIGHT = {1, 3, 4}


@dataclass(frozen=True, slots=True)
class Figure:
    """A median with its range; `value` is None where it could not be taken, and `note` says why.

    `limit_share` is the part of what the machine's measured bandwidth and arithmetic would allow.
    """

    key: str
    label: str
    unit: str
    value: float | None
    low: float | None = None
    high: float | None = None
    num_samples: int = 0
    limit_share: float | None = None
    simulated: bool = False
    note: str = ""

    def row(self) -> tuple[str, ...]:
        """Its line of the table."""
        label = f"{self.label} (simulated)" if self.simulated else self.label
        if self.value is None:
            return (label, "-", self.unit, "", "", self.note)
        spread = f"{short(self.low)} - {short(self.high)}" if self.low != self.high else ""
        share = "" if self.limit_share is None else f"{self.limit_share:.0%}"
        return (label, short(self.value), self.unit, spread, share, self.note)


def figure(
    key: str,
    label: str,
    unit: str,
    samples: Sequence[float],
    *,
    limit_share: float | None = None,
    simulated: bool = False,
    note: str = "",
) -> Figure:
    """The median of samples."""
    if not samples:
        return Figure(key, label, unit, None, simulated=simulated, note=note or "not measured")
    value = statistics.median(samples)
    return Figure(
        key,
        label,
        unit,
        value,
        min(samples),
        max(samples),
        len(samples),
        limit_share=limit_share,
        simulated=simulated,
        note=note,
    )


@dataclass(frozen=True, slots=True)
class Report:
    """All figures of one run and what it ran on."""

    about: Mapping[str, Any]
    figures: tuple[Figure, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values: `about`, and the figures by key."""
        return {"about": dict(self.about), "figures": {entry.key: asdict(entry) for entry in self.figures}}

    def to_text(self) -> str:
        """`to_json` as the content of a file."""
        return json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"

    def table(self) -> str:
        """The figures as aligned plain text."""
        return aligned([COLUMNS, *(entry.row() for entry in self.figures)], RIGHT)


def aligned(rows: Sequence[Sequence[str]], right: Collection[int]) -> str:
    """Rows of cells as lines of plain text; columns in `right` end flush."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_line(row, widths, right) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int], right: Collection[int]) -> str:
    cells = [
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def short(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
