"""SVG pictures: text, lines and the picture itself. Colours come from the page's style sheet by class."""

from collections.abc import Sequence
from html import escape

from edge.report.markup import element, number


def text(content: str, x: float, y: float, class_: str = "", anchor: str = "start") -> str:
    """Text whose baseline begins, is centred or ends at a point."""
    return element("text", escape(content), x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Sequence[tuple[float, float]], class_: str) -> str:
    """Straight lines from point to point."""
    return element("polyline", points=" ".join(f"{number(x)},{number(y)}" for x, y in points), class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, tip: str) -> str:
    """A rectangle; `tip` is shown where a pointer rests on it."""
    title = element("title", escape(tip))
    return element("rect", title, x=x, y=y, width=max(width, 0.0), height=height, class_=class_)


def dot(x: float, y: float, class_: str) -> str:
    """A point of a line."""
    return element("circle", cx=x, cy=y, r=3.2, class_=class_)


def document(width: float, height: float, label: str, *children: str) -> str:
    """A picture that scales with its place; `label` is what a screen reader says."""
    box = f"0 0 {number(width)} {number(height)}"
    return element("svg", *children, viewBox=box, role="img", aria_label=label, class_="plot")
