"""Axes: where a value lies, which round values are marked, and labels that keep their distance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values of [low, high] to pixels of [start, stop], by their logarithm where `is_log`."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; a range without extent lies in the middle."""
        low, high, value = (self._of(number) for number in (self.low, self.high, value))
        part = (value - low) / (high - low) if high > low else 0.5
        return self.start + part * (self.stop - self.start)

    def _of(self, value: float) -> float:
        return math.log(value) if self.is_log else value


def round_ticks(high: float, most: int = 5) -> list[float]:
    """Round values from 0 up to the first that is not below `high`, at most `most` steps."""
    if high <= 0:
        return [0.0, 1.0]
    size = 10.0 ** math.floor(math.log10(high / most))
    step = next(step * size for step in STEPS if math.ceil(high / (step * size) - 1e-9) <= most)
    return [step * index for index in range(math.ceil(high / step - 1e-9) + 1)]


def tick_label(value: float) -> str:
    """A round value as text."""
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.10g}"


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as a pass down and a pass up can, until each is `gap` from the next, within bounds.

    Where [low, high] has no room for all, they are spread over it evenly.
    """
    if len(positions) > 1:
        gap = min(gap, (high - low) / (len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    placed = [min(max(positions[index], low), high) for index in order]
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    limit = high
    for index in reversed(range(len(placed))):
        placed[index] = limit = min(placed[index], limit)
        limit -= gap
    found = [0.0] * len(placed)
    for index, position in zip(order, placed, strict=True):
        found[index] = position
    return found
