"""Elements of HTML and SVG as text: everything is escaped, every number finite."""

import math
from html import escape

Value = str | float


def element(name: str, *children: str, **attributes: Value) -> str:
    """One element; children are markup already. `class_` and `text_anchor` become `class` and `text-anchor`."""
    given = "".join(f' {_name(key)}="{_value(value)}"' for key, value in attributes.items())
    return f"<{name}{given}>{''.join(children)}</{name}>"


def document(title: str, style: str, *sections: str) -> str:
    """A whole page of sections, which are markup already; nothing in it comes from elsewhere."""
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", escape(title)),
        element("style", style),
    ]
    html = element("html", element("head", *head), element("body", *sections), lang="en")
    return f"<!doctype html>\n{html}\n"


def number(value: float) -> str:
    """A number with at most two decimals."""
    assert math.isfinite(value), f"a number of the page is {value}"
    rounded = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if rounded == "-0" else rounded


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: Value) -> str:
    return escape(value) if isinstance(value, str) else number(value)
