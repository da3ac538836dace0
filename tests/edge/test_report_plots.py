"""The report's plots as pure functions: well-formed SVG, finite coordinates, labels that keep their distance."""

import itertools
import xml.etree.ElementTree as ElementTree

import pytest

from edge.report import svg
from edge.report.markup import element, number
from edge.report.plots import (
    HEIGHT,
    NEUTRAL,
    NUM_COLOURS,
    WIDTH,
    Bar,
    Line,
    Phase,
    Point,
    Segment,
    size_plot,
    stacked_bars,
    time_plot,
)
from edge.report.scale import Scale, round_ticks, spread, tick_label
from edge.report.style import INK, PLOT_COLOURS, style_sheet
from tests.pictures import parsed

HOSTILE = "<script>alert(\"1\")</script> & 'x'"


def texts(root: ElementTree.Element) -> list[str]:
    return [node.text or "" for node in root.iter("text")]


LINES = [
    Line("measured", (Point(128, 20, 18, 23), Point(2048, 19, 17, 20), Point(32_768, 12.5, 12.5, 12.5))),
    Line("projected", (Point(128, 21), Point(2048, 19.5)), is_dashed=True, colour=NUM_COLOURS + 1),
]


def test_a_size_plot_has_its_lines_points_ranges_and_labels() -> None:
    root = parsed(size_plot("Decode", LINES, "context, tokens", "tokens/s"))
    assert root.attrib["aria-label"] == "Decode"
    assert [node.attrib["class"] for node in root.iter("polyline")] == ["line s0", "line s1 dashed"]
    assert len(list(root.iter("circle"))) == 5
    ranges = [node for node in root.iter("line") if node.attrib["class"].startswith("range")]
    assert len(ranges) == 2, "two of the points have a range"
    for text in ("128", "2,048", "32,768", "context, tokens", "tokens/s", "measured", "projected", "0", "25"):
        assert text in texts(root)


def test_sizes_lie_evenly_by_their_ratio_and_values_from_zero() -> None:
    root = parsed(size_plot("p", [Line("a", (Point(100, 10), Point(1000, 5), Point(10_000, 0)))], "x", "y"))
    points = [tuple(map(float, pair.split(","))) for pair in next(root.iter("polyline")).attrib["points"].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.02)


@pytest.mark.parametrize("points", [(Point(512, 3.0),), (Point(512, 0.0), Point(1024, 0.0))])
def test_a_single_size_and_nothing_but_zeros_can_be_drawn(points: tuple[Point, ...]) -> None:
    parsed(size_plot("p", [Line("a", points)], "x", "y"))
    parsed(time_plot("p", [Line("a", points)], [Phase("load", 0.0)], "x", "y"))


def test_labels_of_lines_that_end_together_are_apart() -> None:
    lines = [Line(f"device {index}", (Point(1, 5), Point(2, 10 + index / 100))) for index in range(8)]
    root = parsed(size_plot("p", lines, "x", "y"))
    places = [float(node.attrib["y"]) for node in root.iter("text") if (node.text or "").startswith("device")]
    assert min(abs(a - b) for a, b in itertools.combinations(places, 2)) >= 14.99
    for node in root.iter("text"):
        if (node.text or "").startswith("device"):
            assert float(node.attrib["x"]) + 6.0 * len(node.text or "") <= WIDTH


def test_phases_that_begin_together_do_not_overlap() -> None:
    phases = [Phase("load", 0.0), Phase("prefill", 0.1), Phase("decode", 9.9)]
    root = parsed(time_plot("p", [Line("a", (Point(0, 1), Point(10, 2)))], phases, "seconds", "MB"))
    found = {node.text: node for node in root.iter("text") if node.text in ("load", "prefill", "decode")}
    assert found["load"].attrib["y"] != found["prefill"].attrib["y"]
    assert all(float(node.attrib["y"]) < HEIGHT for node in found.values())
    marks = [node for node in root.iter("line") if node.attrib["class"] == "phase"]
    assert len(marks) == 3


def test_bars_are_end_to_end_and_as_long_as_their_values() -> None:
    segments = (Segment("a", 30, 0), Segment("b", 0, 1), Segment("c", 70, NEUTRAL))
    root = parsed(stacked_bars("Memory", [Bar("planned", segments, limit=120, note="100 MB")], "MB"))
    boxes = [(float(node.attrib["x"]), float(node.attrib["width"])) for node in root.iter("rect")]
    assert boxes[1][0] == pytest.approx(boxes[0][0] + boxes[0][1], abs=0.02)
    assert boxes[2][0] == pytest.approx(boxes[1][0] + boxes[1][1], abs=0.02)
    assert boxes[2][1] / boxes[0][1] == pytest.approx(7 / 3, abs=0.01)
    assert [node.text for node in root.iter("title")] == ["a: 30.0", "b: 0.0", "c: 70.0"]
    assert {"planned", "100 MB", "MB", "0"} <= set(texts(root))
    assert [node.attrib["class"] for node in root.iter("line")].count("limit") == 1
    assert next(itertools.islice(root.iter("rect"), 2, None)).attrib["class"] == f"segment f{NEUTRAL}"


def test_what_is_written_is_escaped() -> None:
    lines = [Line(HOSTILE, (Point(1, 1), Point(2, 2)))]
    bars = [Bar(HOSTILE, (Segment(HOSTILE, 1, 0),), note=HOSTILE)]
    for markup in (
        size_plot(HOSTILE, lines, HOSTILE, HOSTILE),
        time_plot(HOSTILE, lines, [Phase(HOSTILE, 1)], HOSTILE, HOSTILE),
        stacked_bars(HOSTILE, bars, HOSTILE),
    ):
        assert "<script" not in markup
        root = parsed(markup)
        assert root.attrib["aria-label"] == HOSTILE
        assert HOSTILE in texts(root)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_coordinate_that_is_no_number(value: float) -> None:
    with pytest.raises(AssertionError, match=f"a number of the page is {value}"):
        svg.line(0, value, 1, 1, "rule")


def test_numbers_are_short() -> None:
    assert [number(value) for value in (1.0, 1.239, -0.001, 100, 0.5)] == ["1", "1.24", "0", "100", "0.5"]
    assert element("a", "<b>", class_="x y", stroke_width=2) == '<a class="x y" stroke-width="2"><b></a>'


# scales


def test_a_scale_meets_its_ends() -> None:
    for scale in (Scale(0, 10, 50, 450), Scale(128, 32_768, 50, 450, is_log=True)):
        assert (scale.at(scale.low), scale.at(scale.high)) == (50, 450)
    assert Scale(1, 100, 0, 200, is_log=True).at(10) == pytest.approx(100)
    assert Scale(5, 5, 0, 200).at(5) == 100


@pytest.mark.parametrize("high", [0.003, 0.9, 1.0, 4.65, 10, 99.9, 100, 2_513, 131_072])
def test_ticks_are_round_few_and_reach_the_highest(high: float) -> None:
    ticks = round_ticks(high)
    assert ticks[0] == 0
    assert ticks[-2] < high <= ticks[-1] * (1 + 1e-9)
    assert 3 <= len(ticks) <= 6
    steps = {round((b - a) / ticks[1], 9) for a, b in itertools.pairwise(ticks)}
    assert steps == {1.0}
    assert len({tick_label(tick) for tick in ticks}) == len(ticks)


def test_nothing_to_show_has_ticks_too() -> None:
    assert round_ticks(0) == [0.0, 1.0]
    assert [tick_label(value) for value in (0.0, 0.25, 2.5, 12_500.0)] == ["0", "0.25", "2.5", "12,500"]


@pytest.mark.parametrize("positions", [[], [5.0], [50, 50, 50], [0, 100, 1], [99, 100, 98, 3], [-20, 300]])
def test_spread_positions_keep_their_gap_their_order_and_their_bounds(positions: list[float]) -> None:
    found = spread(positions, 15, 0, 100)
    assert len(found) == len(positions)
    assert all(0 <= place <= 100 for place in found)
    for (a, x), (b, y) in itertools.combinations(zip(positions, found, strict=True), 2):
        assert abs(x - y) >= 15 - 1e-9
        assert a == b or (a < b) == (x < y)


def test_what_has_room_stays_and_what_has_none_is_even() -> None:
    assert spread([10, 60, 30], 15, 0, 100) == [10, 60, 30]
    assert spread([1.0] * 11, 15, 0, 100) == pytest.approx([10 * index for index in range(11)])


# colours


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_lines_stand_out_in_both_schemes(scheme: str) -> None:
    ink = INK[scheme]
    for ground in ("paper", "panel"):
        # WCAG 2: 4.5 for text, 3 for what a picture is made of
        for name in ("ink", "muted", "good", "bad", "warn"):
            assert contrast(ink[name], ink[ground]) >= 4.5, (name, ground)
        for colour in PLOT_COLOURS[scheme]:
            assert contrast(colour, ink[ground]) >= 3, (colour, ground)


def test_every_series_has_a_colour_and_one_is_left_for_none() -> None:
    assert [len(colours) for colours in PLOT_COLOURS.values()] == [NUM_COLOURS + 1] * 2
    assert all(len(set(colours)) == len(colours) for colours in PLOT_COLOURS.values())
    assert NEUTRAL == NUM_COLOURS


def test_the_sheet_has_both_schemes_and_print() -> None:
    sheet = style_sheet()
    for part in ("prefers-color-scheme: dark", "@media print", "max-width: 640px", "tabular-nums", ".s12{", ".f12{"):
        assert part in sheet
    assert sheet.count("{") == sheet.count("}")
    assert "http" not in sheet and "url(" not in sheet
