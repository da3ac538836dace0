"""The quantized matrix product: how a weight matrix is stored, once for all graphs, and which node multiplies with it.

Source: onnxruntime ContribOperators, `MatMulNBits` (`accuracy_level` 4 computes in int8, 0 in float32).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from export.checkpoint import Checkpoint, Float32, Indices
from export.errors import CheckpointError
from export.graph import MICROSOFT, DataFile, Graph, Region
from quant.blockwise import BlockFormat, Codes, Float16
from quant.recipe import Activations, WeightFormat
from runtime.layout import Layout
from runtime.matrix_spec import MatrixSpec, padded_rows
from runtime.panels import PANEL_ROWS, pack

ACCURACY_LEVELS: dict[Activations, int] = {"int8": 4, "float32": 0}
FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Rows [start, stop) of a checkpoint tensor."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight [num_rows, width]: rows of checkpoint tensors stacked, or one whole tensor in an `order`."""

    name: str
    checkpoint: Checkpoint
    parts: tuple[TensorRows, ...]
    width: int
    order: Indices | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all parts together."""
        return sum(part.stop - part.start for part in self.parts)

    def check(self) -> None:
        """Raises CheckpointError where a part has not the width or too few rows."""
        for part in self.parts:
            shape = self.checkpoint.shape(part.name)
            if len(shape) != 2 or shape[1] != self.width or shape[0] < part.stop:
                raise CheckpointError(
                    f"{self.checkpoint.place(part.name)} has shape {list(shape)}, "
                    f"expected [{part.stop}, {self.width}] from config.json"
                )

    def chunks(self) -> Iterator[Float32]:
        """Its rows in order, as chunks [n, width]."""
        if self.order is not None:
            yield from self.checkpoint.rows_in_order(self.parts[0].name, self.order)
            return
        for part in self.parts:
            yield from self.checkpoint.rows(part.name, part.start, part.stop)


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Where a matrix lies.

    Plain floats: `rows` [num_rows, width] alone. Quantized, whatever the layout of the bytes: `rows` [num_rows,
    num_blocks, block_bytes] and `scales` [num_rows, num_blocks] for portable graphs, for native ones all as `panels`.
    """

    form: WeightFormat
    num_rows: int
    width: int
    rows: Region
    scales: Region | None = None
    panels: Region | None = None

    @property
    def spec(self) -> MatrixSpec:
        """The manifest's description of a quantized matrix."""
        assert self.panels is not None
        return _spec(self.panels.location, self.panels.offset, self.num_rows, self.width, self.form)


def _spec(file: str, offset: int, num_rows: int, width: int, form: WeightFormat) -> MatrixSpec:
    blocks = BlockFormat(width, form.bits, form.block_size)
    return MatrixSpec(file, offset, num_rows, blocks.num_blocks, blocks.block_bytes)


Progress = Callable[[int], None]


class WeightStore:
    """The weights of one data file in one layout: each is stored once, however many graphs read it."""

    def __init__(self, data: DataFile, layout: Layout, progress: Progress) -> None:
        """`progress` hears of each chunk's number of weights."""
        self._data = data
        self._layout = layout
        self._progress = progress
        self._kept: dict[str, tuple[Matrix, StoredMatrix]] = {}
        self._indices: dict[str, Region] = {}

    @property
    def matrices(self) -> list[StoredMatrix]:
        """What is stored, in its order."""
        return [stored for _, stored in self._kept.values()]

    def keep(self, matrix: Matrix, form: WeightFormat) -> StoredMatrix:
        """Stores a matrix unless one of its name is there; CheckpointError where it cannot be stored."""
        if matrix.name in self._kept:
            same, stored = self._kept[matrix.name]
            asked, kept = (matrix.parts, matrix.width, form), (same.parts, same.width, stored.form)
            assert asked == kept, f"{matrix.name}: {asked} is not what is stored, {kept}"
            return stored
        matrix.check()
        stored = self._store_blocks(matrix, form) if form.is_quantized else self._store_floats(matrix, form)
        self._kept[matrix.name] = (matrix, stored)
        return stored

    def keep_indices(self, name: str, values: Indices) -> Region:
        """Stores an array of indices unless one of its name is there."""
        if name not in self._indices:
            self._indices[name] = self._data.reserve(values.shape, np.int64)
            self._data.write(self._indices[name], 0, values)
        return self._indices[name]

    def _store_floats(self, matrix: Matrix, form: WeightFormat) -> StoredMatrix:
        region = self._data.reserve((matrix.num_rows, matrix.width), np.float16 if form.bits == 16 else np.float32)
        first = 0
        for chunk in matrix.chunks():
            if form.bits == 16 and np.abs(chunk).max() > FLOAT16_MAX:
                raise _too_large(matrix, "float16")
            self._data.write(region, first, chunk)
            first += len(chunk)
            self._progress(chunk.size)
        return StoredMatrix(form, matrix.num_rows, matrix.width, region)

    def _store_blocks(self, matrix: Matrix, form: WeightFormat) -> StoredMatrix:
        blocks = BlockFormat(matrix.width, form.bits, form.block_size)
        size = _spec("", 0, matrix.num_rows, matrix.width, form)
        whole = self._data.reserve((size.num_bytes,), np.uint8)
        panels = replace(whole, shape=(size.padded_rows // PANEL_ROWS, size.panel_bytes))
        rows = replace(whole, shape=(size.padded_rows, size.num_blocks, size.block_bytes))
        scales = replace(
            whole,
            offset=whole.offset + size.scale_offset,
            shape=(size.padded_rows, size.num_blocks),
            dtype=np.dtype(np.float16),
        )
        first = 0
        for chunk_codes, chunk_scales in in_whole_panels(self._quantized(matrix, blocks), blocks):
            if self._layout == "native":
                self._data.write(panels, first // PANEL_ROWS, pack(chunk_codes, chunk_scales))
            else:
                self._data.write(rows, first, chunk_codes)
                self._data.write(scales, first, chunk_scales)
            first += len(chunk_codes)
        rows = replace(rows, shape=(matrix.num_rows, *rows.shape[1:]))
        scales = replace(scales, shape=(matrix.num_rows, *scales.shape[1:]))
        return StoredMatrix(form, matrix.num_rows, matrix.width, rows, scales, whole)

    def _quantized(self, matrix: Matrix, blocks: BlockFormat) -> Iterator[tuple[Codes, Float16]]:
        for chunk in matrix.chunks():
            codes, scales = matrix.checkpoint.quantize(chunk, blocks)
            if not np.isfinite(scales).all():
                raise _too_large(matrix, "a scale of float16")
            yield codes.reshape(len(codes), blocks.num_blocks, blocks.block_bytes), scales
            self._progress(chunk.size)


def in_whole_panels(chunks: Iterable[tuple[Codes, Float16]], blocks: BlockFormat) -> Iterator[tuple[Codes, Float16]]:
    """The same rows in chunks of whole panels; behind the last row, rows of zero weights fill its panel."""
    codes = np.empty((0, blocks.num_blocks, blocks.block_bytes), np.uint8)
    scales = np.empty((0, blocks.num_blocks), np.float16)
    for chunk_codes, chunk_scales in chunks:
        codes, scales = np.concatenate([codes, chunk_codes]), np.concatenate([scales, chunk_scales])
        whole = len(codes) // PANEL_ROWS * PANEL_ROWS
        if whole:
            yield codes[:whole], scales[:whole]
        codes, scales = codes[whole:], scales[whole:]
    missing = padded_rows(len(codes)) - len(codes)
    if missing:
        filling = np.full((missing, blocks.num_blocks, blocks.block_bytes), blocks.zero_byte, np.uint8)
        no_scales = np.zeros((missing, blocks.num_blocks), np.float16)
        yield np.concatenate([codes, filling]), np.concatenate([scales, no_scales])


def _too_large(matrix: Matrix, what: str) -> CheckpointError:
    return CheckpointError(f"{matrix.checkpoint.folder}: {matrix.name}: weights exceed {what}; export with --bits 32")


class Product(Protocol):
    """Multiplies activations with stored matrices."""

    def emit(self, graph: Graph, activations: str, weight: StoredMatrix, name: str) -> str:
        """Appends activations [..., width] @ weight.T -> [..., num_rows]."""
        ...


@dataclass(frozen=True, slots=True)
class PortableProduct:
    """Nodes of stock ONNX Runtime: `MatMulNBits` for 4 and 8 bits, `Gemm` for floats."""

    activations: Activations

    def emit(self, graph: Graph, activations: str, weight: StoredMatrix, name: str) -> str:
        """Appends activations [num_tokens, width] @ weight.T -> [num_tokens, num_rows]."""
        rows = graph.external(f"{name}.weight", weight.rows)
        if weight.scales is None:
            if weight.form.bits == 16:
                rows = graph.node("Cast", [rows], to=1)
            return graph.node("Gemm", [activations, rows], transB=1)
        # MatMulNBits takes float32; onnxruntime folds the cast when it loads the graph
        scales = graph.node("Cast", [graph.external(f"{name}.scales", weight.scales)], to=1)
        return graph.node(
            "MatMulNBits",
            [activations, rows, scales],
            domain=MICROSOFT,
            K=weight.width,
            N=weight.num_rows,
            bits=weight.form.bits,
            block_size=weight.form.block_size,
            accuracy_level=ACCURACY_LEVELS[self.activations],
        )
