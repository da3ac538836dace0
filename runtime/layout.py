"""The two layouts of one artifact's weights, and what its files are called in each.

Every artifact has one copy of its weights, in the layout that its manifest names. Each graph works on one layout; that
of the other layout is kept as a twin under a name of its own, so that nothing loads it over the wrong bytes.
"""

from typing import Literal, get_args

Layout = Literal["portable", "native"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

DECODER, DRAFTER, EMBED = "decoder.onnx", "drafter.onnx", "embed.onnx"
DECODER_DATA, DRAFTER_DATA = f"{DECODER}.data", f"{DRAFTER}.data"
GRAPHS = (DECODER, DRAFTER, EMBED)


def other_layout(layout: Layout) -> Layout:
    """The one that `layout` is not."""
    return "native" if layout == "portable" else "portable"


def graph_file(graph: str, works_on: Layout, artifact: Layout) -> str:
    """The file of a graph that works on one layout, in an artifact of the same or of the other layout."""
    return graph if works_on == artifact else f"{graph}.{works_on}"


def converted_name(name: str, layout: Layout) -> str:
    """What the file `name` of an artifact is called after its conversion to `layout`."""
    for graph in GRAPHS:
        for works_on in LAYOUTS:
            if name == graph_file(graph, works_on, other_layout(layout)):
                return graph_file(graph, works_on, layout)
    return name
