"""Artifacts in both layouts, exported from a tiny checkpoint; and where tests of the native one are left out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from quant.recipe import make_recipe
from runtime import native
from runtime.layout import LAYOUTS, Layout

if TYPE_CHECKING:
    from tests.checkpoints import TinyCheckpoint

Exported = dict[Layout, Path]

# Only where there is nothing to build the ops with: ops that were built and do not work must fail.
needs_native = pytest.mark.skipif(
    native.library_path() is None and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))),
    reason="the native ops are not built, and there is no C++ compiler",
)
each_layout = [layout if layout == "portable" else pytest.param(layout, marks=needs_native) for layout in LAYOUTS]


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
