"""Artifacts whose graphs exist in both layouts over one data file, in which every matrix lies in both forms.

Stands in for the real ones, which keep one form: here both graphs can run at once over the same weights.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from export import linear, pipeline
from export.graph import DataFile, Graph, Region
from export.layers import LayerEmitter
from export.linear import Matrix, PortableProduct, Progress, StoredMatrix
from export.native_layers import NativeLayerEmitter
from export.stack import StackWeights
from quant.blockwise import BlockFormat, quantize_rows
from quant.recipe import Activations, WeightFormat, make_recipe
from runtime.drafter import DrafterModel
from runtime.kv_cache import KVCache
from runtime.manifest import read_manifest
from runtime.session import check_signature
from runtime.signature import decoder_signature, drafter_signature
from runtime.tables import RowTable
from runtime.target import TargetModel
from tests.checkpoints import TinyCheckpoint
from tests.models import TinyModels
from tests.native_reference import PANEL_ROWS, pack_panels
from tests.native_session import ReferenceSession


def export_both(pair: TinyCheckpoint, folder: Path, bits: int, block_size: int, activations: Activations) -> Path:
    """An artifact whose portable graphs have native twins, `decoder.onnx.native` and `drafter.onnx.native`."""
    recipe = make_recipe(bits, block_size, activations)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "_store_blocks", _store_both)
        patch.setattr(pipeline, "LayerEmitter", _TwoEmitters)
        patch.setattr(pipeline, "DecoderGraph", _twice(pipeline.DecoderGraph))
        patch.setattr(pipeline, "DrafterGraph", _twice(pipeline.DrafterGraph))
        pipeline.export_artifact(pipeline.open_source(pair.target, pair.assistant), folder, recipe, show_progress=False)
    return folder


class _TwoEmitters:
    """What `export.pipeline` makes instead of one emitter."""

    def __init__(self, graph: Graph, weights: StackWeights, product: PortableProduct) -> None:
        self.portable = LayerEmitter(graph, weights, product)
        self.native = NativeLayerEmitter(Graph(graph.name, graph.data), weights)


def _twice(graph_class: Any) -> Any:
    """`graph_class` for two emitters at once; saves the native graph itself."""

    class Both:
        def __init__(self, emitters: _TwoEmitters, *arguments: Any) -> None:
            self.emitters, self.arguments = emitters, arguments

        def emit(self, *arguments: Any) -> None:
            for emitter in (self.emitters.portable, self.emitters.native):
                graph_class(emitter, *self.arguments).emit(*arguments)
            native = self.emitters.native.graph
            native.save(native.data.path.with_name(f"{native.name}.onnx.native"))

    return Both


def _store_both(matrix: Matrix, form: WeightFormat, data: DataFile, progress: Progress, scale_type: type) -> Any:
    """`linear._store_blocks` with float16 scales' values and the panels behind."""
    blocks = BlockFormat(matrix.width, form.bits, form.block_size)
    stored = [quantize_rows(chunk, blocks, np.float16) for chunk in matrix.chunks()]
    codes, scales = (np.concatenate(parts) for parts in zip(*stored, strict=True))
    codes = codes.reshape(len(codes), blocks.num_blocks, blocks.block_bytes)
    regions = [data.reserve(codes.shape, np.uint8), data.reserve(scales.shape, scale_type)]
    data.write(regions[0], 0, codes)
    data.write(regions[1], 0, scales)
    num_padding = -len(codes) % PANEL_ROWS
    middle = 0x88 if form.bits == 4 else 0x80
    codes = np.pad(codes, ((0, num_padding), (0, 0), (0, 0)), constant_values=middle)
    panels = pack_panels(codes, np.pad(scales, ((0, num_padding), (0, 0))))
    if data.path.suffix == ".bin":  # the runtime expects nothing behind a table
        with DataFile(data.path.with_suffix(".panels")) as beside:
            regions.append(_written(beside, panels))
    else:
        regions.append(_written(data, panels))
    return StoredMatrix(form, matrix.num_rows, matrix.width, *regions)


def _written(data: DataFile, values: npt.NDArray[np.uint8]) -> Region:
    region = data.reserve(values.shape, np.uint8)
    data.write(region, 0, values)
    return region


def open_native(folder: Path, *, rounds: bool = True, max_tokens: int = 512, max_new_tokens: int = 128) -> TinyModels:
    """Opens the native graphs under the reference ops, as `tests.models.open_models` opens the portable ones."""
    manifest = read_manifest(folder)
    assert manifest.drafter is not None
    sessions: list[Any] = []
    signatures = decoder_signature(manifest.model, "native"), drafter_signature(manifest.drafter, "native")
    for name, signature in zip(("decoder", "drafter"), signatures, strict=True):
        path = folder / f"{name}.onnx.native"
        sessions.append(ReferenceSession(path, rounds=rounds))
        check_signature(path, sessions[-1], signature)
    target = TargetModel(
        sessions[0],
        manifest.model,
        KVCache(manifest.model, max_tokens=max_tokens, max_new_tokens=max_new_tokens),
        RowTable(folder, manifest.token_table),
        RowTable(folder, manifest.ple_table),
        "native",
    )
    return TinyModels(manifest, target, DrafterModel(sessions[1], manifest.drafter, target))
