"""Artifacts in both layouts, exported from a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quant.recipe import make_recipe
from runtime.layout import LAYOUTS, Layout

if TYPE_CHECKING:
    from export.graph import Graph
    from export.linear import StoredMatrix
    from tests.checkpoints import TinyCheckpoint

Exported = dict[Layout, Path]


@dataclass(frozen=True, slots=True)
class StandInProduct:
    """Names the matrix and its sizes, which is all that a stored graph is asked for where nothing runs it."""

    def emit(self, graph: Graph, activations: str, weight: StoredMatrix, name: str) -> str:
        from export.graph import EDGE

        assert weight.panels is not None
        inputs = [activations, graph.external(f"{name}.panels", weight.panels)]
        return graph.node("QuantizedMatMul", inputs, domain=EDGE, K=weight.width, N=weight.num_rows)


@contextmanager
def native_graphs() -> Iterator[None]:
    """Within, exports emit native graphs: stand-ins where the emitter of real ones is not part of the package yet."""
    from export import pipeline
    from export.layers import LayerEmitter

    def stand_in(*fields: Any) -> LayerEmitter:
        return LayerEmitter(*fields[:4], StandInProduct(), *fields[5:])

    with pytest.MonkeyPatch.context() as patch:
        if "native" not in pipeline.EMITTERS:
            patch.setitem(pipeline.EMITTERS, "native", stand_in)  # type: ignore[arg-type]  # called as one
        yield


def export_both(checkpoint: TinyCheckpoint, folder: Path, **recipe: Any) -> Exported:
    """The same export in each layout."""
    from export.pipeline import export_artifact, open_source

    made: Exported = {}
    for layout in LAYOUTS:
        made[layout] = folder / layout
        source = open_source(checkpoint.target, checkpoint.assistant)
        with native_graphs():
            export_artifact(source, made[layout], make_recipe(**recipe), layout=layout, show_progress=False)
    return made


ExportBoth = Callable[..., Exported]
