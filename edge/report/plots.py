"""Plots as SVG text: lines over sizes, and stacked bars. Pure functions that know nothing of what is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from edge.report import svg
from edge.report.scale import Scale, round_ticks, spread, tick_label

WIDTH, HEIGHT = 460.0, 270.0
TOP, BOTTOM, LEFT = 30.0, 46.0, 50.0
CHAR_WIDTH = 6.4  # of the plots' 12 px sans-serif, on the wide side
LABEL_GAP = 15.0
NUM_COLOURS = 12
NEUTRAL = NUM_COLOURS  # a colour of no series
BAR, BAR_GAP = 26.0, 22.0


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a size; `low` and `high` are the range of its samples, None where there is none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """A named series; dashed where it is projected or simulated rather than measured."""

    name: str
    points: tuple[Point, ...]
    is_dashed: bool = False
    colour: int = 0


@dataclass(frozen=True, slots=True)
class Phase:
    """A named part of the x axis that begins at `x`."""

    name: str
    x: float


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of a bar."""

    name: str
    value: float
    colour: int


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of segments end to end; `limit` is marked across it; `note` stands behind its end."""

    label: str
    segments: tuple[Segment, ...]
    limit: float | None = None
    note: str = ""

    @property
    def total(self) -> float:
        """Where its last segment ends."""
        return sum(segment.value for segment in self.segments)


def size_plot(title: str, lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Lines with points over sizes, which are marked where they lie, on a logarithmic axis; y begins at 0."""
    sizes = sorted({point.x for line in lines for point in line.points})
    right = _right_margin(lines)
    x = Scale(sizes[0], sizes[-1], LEFT + 12, WIDTH - right - 8, is_log=True)
    y = _y_scale(lines)
    marks = [svg.text(f"{size:,.0f}", x.at(size), HEIGHT - BOTTOM + 17, "tick", "middle") for size in sizes]
    drawn = [_series(line, x, y, has_points=True) for line in lines]
    frame = _frame(y, right, x_label, y_label)
    return svg.document(WIDTH, HEIGHT, title, *frame, *marks, *drawn, *_end_labels(lines, x, y))


def time_plot(title: str, lines: Sequence[Line], phases: Sequence[Phase], x_label: str, y_label: str) -> str:
    """Lines over time, with the beginnings of its phases marked; both axes begin at 0."""
    right = _right_margin(lines)
    end = max(point.x for line in lines for point in line.points)
    x, y = Scale(0, end, LEFT, WIDTH - right), replace(_y_scale(lines), stop=TOP + 14)
    marks = [
        svg.text(tick_label(tick), x.at(tick), HEIGHT - BOTTOM + 17, "tick", "middle")
        for tick in round_ticks(end, 6)
        if tick <= end
    ]
    drawn = [_series(line, x, y, has_points=False) for line in lines]
    frame = _frame(y, right, x_label, y_label)
    return svg.document(WIDTH, HEIGHT, title, *frame, *marks, *_phases(phases, x), *drawn, *_end_labels(lines, x, y))


def stacked_bars(title: str, bars: Sequence[Bar], x_label: str, *, least_high: float = 0.0) -> str:
    """Horizontal bars under their labels, on one scale from 0; segments keep a thin distance."""
    high = max((least_high, *(max(bar.total, bar.limit or 0.0) for bar in bars)))
    ticks = round_ticks(high)
    x = Scale(0, ticks[-1], 8, WIDTH - 24)
    height = 8 + len(bars) * (BAR + BAR_GAP) + BOTTOM
    base = height - BOTTOM + 4
    grid = [svg.line(x.at(tick), 8, x.at(tick), base, "rule") for tick in ticks]
    marks = [svg.text(tick_label(tick), x.at(tick), base + 16, "tick", "middle") for tick in ticks]
    drawn = [_bar(bar, x, 8 + index * (BAR + BAR_GAP)) for index, bar in enumerate(bars)]
    caption = svg.text(x_label, (x.start + x.stop) / 2, height - 8, "axis", "middle")
    return svg.document(WIDTH, height, title, *grid, *marks, *drawn, caption)


def _right_margin(lines: Sequence[Line]) -> float:
    longest = max((len(line.name) for line in lines), default=0)
    return min(20 + CHAR_WIDTH * longest, WIDTH / 2)


def _y_scale(lines: Sequence[Line]) -> Scale:
    high = max(point.y if point.high is None else point.high for line in lines for point in line.points)
    return Scale(0, round_ticks(high)[-1], HEIGHT - BOTTOM, TOP)


def _frame(y: Scale, right: float, x_label: str, y_label: str) -> list[str]:
    ticks = round_ticks(y.high)
    return [
        *(svg.line(LEFT, y.at(tick), WIDTH - right, y.at(tick), "rule") for tick in ticks),
        *(svg.text(tick_label(tick), LEFT - 7, y.at(tick) + 4, "tick", "end") for tick in ticks),
        svg.text(y_label, 2, 12, "axis"),
        svg.text(x_label, (LEFT + WIDTH - right) / 2, HEIGHT - 8, "axis", "middle"),
    ]


def _series(line: Line, x: Scale, y: Scale, *, has_points: bool) -> str:
    colour = _colour(line.colour)
    dash = " dashed" if line.is_dashed else ""
    path = svg.polyline([(x.at(point.x), y.at(point.y)) for point in line.points], f"line s{colour}{dash}")
    if not has_points:
        return path
    ranges = [
        svg.line(x.at(point.x), y.at(point.low), x.at(point.x), y.at(point.high), f"range s{colour}")
        for point in line.points
        if point.low is not None and point.high is not None and point.low < point.high
    ]
    dots = [svg.dot(x.at(point.x), y.at(point.y), f"dot f{colour}") for point in line.points]
    return "".join((*ranges, path, *dots))


def _end_labels(lines: Sequence[Line], x: Scale, y: Scale) -> list[str]:
    """Each line's name behind its end, joined to it by a leader of its colour: ends may lie close together."""
    ends = [(x.at(line.points[-1].x), y.at(line.points[-1].y)) for line in lines]
    places = spread([end[1] for end in ends], LABEL_GAP, TOP, HEIGHT - BOTTOM)
    left = max((end[0] for end in ends), default=0.0) + 14
    drawn = []
    for line, end, place in zip(lines, ends, places, strict=True):
        drawn.append(svg.line(end[0] + 5, end[1], left - 3, place, f"leader s{_colour(line.colour)}"))
        drawn.append(svg.text(line.name, left, place + 4, "label"))
    return drawn


def _phases(phases: Sequence[Phase], x: Scale) -> list[str]:
    """A mark where each phase begins; a name takes the next line where the one before it is in the way."""
    drawn, free = [], [0.0, 0.0]
    for phase in phases:
        place = x.at(min(phase.x, x.high))
        width = 8 + CHAR_WIDTH * len(phase.name)
        start = place if place + width <= x.stop else max(place - width, 0.0)
        row = next((row for row, end in enumerate(free) if end <= start), 0)
        free[row] = start + width
        drawn.append(svg.line(place, TOP - 16 + 14 * row, place, HEIGHT - BOTTOM, "phase"))
        drawn.append(svg.text(phase.name, start + 4, TOP - 8 + 14 * row, "tick"))
    return drawn


def _colour(index: int) -> int:
    return index if index == NEUTRAL else index % NUM_COLOURS


def _bar(bar: Bar, x: Scale, top: float) -> str:
    drawn, edge = [svg.text(bar.label, x.start, top + 13, "label")], 0.0
    for segment in bar.segments:
        start, stop = x.at(edge), x.at(edge + segment.value)
        tip, colour = f"{segment.name}: {segment.value:,.1f}", f"segment f{_colour(segment.colour)}"
        drawn.append(svg.rect(start, top + 18, stop - start, BAR - 6, colour, tip))
        edge += segment.value
    if bar.note:
        drawn.append(svg.text(bar.note, x.stop, top + 13, "tick", "end"))
    if bar.limit is not None:
        drawn.append(svg.line(x.at(bar.limit), top + 15, x.at(bar.limit), top + BAR + 15, "limit"))
    return "".join(drawn)
