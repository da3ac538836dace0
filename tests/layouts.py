"""Artifacts in both layouts, exported from a tiny checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.recipe import make_recipe
from runtime.layout import LAYOUTS, Layout

if TYPE_CHECKING:
    from tests.checkpoints import TinyCheckpoint

Exported = dict[Layout, Path]


def export_both(checkpoint: TinyCheckpoint, folder: Path, **recipe: Any) -> Exported:
    """The same export in each layout."""
    from export.pipeline import export_artifact, open_source

    made: Exported = {}
    for layout in LAYOUTS:
        made[layout] = folder / layout
        source = open_source(checkpoint.target, checkpoint.assistant)
        export_artifact(source, made[layout], make_recipe(**recipe), layout=layout, show_progress=False)
    return made


ExportBoth = Callable[..., Exported]
