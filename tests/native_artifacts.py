"""Artifacts in both layouts whose portable graphs compute in float32, and native ones opened under reference ops."""

from pathlib import Path
from typing import Any

import pytest

from export import pipeline
from quant.recipe import Activations, Recipe, make_recipe
from runtime.drafter import DrafterModel
from runtime.kv_cache import KVCache
from runtime.layout import LAYOUTS
from runtime.manifest import read_manifest
from runtime.session import check_signature
from runtime.signature import decoder_signature, drafter_signature
from runtime.tables import RowTable
from runtime.target import TargetModel
from tests.checkpoints import TinyCheckpoint
from tests.models import TinyModels
from tests.native_session import ReferenceSession

NATIVE = "native"


def export_both(pair: TinyCheckpoint, folder: Path, bits: int, block_size: int, activations: Activations) -> Path:
    """A portable artifact and, beside it, the native one, whatever the activations are."""
    recipe = make_recipe(bits, block_size, activations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "allows_native", lambda *_: True)
        for layout in LAYOUTS:
            source = pipeline.open_source(pair.target, pair.assistant)
            made = folder if layout == "portable" else folder.with_name(NATIVE)
            pipeline.export_artifact(source, made, recipe, layout=layout, show_progress=False)
    return folder


def open_native(folder: Path, *, rounds: bool = True, max_tokens: int = 512, max_new_tokens: int = 128) -> TinyModels:
    """Opens the native graphs under the reference ops, as `tests.models.open_models` opens the portable ones.

    Args:
        rounds: activations to int8 and KV rows to float16, as the real ops do; everything is float32 otherwise
    """
    manifest = read_manifest(folder)
    assert manifest.drafter is not None
    sessions: list[Any] = []
    signatures = decoder_signature(manifest.model, "native"), drafter_signature(manifest.drafter, "native")
    for name, signature in zip(("decoder", "drafter"), signatures, strict=True):
        path = folder / f"{name}.onnx"
        sessions.append(ReferenceSession(path, rounds=rounds))
        check_signature(path, sessions[-1], signature)
    target = TargetModel(
        sessions[0],
        manifest.model,
        KVCache(
            manifest.model, "float16" if rounds else "float32", max_tokens=max_tokens, max_new_tokens=max_new_tokens
        ),
        RowTable(folder, manifest.token_table),
        RowTable(folder, manifest.ple_table),
        "native",
    )
    return TinyModels(manifest, target, DrafterModel(sessions[1], manifest.drafter, target))
