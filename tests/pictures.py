"""What every SVG picture of a page must be."""

import re
import xml.etree.ElementTree as ElementTree

COORDINATES = {"x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"}


def parsed(markup: str) -> ElementTree.Element:
    """The picture's elements; fails where it is no XML, or a coordinate is no finite number within the picture."""
    root = ElementTree.fromstring(markup)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for node in root.iter():
        for name in COORDINATES & node.attrib.keys():
            assert re.fullmatch(r"-?[0-9]+(\.[0-9]{1,2})?", node.attrib[name]), (node.tag, node.attrib)
            assert 0 <= float(node.attrib[name]) <= max(width, height)
        for x, y in (point.split(",") for point in node.attrib.get("points", "").split()):
            assert 0 <= float(x) <= width and 0 <= float(y) <= height
    return root
